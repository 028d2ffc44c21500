"""Stand-ins for what surrounds our vLLM adapter: the node, vLLM's configuration, and a host pool in shared memory."""

from __future__ import annotations

import contextlib
import mmap
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.kv_offload.base import OffloadKey, make_offload_key
from vllm.v1.kv_offload.config import (
    OffloadingCacheConfig,
    OffloadingConfig,
    OffloadingGroupConfig,
    OffloadingModelConfig,
    OffloadingParallelConfig,
)

from kvmesh.core.format import Format
from kvmesh.core.gate import Saved, Source
from kvmesh.core.ledger import SlotLedger
from kvmesh.core.reasons import MissReason
from kvmesh.node.fetch_jobs import FinishedJob
from kvmesh.node.state import NodeState
from kvmesh.transfer.pool import PoolSegment
from kvmesh.vllm.connector import FACTS_KEY, configure
from kvmesh.wire import link

BLOCK_TOKENS = 16
CHUNK_TOKENS = 64

DIRECTORY = {"controller_pull_url": "127.0.0.1:8300", "controller_reply_url": "127.0.0.1:8400"}
"""Sharing needs a directory; nothing here connects to it."""

FACTS = {
    "model_name": "tiny",
    "model_weights": "0" * 32,
    "model_dtype": "float32",
    "hash_algorithm": "sha256",
    "hash_seed": "",
}


def offload_key(number: int, group: int = 0) -> OffloadKey:
    """A key as vLLM makes it: 32 bytes of hash, 4 of group index."""
    return make_offload_key(number.to_bytes(32, "big"), group)


class FakeNode:
    """Takes the place of `NodeHandle`: nothing is fetched until the test says how it went."""

    def __init__(
        self,
        config_wire: bytes,
        kv_format: Format,
        ledger: SlotLedger,
        segments: Sequence[PoolSegment],
        *,
        log_level: str = "INFO",
    ) -> None:
        self.config_wire = config_wire
        self.kv_format = kv_format
        self.ledger = ledger
        self.segments = list(segments)
        self.log_level = log_level
        self.visible: set[bytes] = set()
        self.missing: set[bytes] = set()
        self.asked: list[list[bytes]] = []
        self.state = NodeState(alive=True, directory_connected=True, directory_ever_connected=True, peers=1)
        self.restarts = 0
        self.published: list[tuple[list[int], bool]] = []
        self.retracted: list[int] = []
        self.fetches: dict[int, list[bytes]] = {}
        self.fetch_slots: dict[int, list[int]] = {}
        self.timeouts_s: list[float] = []
        self.on_request: Callable[[link.Operate | link.MakeKeys], None] | None = None
        self.tokenizer = ""
        self.answers: list[link.Operated | link.KeysMade] = []
        self.saved: list[Saved | None] = []
        self.peer: Source | None = None
        self.finished: list[FinishedJob] = []
        self.records: list[link.RequestRecord] = []
        self.started = self.closed = False

    def start(self) -> link.Ready:
        self.started = True
        return link.Ready("fake", "1", "127.0.0.1", 1234, 0)

    def close(self) -> None:
        self.closed = True

    def is_visible(self, key: bytes) -> bool:
        return key in self.visible

    def is_known(self, key: bytes) -> bool:
        return not self.state.asks or key in self.visible or key in self.missing

    def ask(self, keys: Sequence[bytes]) -> None:
        self.asked.append(list(keys))

    def visible_count(self) -> int:
        return len(self.visible)

    @property
    def changes(self) -> int:
        return hash((frozenset(self.visible), self.state, self.restarts))

    def publish(self, slots: list[int], *, fetched: bool) -> None:
        self.published.append((list(slots), fetched))

    def retract(self, slots: list[int]) -> None:
        self.retracted += slots

    def record(self, record: link.RequestRecord) -> None:
        self.records.append(record)

    def fastest(self) -> Source | None:
        return self.peer

    def fetch(
        self,
        job_id: int,
        request_id: str,
        keys: list[bytes],
        slots: list[int],
        timeout_s: float,
        saved: Saved | None = None,
    ) -> None:
        self.saved.append(saved)
        self.fetches[job_id] = keys
        self.fetch_slots[job_id] = slots
        self.timeouts_s.append(timeout_s)

    def finish(self, job_id: int, reasons: Sequence[MissReason | None] | None = None) -> None:
        """Let a fetch end; without reasons, every chunk has come."""
        chunks = len(self.fetches.pop(job_id))
        given = list(reasons) if reasons is not None else [None] * chunks
        self.finished.append(FinishedJob(job_id, given, given.count(None) * self.ledger.chunk_bytes, 0.5, ["peer"]))

    def answer(self, message: link.Operated | link.KeysMade) -> None:
        self.answers.append(message)

    def take_finished(self) -> list[FinishedJob]:
        finished, self.finished = self.finished, []
        return finished

    def has_jobs(self) -> bool:
        return bool(self.fetches or self.finished)

    def drain(self) -> None:
        for job_id, keys in list(self.fetches.items()):
            self.finish(job_id, [MissReason.DRAINING] * len(keys))


def make_vllm_config(*, extra: dict[str, Any] | None = None, **changed: Any) -> Any:
    """What the connectors, ours and vLLM's, read of a `VllmConfig`. `extra`: our keys; `changed`: parallel sizes."""
    parallel = {
        "rank": 0,
        "world_size": 1,
        "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "prefill_context_parallel_size": 1,
        "decode_context_parallel_size": 1,
        "data_parallel_size": 1,
        "data_parallel_index": 0,
        "data_parallel_rank_local": None,
        "distributed_executor_backend": "uni",
        "nnodes_within_dp": 1,
    }
    return SimpleNamespace(
        kv_transfer_config=SimpleNamespace(
            kv_connector="KVMeshConnector",
            kv_connector_extra_config=DIRECTORY | (extra or {}),
            engine_id=f"test-{uuid.uuid4().hex}",
            is_kv_producer=True,
            is_kv_consumer=True,
            kv_role="kv_both",
        ),
        parallel_config=SimpleNamespace(**(parallel | changed)),
        model_config=SimpleNamespace(
            model="tiny",
            revision=None,
            dtype=torch.float32,
            seed=0,
            max_model_len=4096,
            use_mla=False,
            hf_config=SimpleNamespace(to_json_string=lambda: "{}"),
            get_total_num_kv_heads=lambda: 2,
        ),
        cache_config=SimpleNamespace(
            cache_dtype="auto",
            kv_cache_layout="LBHNC",
            prefix_caching_hash_algo="sha256",
            block_size=BLOCK_TOKENS,
            prefix_match_unit=None,
            enable_prefix_caching=True,
        ),
        load_config=SimpleNamespace(load_format="dummy"),
        attention_config=SimpleNamespace(hisparse_config=None),
        kv_events_config=None,
        use_v2_model_runner=False,
    )


def make_kv_cache_config(*, block_tokens: Sequence[int] = (BLOCK_TOKENS,), blocks: int = 8) -> KVCacheConfig:
    """Full-attention groups of one layer each."""
    groups = [
        KVCacheGroupSpec(
            layer_names=[f"layer.{index}"],
            kv_cache_spec=FullAttentionSpec(block_size=tokens, num_kv_heads=2, head_size=8, dtype=torch.float32),
        )
        for index, tokens in enumerate(block_tokens)
    ]
    return KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=groups)


def make_offloading_config(
    *,
    extra: dict[str, Any] | None = None,
    page_bytes: int = 1024,
    tp_size: int = 1,
    canonical_layout: bool = False,
    agnostic: bool = False,
    rank: int = 0,
) -> OffloadingConfig:
    """One group of two layers, chunks of four blocks, as vLLM derives it from its configuration and ours."""
    return OffloadingConfig(
        groups=(OffloadingGroupConfig(tokens_per_block=BLOCK_TOKENS, layer_names=("a", "b"), group_id=0),),
        worker_kv_bytes_per_block=page_bytes,
        enable_kv_cache_events=False,
        extra_config={} if extra is None else extra,
        engine_id=f"test-{uuid.uuid4().hex}",
        model=OffloadingModelConfig(name="tiny", dtype="float32"),
        cache=OffloadingCacheConfig(tokens_per_hash=BLOCK_TOKENS, blocks_per_chunk=CHUNK_TOKENS // BLOCK_TOKENS),
        parallel=OffloadingParallelConfig(
            rank=rank,
            world_size=tp_size,
            tp_size=tp_size,
            pp_size=1,
            pcp_size=1,
            dcp_size=1,
            data_parallel_index=0,
            data_parallel_size=1,
            data_parallel_rank_local=None,
            is_parallelism_agnostic=agnostic,
        ),
        canonical_layout=canonical_layout,
        kv_cache_layout="LBHNC",
    )


def configured_extra(**keys: Any) -> dict[str, Any]:
    """The extra configuration as our connector leaves it for vLLM; `keys` are ours."""
    vllm_config = make_vllm_config(extra={"chunk_tokens": CHUNK_TOKENS, **keys})
    configure(vllm_config)
    extra: dict[str, Any] = vllm_config.kv_transfer_config.kv_connector_extra_config
    extra[FACTS_KEY] = dict(FACTS)
    return extra


@contextlib.contextmanager
def shared_pool(slots: int, chunk_bytes: int) -> Iterator[memoryview]:
    """A pool as vLLM hands it to its tiers: a view of (slots, bytes) over shared memory."""
    fd = os.memfd_create("kvmesh-test-pool", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, slots * chunk_bytes)
        mapped = mmap.mmap(fd, slots * chunk_bytes)
        view = memoryview(mapped).cast("B", shape=[slots, chunk_bytes])
        try:
            yield view
        finally:
            view.release()
            mapped.close()
    finally:
        os.close(fd)


def clear_configuration(monkeypatch: Any) -> None:
    """No file and no variable of the machine decides a test."""
    for name in [name for name in os.environ if name.startswith(("KVMESH_", "LMCACHE_"))]:
        monkeypatch.delenv(name)
