"""What the HTTP API answers about requests and hit rates, as typed records. The field names are the API.

Those of single requests mirror `kvmesh.wire.explain`, which documents each field.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec
from pydantic import BaseModel, Field

from kvmesh.core.advice import advise
from kvmesh.core.reasons import MissReason
from kvmesh.core.usage import Usage, UsageLog
from kvmesh.wire import explain as told
from kvmesh.wire.control import ControlError


class UnansweredView(BaseModel):
    """An instance that could not be asked, and why."""

    instance_id: str
    code: str
    text: str


class FoundView(BaseModel):
    """Chunks by the place where they were found."""

    device: int = Field(description="In the engine's own prefix cache.")
    own_pool: int = Field(description="In the instance's own host pool.")
    peer: int = Field(description="Fetched from other instances.")
    nowhere: int = Field(description="Computed.")


class SpanView(BaseModel):
    """Consecutive chunks with the same fate."""

    first_chunk: int
    chunks: int
    where: str = Field(description="device, own_pool, peer or nowhere.")
    instance_id: str
    reason: str | None


class FieldPairView(BaseModel):
    """One property of both sides that matters for a cause."""

    field: str
    ours: str
    theirs: str


class CauseView(BaseModel):
    """Why some chunks were not found, and what to change."""

    reason: str
    chunks: int = Field(description="Chunks that this cost; 0 for a cause that is only possible.")
    first_chunk: int
    instance_id: str = Field(description="The other instance that it is about; empty when there is none.")
    text: str
    change: str
    detail: dict[str, str | float] = Field(description="Numbers behind the text, such as fetch_s and prefill_s.")
    fields: list[FieldPairView]


class PeerSideView(BaseModel):
    """Another instance that took part, as the explaining one knows it."""

    instance_id: str
    incarnation: str
    address: str
    version: str
    transport: str
    breaker: str = Field(description="closed, open, or empty for an instance that is no peer now.")
    bytes_under_way: int
    corrupt_chunks: int
    same_format: bool


class FetchPartView(BaseModel):
    """One fetch made for the request."""

    holders: list[str]
    transport: str
    chunks_asked: int
    chunks_fetched: int
    fetched_bytes: int
    seconds: float
    misses: dict[str, int]


class ExplanationView(BaseModel):
    """All about one request on one instance."""

    request_id: str
    instance_id: str
    incarnation: str
    age_s: float
    wait_s: float
    prompt_tokens: int
    chunk_tokens: int
    chunks: int = Field(description="Whole chunks of the prompt: only these can be shared.")
    tail_tokens: int
    found: FoundView
    summary: str
    spans: list[SpanView]
    causes: list[CauseView] = Field(description="Why not the rest; the one that decided first.")
    possible: list[CauseView]
    fetches: list[FetchPartView]
    peers: list[PeerSideView]
    separated_by: list[str]
    ended_early: bool
    first_missed_key: str


class ExplanationsView(BaseModel):
    """Requests that go by the name asked for, the best match first."""

    request: str
    explanations: list[ExplanationView]
    unanswered: list[UnansweredView]


class RecentRequestView(BaseModel):
    """One line of the list of recent requests."""

    request_id: str
    instance_id: str
    age_s: float
    prompt_tokens: int
    chunks: int
    found: FoundView
    reason: str | None
    summary: str


class RecentRequestsView(BaseModel):
    """Recent requests of all instances, newest first."""

    requests: list[RecentRequestView]
    unanswered: list[UnansweredView]


class MissShareView(BaseModel):
    """What one reason cost."""

    reason: str
    chunks: int
    requests: int = Field(description="Requests for which it was the first cause.")
    share: float | None = Field(description="Of the chunks that were missed, 0 to 1.")
    text: str
    change: str


class MissSummaryView(BaseModel):
    """Why one instance, or all of them, missed."""

    instance_id: str = Field(description="Empty for the cluster.")
    seconds: float
    requests: int
    chunks: int
    found: FoundView
    hit_rate: float | None
    misses: list[MissShareView]
    lost_records: int


class WhyMissedView(BaseModel):
    """Why we missed, over the last hours."""

    hours: float
    cluster: MissSummaryView
    instances: list[MissSummaryView]
    unanswered: list[UnansweredView]


class RatesView(BaseModel):
    """Hit rates over one time. Chunks are whole chunks of prompts."""

    requests: int
    chunks: int
    device_chunks: int
    own_chunks: int
    peer_chunks: int
    achieved: float | None = Field(description="(device + own + peer) / chunks.")
    achievable: float | None = Field(description="With unlimited pools and perfect sharing.")
    achievable_alone: float | None = Field(description="With unlimited pools and no sharing at all.")
    achievable_error: float | None = Field(description="Two standard errors of achievable.")


class InstanceRatesView(BaseModel):
    """One instance's hit rates."""

    instance_id: str
    recent: RatesView
    since_start: RatesView = Field(description="Since this controller has known the instance.")


class ClusterRatesView(BaseModel):
    """The cluster's hit rates."""

    recent: RatesView
    since_start: RatesView = Field(description="Since this controller's start.")


class HitRatesView(BaseModel):
    """What was found, beside what could have been."""

    window_s: float = Field(description="What recent means, to the minute.")
    cluster: ClusterRatesView
    instances: list[InstanceRatesView]


def unanswered_view(instance_id: str, error: ControlError) -> UnansweredView:
    """An instance that could not be asked."""
    return UnansweredView(instance_id=instance_id, code=error.code, text=error.text)


def explanation_view(one: told.Explanation) -> ExplanationView:
    """As the node tells it."""
    return ExplanationView.model_validate(msgspec.to_builtins(one))


def recent_view(one: told.RecentRequest) -> RecentRequestView:
    """As the node tells it."""
    return RecentRequestView.model_validate(msgspec.to_builtins(one))


def summary_view(one: told.MissSummary) -> MissSummaryView:
    """With shares and texts."""
    missed = sum(share.chunks for share in one.misses)
    return MissSummaryView(
        instance_id=one.instance_id,
        seconds=one.seconds,
        requests=one.requests,
        chunks=one.chunks,
        found=FoundView.model_validate(msgspec.to_builtins(one.found)),
        hit_rate=(one.chunks - one.found.nowhere) / one.chunks if one.chunks else None,
        misses=[_share_view(share, missed) for share in one.misses],
        lost_records=one.lost_records,
    )


def join_summaries(parts: Sequence[told.MissSummary]) -> told.MissSummary:
    """The sum over instances."""
    chunks: dict[MissReason, int] = {}
    requests: dict[MissReason, int] = {}
    for share in (share for part in parts for share in part.misses):
        chunks[share.reason] = chunks.get(share.reason, 0) + share.chunks
        requests[share.reason] = requests.get(share.reason, 0) + share.requests
    ordered = sorted(chunks, key=lambda reason: (-chunks[reason], -requests[reason], reason.value))
    return told.MissSummary(
        instance_id="",
        seconds=max((part.seconds for part in parts), default=0.0),
        requests=sum(part.requests for part in parts),
        chunks=sum(part.chunks for part in parts),
        found=told.Found(
            device=sum(part.found.device for part in parts),
            own_pool=sum(part.found.own_pool for part in parts),
            peer=sum(part.found.peer for part in parts),
            nowhere=sum(part.found.nowhere for part in parts),
        ),
        misses=[told.MissShare(reason=reason, chunks=chunks[reason], requests=requests[reason]) for reason in ordered],
        lost_records=sum(part.lost_records for part in parts),
    )


def rates_view(usage: Usage) -> RatesView:
    """Rates out of sums."""
    return RatesView(
        requests=usage.requests,
        chunks=usage.chunks,
        device_chunks=usage.device_chunks,
        own_chunks=usage.own_chunks,
        peer_chunks=usage.peer_chunks,
        achieved=usage.achieved,
        achievable=usage.achievable,
        achievable_alone=usage.achievable_alone,
        achievable_error=usage.achievable_error,
    )


def hit_rates_view(
    cluster: UsageLog, instances: Iterable[tuple[str, UsageLog]], window_s: float, now_s: float
) -> HitRatesView:
    """The cluster and its members, seen from `now_s`."""
    return HitRatesView(
        window_s=window_s,
        cluster=ClusterRatesView(
            recent=rates_view(cluster.over(window_s, now_s)), since_start=rates_view(cluster.total)
        ),
        instances=[
            InstanceRatesView(
                instance_id=instance_id,
                recent=rates_view(log.over(window_s, now_s)),
                since_start=rates_view(log.total),
            )
            for instance_id, log in instances
        ],
    )


def _share_view(share: told.MissShare, missed: int) -> MissShareView:
    advice = advise(share.reason)
    return MissShareView(
        reason=share.reason.value,
        chunks=share.chunks,
        requests=share.requests,
        share=share.chunks / missed if missed else None,
        text=advice.text,
        change=advice.change,
    )
