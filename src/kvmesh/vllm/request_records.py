"""What the engine tells its node of one request, so that misses can be explained.

Made on the scheduler thread, once per request: a handful of attribute reads, one copy of the list of keys, and a hash
of the first chunk's tokens. Everything that takes longer is the node's.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

from kvmesh.core.gate import GateDecision
from kvmesh.core.reasons import MissReason
from kvmesh.vllm.compat import OffloadKey
from kvmesh.wire import link

MAX_NAME = 64
HASH_BYTES = 16


@dataclass
class RequestState:
    """What the tier remembers of one request; kept in vLLM's request context."""

    positions: Mapping[OffloadKey, int] = field(default_factory=dict)
    """vLLM's own record of the request's keys, in prefix order within a group."""
    counted: set[OffloadKey] = field(default_factory=set)
    """Keys whose lookup was counted: vLLM asks again at every step while it waits."""
    missed: dict[OffloadKey, MissReason] = field(default_factory=dict)
    """Those of them that were no hit the last time."""
    failed: set[OffloadKey] = field(default_factory=set)
    """Chunks that could not be fetched for this request. They stay misses for it, so it is never fetched in circles."""
    details: dict[MissReason, dict[str, str | float]] = field(default_factory=dict)
    """Numbers behind an answer's reason, where there are some."""
    asked_at_s: float = -math.inf
    """When the directory was last asked for this request's chunks (`index_mode: query`)."""
    worthwhile: bool | None = None
    """Whether the peers hold enough of the prompt (`min_retrieve_tokens`); None before the first lookup."""
    gate: GateDecision | None = None
    """Whether fetching pays, and how much of it; None before the first chunk that a peer holds."""
    until_token: float = math.inf
    """Chunks that end behind it are computed, says the gate."""
    start_token: int = 0
    """Where the part begins that peers hold."""
    made_at_s: float = 0.0
    """When vLLM told of the request."""
    facts: RequestFacts | None = None
    told: bool = False


class RequestFacts(NamedTuple):
    """What only the connector sees of a request."""

    prompt_tokens: int
    separated_by: tuple[str, ...]

    @classmethod
    def of(cls, request: Any) -> RequestFacts:
        """From vLLM's `Request`."""
        marks = []
        if request.cache_salt:
            marks.append("cache_salt")
        if request.lora_request is not None:
            marks.append(f"lora:{request.lora_request.lora_name}"[:MAX_NAME])
        if request.mm_features:
            marks.append("multimodal")
        return cls(request.num_prompt_tokens, tuple(marks))


def hash_tokens(tokens: Sequence[int] | None, chunk_tokens: int) -> bytes:
    """Names the first chunk's text without its context; empty for a prompt without tokens or below one chunk."""
    if tokens is None or len(tokens) < chunk_tokens:
        return b""
    return hashlib.blake2b(array("I", islice(tokens, chunk_tokens)), digest_size=HASH_BYTES).digest()


def make_record(
    request_id: str,
    state: RequestState,
    facts: RequestFacts,
    *,
    chunk_tokens: int,
    device_tokens: int = 0,
    loaded_tokens: int = 0,
    tokens_hash: bytes = b"",
    wait_s: float = 0.0,
    ended_early: bool = False,
) -> link.RequestRecord:
    """The record of one request. Token counts are those that vLLM settled on."""
    keys = list[bytes](islice(state.positions, link.MAX_RECORD_KEYS))
    first_missed = (device_tokens + loaded_tokens) // chunk_tokens
    misses = []
    if first_missed < min(len(keys), facts.prompt_tokens // chunk_tokens):
        key = OffloadKey(keys[first_missed])
        if key in state.counted:
            # We said it could be had and it was never fetched: vLLM had no slot of the pool for it.
            misses.append(_miss(key, state.missed.get(key, MissReason.POOL_FULL), state))
        else:
            others = islice(state.missed.items(), link.MAX_RECORD_MISSES)
            misses += [_miss(key, reason, state) for key, reason in others]
    return link.RequestRecord(
        request_id=request_id[:256],
        prompt_tokens=facts.prompt_tokens,
        keys=keys,
        device_tokens=device_tokens,
        loaded_tokens=loaded_tokens,
        misses=misses,
        wait_s=wait_s,
        separated_by=list(facts.separated_by),
        tokens_hash=tokens_hash,
        ended_early=ended_early,
    )


def _miss(key: bytes, reason: MissReason, state: RequestState) -> link.Miss:
    return link.Miss(key, reason, state.details.get(reason, {}))
