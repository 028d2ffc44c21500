"""The CPU platform's worker against the plainest possible model of vLLM's pool layout."""

from __future__ import annotations

import contextlib
import mmap
import uuid
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from vllm.v1.kv_offload.base import (
    CanonicalKVCacheRef,
    CanonicalKVCaches,
    CanonicalKVCacheTensor,
    GPULoadStoreSpec,
)
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion

from kvmesh.vllm.host_copy import HostCopyWorker

SLOTS = 6
BLOCKS = 12


@contextlib.contextmanager
def running_worker(
    page_bytes: Sequence[int], groups: Sequence[Sequence[int]], blocks_per_chunk: int, *, rank: int = 0, ranks: int = 1
) -> Iterator[tuple[HostCopyWorker, list[torch.Tensor], np.ndarray]]:
    """A worker with one cache tensor per page size, used by `groups`; yields it, the tensors and the pool's rows."""
    area_bytes = sum(page_bytes) * blocks_per_chunk
    row_bytes = -(-area_bytes * ranks // mmap.PAGESIZE) * mmap.PAGESIZE
    region = SharedOffloadRegion(
        engine_id=f"test-{uuid.uuid4().hex}",
        num_chunks=SLOTS,
        rank=rank,
        kv_bytes_per_chunk=row_bytes,
        cpu_page_size=area_bytes,
    )
    rows = np.ndarray((SLOTS, row_bytes), np.int8, region.mmap_obj)
    tensors = [torch.randint(-128, 128, (BLOCKS, size), dtype=torch.int8) for size in page_bytes]
    caches = CanonicalKVCaches(
        tensors=[CanonicalKVCacheTensor(tensor, tensor.shape[1]) for tensor in tensors],
        group_data_refs=[
            [CanonicalKVCacheRef(tensor_idx=index, page_size_bytes=page_bytes[index]) for index in group]
            for group in groups
        ],
    )
    worker = HostCopyWorker(caches, blocks_per_chunk, region)
    try:
        yield worker, tensors, rows
    finally:
        del rows, caches
        worker.shutdown()


class Job:
    """Blocks of one request in each group, and the slots of the chunks that they touch."""

    def __init__(self, counts: Sequence[int], first_indices: Sequence[int], blocks_per_chunk: int, seed: int) -> None:
        random = np.random.default_rng(seed)
        self.counts, self.first_indices, self.blocks_per_chunk = counts, first_indices, blocks_per_chunk
        blocks = random.permutation(BLOCKS)[: sum(counts)]
        self.block_ids = blocks.tolist()
        self.slot_counts = [
            -(-(first % blocks_per_chunk + count) // blocks_per_chunk) if count else 0
            for count, first in zip(counts, first_indices, strict=True)
        ]
        self.slots = random.permutation(SLOTS)[: sum(self.slot_counts)].tolist()

    @property
    def fits(self) -> bool:
        return sum(self.counts) <= BLOCKS and sum(self.slot_counts) <= SLOTS

    def device(self) -> GPULoadStoreSpec:
        return GPULoadStoreSpec(self.block_ids, group_sizes=self.counts, block_indices=self.first_indices)

    def host(self) -> CPULoadStoreSpec:
        return CPULoadStoreSpec(self.slots)

    def places(self) -> Iterator[tuple[int, int, int, int]]:
        """(group, device block, slot, place in the chunk) of every block: the definition of the layout."""
        blocks, slots = iter(self.block_ids), iter(self.slots)
        for group, (count, first) in enumerate(zip(self.counts, self.first_indices, strict=True)):
            slot = -1
            for index in range(first, first + count):
                if slot < 0 or index % self.blocks_per_chunk == 0:
                    slot = next(slots)
                yield group, next(blocks), slot, index % self.blocks_per_chunk


def page_of(rows, page_bytes, blocks_per_chunk, tensor, slot, place, area_start=0) -> np.ndarray:
    """Where a page lies in its row: tensor by tensor, block by block."""
    start = area_start + sum(page_bytes[:tensor]) * blocks_per_chunk + place * page_bytes[tensor]
    return rows[slot, start : start + page_bytes[tensor]]


GROUPS = st.sampled_from([[[0]], [[0, 1]], [[0, 1], [2]], [[0], [1], [2]], [[0, 1], [0, 1]]])


@st.composite
def jobs(draw):
    groups = draw(GROUPS)
    tensors = max(index for group in groups for index in group) + 1
    page_bytes = draw(st.lists(st.sampled_from([8, 16, 24, 40, 7, 12]), min_size=tensors, max_size=tensors))
    blocks_per_chunk = draw(st.integers(1, 4))
    counts = [draw(st.integers(0, 5)) for _ in groups]
    first_indices = [draw(st.integers(0, 9)) for _ in groups]
    return groups, page_bytes, Job(counts, first_indices, blocks_per_chunk, draw(st.integers(0, 1 << 16)))


@given(jobs())
@settings(max_examples=60, deadline=None)
def test_blocks_go_where_the_layout_says_and_come_back(case):
    """A store copies exactly the job's pages, also of partial chunks, odd sizes, several groups; a load inverts it."""
    groups, page_bytes, job = case
    assume(job.fits)
    with running_worker(page_bytes, groups, job.blocks_per_chunk) as (worker, tensors, rows):
        rows[:] = 0x55
        expected = rows.copy()
        moved = 0
        for group, block, slot, place in job.places():
            for tensor in groups[group]:
                page_of(expected, page_bytes, job.blocks_per_chunk, tensor, slot, place)[:] = tensors[tensor][block]
                moved += page_bytes[tensor]
        assert worker.submit_store(1, job.device(), job.host())
        assert np.array_equal(rows, expected)

        originals = [tensor.clone() for tensor in tensors]
        wanted = [torch.zeros_like(tensor) for tensor in tensors]
        for group, block, _, _ in job.places():
            for tensor in groups[group]:
                wanted[tensor][block] = originals[tensor][block]
        for tensor in tensors:
            tensor.zero_()
        assert worker.submit_load(2, job.host(), job.device(), expedited=True)
        assert all(torch.equal(tensor, want) for tensor, want in zip(tensors, wanted, strict=True))

        results = worker.get_finished()
        assert [(result.job_id, result.success, result.transfer_size) for result in results] == [
            (1, True, moved),
            (2, True, moved),
        ]
        assert worker.get_finished() == []
        worker.wait({1, 2})
        del rows


@pytest.mark.parametrize(("page_bytes", "word"), [((64, 16), torch.int64), ((64, 12), torch.int8), ((7,), torch.int8)])
def test_pages_are_copied_as_words_where_they_fit(page_bytes, word):
    """The last tensor is copied as 64-bit words exactly when all its pages start and end on them."""
    with running_worker(page_bytes, [list(range(len(page_bytes)))], 3) as (worker, _, _):
        assert worker._tensors[-1].rows.dtype == worker._tensors[-1].blocks.dtype == word


def test_a_page_with_padding_is_copied_whole_and_alone():
    """Cache tensors may have rows wider than a page; what lies behind the page stays as it is."""
    wide = torch.arange(BLOCKS * 24, dtype=torch.int64).to(torch.int8).view(BLOCKS, 24)
    region = SharedOffloadRegion(
        engine_id=f"test-{uuid.uuid4().hex}",
        num_chunks=SLOTS,
        rank=0,
        kv_bytes_per_chunk=mmap.PAGESIZE,
        cpu_page_size=32,
    )
    caches = CanonicalKVCaches([CanonicalKVCacheTensor(wide, 16)], [[CanonicalKVCacheRef(0, 16)]])
    worker = HostCopyWorker(caches, 2, region)
    try:
        before = wide.clone()
        job = Job((2,), (0,), 2, seed=1)
        worker.submit_store(1, job.device(), job.host())
        wide.zero_()
        worker.submit_load(2, job.host(), job.device())
        assert torch.equal(wide[job.block_ids, :16], before[job.block_ids, :16])
        assert not wide[:, 16:].any()
    finally:
        worker.shutdown()


def test_ranks_share_a_row_without_touching_each_other():
    """With tensor parallelism each rank owns one part of every row."""
    job = Job((4,), (0,), 4, seed=3)
    with running_worker((16,), [[0]], 4, rank=1, ranks=2) as (worker, tensors, rows):
        worker.submit_store(1, job.device(), job.host())
        expected = np.zeros_like(rows)
        for _, block, slot, place in job.places():
            page_of(expected, (16,), 4, 0, slot, place, area_start=64)[:] = tensors[0][block]
        assert np.array_equal(rows, expected)
        del rows
