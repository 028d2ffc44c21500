"""The CPU platform's worker: copies KV blocks between vLLM's cache tensors and the host pool. Runs in a worker process.

A chunk's row holds, for each cache tensor in turn, the pages of the chunk's blocks. Whole pages are copied (their bytes
depend on the instruction set, so nothing looks inside), as 64-bit words, which is 1.5 to 3 times faster than bytes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from kvmesh.vllm.compat import (
    CanonicalKVCaches,
    CPULoadStoreSpec,
    GPULoadStoreSpec,
    OffloadingWorker,
    SharedOffloadRegion,
    TransferResult,
)
from kvmesh.vllm.pool_names import forget_name_if_gone


class _Tensor(NamedTuple):
    """One cache tensor and its part of the pool's rows, both as words."""

    blocks: torch.Tensor
    """(blocks, words per page)"""
    rows: torch.Tensor
    """(slots, words per page x blocks per chunk), strided over the pool's rows."""
    page_words: int
    page_bytes: int


class _Piece(NamedTuple):
    """Part of a chunk: device blocks `blocks` are the chunk's blocks from `first` on, in row `slot`."""

    slot: int
    first: int
    blocks: torch.Tensor


class HostCopyWorker(OffloadingWorker):
    """Synchronous copies: a job is finished when `submit_*` returns."""

    def __init__(self, kv_caches: CanonicalKVCaches, blocks_per_chunk: int, region: SharedOffloadRegion) -> None:
        self._region = region
        self._blocks_per_chunk = blocks_per_chunk
        self._groups = [[ref.tensor_idx for ref in refs] for refs in kv_caches.group_data_refs]
        self._tensors = [self._map(tensor.tensor, tensor.page_size_bytes) for tensor in kv_caches.tensors]
        self._finished: list[TransferResult] = []

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: CPULoadStoreSpec) -> bool:
        """Copy device blocks into slots."""
        started_s = time.perf_counter()
        copied_bytes = 0
        for tensor, piece in self._pieces(src_spec, dst_spec.chunk_ids):
            torch.index_select(tensor.blocks, 0, piece.blocks, out=self._slot_pages(tensor, piece))
            copied_bytes += len(piece.blocks) * tensor.page_bytes
        self._finish(job_id, copied_bytes, started_s)
        return True

    def submit_load(
        self,
        job_id: int,
        src_spec: CPULoadStoreSpec,
        dst_spec: GPULoadStoreSpec,
        expedited: bool = False,  # noqa: ARG002 - vLLM 0.33 passes it
    ) -> bool:
        """Copy slots into device blocks. `expedited` changes nothing: copies are synchronous."""
        started_s = time.perf_counter()
        copied_bytes = 0
        for tensor, piece in self._pieces(dst_spec, src_spec.chunk_ids):
            tensor.blocks.index_copy_(0, piece.blocks, self._slot_pages(tensor, piece))
            copied_bytes += len(piece.blocks) * tensor.page_bytes
        self._finish(job_id, copied_bytes, started_s)
        return True

    def get_finished(self) -> list[TransferResult]:
        finished, self._finished = self._finished, []
        return finished

    def wait(self, job_ids: set[int]) -> None:
        """Nothing is ever under way."""

    def shutdown(self) -> None:
        self._tensors.clear()
        forget_name_if_gone(self._region)
        self._region.cleanup()

    def _map(self, tensor: torch.Tensor, page_bytes: int) -> _Tensor:
        pages = tensor[:, :page_bytes]
        rows = self._region.create_next_worker_view(page_bytes * self._blocks_per_chunk)
        word = torch.int64 if _fits_words(pages, rows) else torch.int8
        return _Tensor(pages.view(word), rows.view(word), page_bytes // word.itemsize, page_bytes)

    def _slot_pages(self, tensor: _Tensor, piece: _Piece) -> torch.Tensor:
        """The piece's part of its row as (blocks, words per page)."""
        start = piece.first * tensor.page_words
        row = tensor.rows[piece.slot, start : start + len(piece.blocks) * tensor.page_words]
        return row.view(len(piece.blocks), tensor.page_words)

    def _pieces(self, device: GPULoadStoreSpec, slots: npt.NDArray[np.int64]) -> Iterator[tuple[_Tensor, _Piece]]:
        """Pair device blocks with slots. The first and the last chunk of a group may be covered in part only."""
        next_slot = next_block = 0
        for tensors, count, first_index in zip(self._groups, device.group_sizes, device.block_indices, strict=True):
            if not count:
                continue
            block_ids = torch.from_numpy(device.block_ids[next_block : next_block + count].astype(np.int64))
            next_block += count
            pieces = []
            done, first = 0, first_index % self._blocks_per_chunk
            while done < count:
                size = min(self._blocks_per_chunk - first, count - done)
                pieces.append(_Piece(int(slots[next_slot]), first, block_ids[done : done + size]))
                done, first, next_slot = done + size, 0, next_slot + 1
            for index in tensors:
                for piece in pieces:
                    yield self._tensors[index], piece

    def _finish(self, job_id: int, copied_bytes: int, started_s: float) -> None:
        self._finished.append(TransferResult(job_id, True, copied_bytes, time.perf_counter() - started_s))


def _fits_words(*tensors: torch.Tensor) -> bool:
    """Whether all rows start and end on 64-bit words."""
    numbers: Sequence[int] = [
        number for tensor in tensors for number in (tensor.data_ptr(), tensor.stride(0), tensor.shape[1])
    ]
    return all(number % 8 == 0 for number in numbers)
