"""What a node can tell of a recent request: where its chunks were found, and why the others were not.

These records are the node's answers to the controller (`kvmesh.wire.control`) and, as JSON, what the node's admin port
and the controller's HTTP API show; `docs/explain.md` describes them for people. Their field names are the API: add
freely, rename never. Text comes from `kvmesh.core.advice`.

Chunks are numbered from 0 in prefix order. For models with several KV cache groups they are those of the first group;
what another group misses is told as a cause all the same.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from kvmesh.core.reasons import MissReason

MAX_ID = 256
MAX_RECENT = 200
"""Requests in one list."""
MAX_MATCHES = 10
"""Explanations in one answer."""
MAX_SPANS = 64
MAX_CAUSES = 8
MAX_PEERS = 8
MAX_HOURS = 24.0

Id = Annotated[str, Meta(max_length=MAX_ID)]
Text = Annotated[str, Meta(max_length=4096)]
Count = Annotated[int, Meta(ge=0, le=2**53 - 1)]
Seconds = Annotated[float, Meta(ge=0, le=1e9)]
Number = Annotated[float, Meta(ge=-1e18, le=1e18)]
"""Finite: JSON has no other."""
Detail = Annotated[dict[Id, Text | Number], Meta(max_length=16)]
Where = Literal["device", "own_pool", "peer", "nowhere"]


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """Chunks by the place where they were found."""

    device: Count = 0
    """In the engine's own prefix cache, on the device."""
    own_pool: Count = 0
    """In this instance's host pool."""
    peer: Count = 0
    """Fetched from another instance for this request."""
    nowhere: Count = 0
    """Computed."""


class Span(msgspec.Struct, frozen=True, kw_only=True):
    """Consecutive chunks with the same fate."""

    first_chunk: Count
    chunks: Count
    where: Where
    instance_id: Id = ""
    """Whom they came from, or who was asked or held them; empty where nobody else took part."""
    reason: MissReason | None = None
    """Why not; only with `nowhere`."""


class FieldPair(msgspec.Struct, frozen=True, kw_only=True):
    """One property of both sides that matters for a cause."""

    field: Id
    ours: Text
    theirs: Text


class Cause(msgspec.Struct, frozen=True, kw_only=True):
    """Why some chunks were not found, and what to do."""

    reason: MissReason
    chunks: Count
    """Chunks that this cause cost; 0 for a cause that is only possible."""
    first_chunk: Count = 0
    instance_id: Id = ""
    """The other instance that it is about; empty when there is none."""
    text: Text
    change: Text
    """What to change; says so when nothing needs to."""
    detail: Detail = {}
    """Numbers and names behind the text, such as the gate's `fetch_s` and `prefill_s`."""
    fields: Annotated[list[FieldPair], Meta(max_length=32)] = []
    """The two instances' relevant properties, side by side."""


class PeerSide(msgspec.Struct, frozen=True, kw_only=True):
    """Another instance that took part, as this node knows it."""

    instance_id: Id
    incarnation: Id = ""
    address: Id = ""
    version: Id = ""
    transport: Id = ""
    breaker: Literal["closed", "open", ""] = ""
    """open: it failed and is left alone for a moment. Empty: it is no peer now."""
    bytes_under_way: Count = 0
    corrupt_chunks: Count = 0
    same_format: bool = True


class FetchPart(msgspec.Struct, frozen=True, kw_only=True):
    """One fetch made for the request."""

    holders: Annotated[list[Id], Meta(max_length=64)]
    transport: Id
    chunks_asked: Count
    chunks_fetched: Count
    fetched_bytes: Count
    seconds: Seconds
    misses: dict[Id, Count] = {}


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """All about one request on one instance."""

    request_id: Id
    """The engine's own name of the request. It contains the client's: see `matches`."""
    instance_id: Id
    incarnation: Id
    age_s: Seconds
    """Since the engine knew what it would load, before this answer."""
    wait_s: Seconds
    """How long the request waited for that: its time in the engine's queue, and its fetches."""
    prompt_tokens: Count
    chunk_tokens: Count
    chunks: Count
    """Whole chunks of the prompt: only these can be shared."""
    tail_tokens: Count
    """Tokens behind the last whole chunk; always computed."""
    found: Found
    summary: Text
    """One sentence."""
    spans: Annotated[list[Span], Meta(max_length=MAX_SPANS)]
    causes: Annotated[list[Cause], Meta(max_length=MAX_CAUSES)]
    """Why not the rest: the one that decided first."""
    possible: Annotated[list[Cause], Meta(max_length=MAX_CAUSES)] = []
    """What may be behind them, where this node cannot know."""
    fetches: Annotated[list[FetchPart], Meta(max_length=16)] = []
    peers: Annotated[list[PeerSide], Meta(max_length=MAX_PEERS)] = []
    separated_by: Annotated[list[Id], Meta(max_length=8)] = []
    """What keeps the request's chunks apart from those of the same tokens: `cache_salt`, `lora`, `multimodal`."""
    ended_early: bool = False
    """The request ended before the engine knew what it would load."""
    first_missed_key: Id = ""
    """In hexadecimal; GET /api/v1/lookup takes it."""


class RecentRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the list of recent requests."""

    request_id: Id
    instance_id: Id
    age_s: Seconds
    prompt_tokens: Count
    chunks: Count
    found: Found
    reason: MissReason | None
    """The first cause; None when nothing was missed."""
    summary: Text


class MissShare(msgspec.Struct, frozen=True, kw_only=True):
    """What one reason cost."""

    reason: MissReason
    chunks: Count
    requests: Count
    """Requests for which it was the first cause."""


class MissSummary(msgspec.Struct, frozen=True, kw_only=True):
    """Why one instance missed, over a time that ends now."""

    instance_id: Id
    seconds: Seconds
    """The time asked for, or since the node's start when that is shorter."""
    requests: Count
    chunks: Count
    """Whole chunks of all prompts."""
    found: Found
    misses: Annotated[list[MissShare], Meta(max_length=64)]
    """The most costly first."""
    lost_records: Count = 0
    """Requests of which the engine could not tell, since the node's start."""


def matches(asked: str, request_id: str) -> int:
    """How well `asked` names the request: 0 not at all, more is better.

    An engine wraps the client's id: X-Request-Id `abc` becomes `cmpl-abc` in the response and `cmpl-abc-0-1f2e3d4c` in
    the engine. So an exact name is best, then a prefix, then a suffix, then what stands between two dashes.
    """
    if not asked:
        return 0
    if asked == request_id:
        return 4
    if request_id.startswith(asked):
        return 3 if request_id[len(asked)] == "-" else 1
    if request_id.endswith(asked):
        return 2 if request_id[-len(asked) - 1] == "-" else 1
    return 2 if f"-{asked}-" in request_id else 0
