"""The engine that a tier lives in, found while it is being made: for waking it up, and for its own hash function.

vLLM gives connectors no way to reach the engine core, which is right for nearly everything. Two things need it: an idle
engine blocks on its input queue, so what an operator wants done would wait for the next request; and only the engine
knows how it hashes blocks (algorithm, seed, block size, speculative look-ahead).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from queue import Queue
from types import FrameType
from typing import Any

from kvmesh.vllm.compat import EngineCoreRequestType, OffloadingConfig, Request, SamplingParams, make_offload_key

_ENGINE_CLASS = "EngineCoreProc"


class Engine:
    """The engine core of this process; also of a process that has none to be woken (offline inference)."""

    def __init__(self, core: Any) -> None:
        """`core` is None when there is none."""
        self._core = core

    @property
    def can_be_woken(self) -> bool:
        return self._core is not None

    def wake(self) -> None:
        """Make an idle engine look whether it has something to do. Any thread; costs a busy one nothing."""
        if self._core is not None:
            self._core.input_queue.put_nowait((EngineCoreRequestType.WAKEUP, None))

    def key_maker(self, config: OffloadingConfig) -> Callable[[list[int], str | None], list[bytes]]:
        """A function from a prompt's tokens and cache salt to the keys of its chunks, of group after group."""

        def make_keys(tokens: list[int], cache_salt: str | None) -> list[bytes]:
            hasher = getattr(self._core, "request_block_hasher", None)
            if hasher is None:
                raise RuntimeError("this engine hashes no blocks: prefix caching is off, or it serves one process only")
            request = Request(
                request_id="kvmesh-lookup",
                prompt_token_ids=tokens,
                sampling_params=SamplingParams(max_tokens=1),
                pooling_params=None,
                cache_salt=cache_salt or None,
                block_hasher=hasher,
            )
            keys: list[bytes] = []
            for group in config.groups:
                hashes = group.tokens_per_block * config.cache.blocks_per_chunk // config.cache.tokens_per_hash
                keys += [
                    make_offload_key(block, group.group_id) for block in request.block_hashes[hashes - 1 :: hashes]
                ]
            return keys

        return make_keys


def engine_under_construction() -> Engine:
    """The engine core whose constructor is calling us, somewhere up the stack."""
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001 - the one place where it can be met
    while frame is not None:
        owner = frame.f_locals.get("self")
        is_core = any(base.__name__ == _ENGINE_CLASS for base in type(owner).__mro__)
        if is_core and isinstance(getattr(owner, "input_queue", None), Queue):
            return Engine(owner)
        frame = frame.f_back
    return Engine(None)
