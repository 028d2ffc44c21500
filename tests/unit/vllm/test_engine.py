"""The engine core around a tier: found while it is made, woken, and asked for its own block hashes."""

from __future__ import annotations

import queue

from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.engine import EngineCoreRequestType
from vllm.v1.kv_offload.base import make_offload_key
from vllm.v1.request import Request

from kvmesh.vllm.engine import Engine, engine_under_construction
from support.vllm_fakes import BLOCK_TOKENS, CHUNK_TOKENS, make_offloading_config


class EngineCoreProc:
    """As vLLM's: its queue is there before its scheduler is made, its hash function after that."""

    def __init__(self) -> None:
        self.input_queue: queue.Queue[object] = queue.Queue()
        self.found = self._make_scheduler()
        hash_function = get_hash_fn_by_name("sha256")
        init_none_hash(hash_function)
        self.request_block_hasher = get_request_block_hasher(BLOCK_TOKENS, hash_function)

    def _make_scheduler(self) -> Engine:
        return engine_under_construction()


class DPEngineCoreProc(EngineCoreProc):
    """One of several."""


def test_an_idle_engine_is_woken() -> None:
    for kind in (EngineCoreProc, DPEngineCoreProc):
        core = kind()
        assert core.found.can_be_woken
        core.found.wake()
        assert core.input_queue.get_nowait() == (EngineCoreRequestType.WAKEUP, None)


def test_without_an_engine_core_there_is_nothing_to_wake() -> None:
    engine = engine_under_construction()
    assert not engine.can_be_woken
    engine.wake()


def test_keys_are_those_of_a_request_with_the_same_prompt() -> None:
    """Salt included; a last chunk that is not full has no key."""
    core = EngineCoreProc()
    tokens = list(range(3 * CHUNK_TOKENS + 5))
    make_keys = core.found.key_maker(make_offloading_config())
    for salt in (None, "tenant-a"):
        request = Request(
            request_id="r",
            prompt_token_ids=tokens,
            sampling_params=SamplingParams(max_tokens=5),
            pooling_params=None,
            cache_salt=salt,
            block_hasher=core.request_block_hasher,
        )
        per_chunk = CHUNK_TOKENS // BLOCK_TOKENS
        last_blocks = [request.block_hashes[(index + 1) * per_chunk - 1] for index in range(3)]
        assert make_keys(tokens, salt) == [make_offload_key(block, 0) for block in last_blocks]
    assert make_keys(tokens, None) != make_keys(tokens, "tenant-a")
