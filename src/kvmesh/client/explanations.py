"""What the command line reads of explanations: why requests hit and missed."""

from __future__ import annotations

import msgspec

from kvmesh.client.answers import Difference


class Found(msgspec.Struct, frozen=True):
    """Chunks of a prompt by where they were found."""

    device: int = 0
    own_pool: int = 0
    peer: int = 0
    nowhere: int = 0


class Unanswered(msgspec.Struct, frozen=True):
    """An instance that could not be asked."""

    instance_id: str
    code: str = ""
    text: str = ""


class RecentRequest(msgspec.Struct, frozen=True):
    """One line of the list."""

    request_id: str
    instance_id: str
    age_s: float
    prompt_tokens: int
    chunks: int
    found: Found
    reason: str | None = None
    summary: str = ""


class RecentRequests(msgspec.Struct, frozen=True):
    """`GET /api/v1/explain`."""

    requests: list[RecentRequest]
    unanswered: list[Unanswered] = []


class Span(msgspec.Struct, frozen=True):
    """Consecutive chunks that were found in one place."""

    first_chunk: int
    chunks: int
    where: str
    instance_id: str = ""
    reason: str | None = None


class Cause(msgspec.Struct, frozen=True):
    """Why chunks were not found, and what would change it."""

    reason: str
    chunks: int = 0
    first_chunk: int | None = None
    instance_id: str = ""
    text: str = ""
    change: str = ""
    detail: dict[str, object] = {}
    fields: list[Difference] = []


class FetchOf(msgspec.Struct, frozen=True):
    """One fetch that the request made."""

    holders: list[str]
    transport: str
    chunks_asked: int
    chunks_fetched: int
    fetched_bytes: int
    seconds: float
    misses: dict[str, int] = {}


class Explanation(msgspec.Struct, frozen=True):
    """One request, chunk by chunk."""

    request_id: str
    instance_id: str
    age_s: float
    prompt_tokens: int
    chunk_tokens: int
    chunks: int
    found: Found
    summary: str = ""
    tail_tokens: int = 0
    wait_s: float | None = None
    spans: list[Span] = []
    causes: list[Cause] = []
    possible: list[Cause] = []
    """Nothing was missed for these, but something could be."""
    fetches: list[FetchOf] = []
    separated_by: list[str] = []


class Explanations(msgspec.Struct, frozen=True):
    """`GET /api/v1/explain/{request}`."""

    request: str
    explanations: list[Explanation]
    unanswered: list[Unanswered] = []


class MissesOf(msgspec.Struct, frozen=True):
    """Chunks missed for one reason."""

    reason: str
    chunks: int
    share: float | None = None
    """Of all missed chunks, 0 to 1."""
    requests: int = 0
    text: str = ""
    change: str = ""


class Summary(msgspec.Struct, frozen=True):
    """Why chunks were missed, over some time."""

    requests: int
    chunks: int
    found: Found
    instance_id: str = ""
    seconds: float = 0.0
    hit_rate: float | None = None
    misses: list[MissesOf] = []


class Summaries(msgspec.Struct, frozen=True):
    """`GET /api/v1/explain/summary`."""

    hours: float
    cluster: Summary
    instances: list[Summary] = []
    unanswered: list[Unanswered] = []
