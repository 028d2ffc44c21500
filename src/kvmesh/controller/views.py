"""What the HTTP API answers and the web page shows, as typed records made from the registry.

The field names are the API: add freely, rename never. Ages are seconds before the answer was made, so no clock is
shared.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice, takewhile

from pydantic import BaseModel, Field

from kvmesh import __version__
from kvmesh.controller.activity import FetchRecord
from kvmesh.controller.formats import incompatible_count, incompatible_with
from kvmesh.controller.instances import Departed, FormatGroup, Incompatibility, Instance
from kvmesh.controller.registry import Registry
from kvmesh.core.format import FieldDifference, Format
from kvmesh.core.keys import ChunkKey

MAX_INCOMPATIBLE_LISTED = 50
"""Of one instance. The first ones tell the story; the count is complete."""
FEW_INCOMPATIBLE_LISTED = 5
"""Of each instance in the list of all, and only those that serve the same model."""


class DifferenceView(BaseModel):
    """One field in which two formats differ."""

    field: str
    ours: str
    theirs: str


class IncompatibleView(BaseModel):
    """An instance that this one cannot share with, and why."""

    instance_id: str
    same_model: bool = Field(description="Both name the same model, so somebody expects them to share.")
    fields: list[DifferenceView]


class FormatView(BaseModel):
    """What an instance's KV bytes depend on, beside the tokens. Only equal formats share."""

    format_id: str = Field(description="Equal exactly when all fields are equal.")
    model_name: str
    fields: dict[str, str | int]


class StatisticsView(BaseModel):
    """The instance's own counters since its start, from its last heartbeat."""

    published_chunks: int
    replica_chunks: int
    fetches: int
    fetched_chunks: int
    fetched_bytes: int
    fetch_seconds: float
    served_chunks: int
    served_bytes: int
    misses: dict[str, int]


class RatesView(BaseModel):
    """Means over the last seconds."""

    fetched_bytes_per_s: float
    served_bytes_per_s: float
    fetches_per_s: float
    over_s: float


class LoadView(BaseModel):
    """What an instance's node does at the moment, from its last heartbeat."""

    active_fetches: int = Field(description="Fetches that run.")
    active_serves: int = Field(description="Connections of other nodes that are open.")


class InstanceView(BaseModel):
    """One member."""

    instance_id: str
    incarnation: str = Field(description="Random, new at each start of the instance.")
    state: str = Field(description="up, or suspect: silent for longer than a heartbeat should take.")
    peer_address: str
    admin_address: str | None
    version: str
    transports: list[str]
    format: FormatView
    slots: int = Field(description="Slots of the host pool; one holds one chunk.")
    chunks: int = Field(description="Chunks published, as this controller knows them.")
    pool_use: float | None = Field(description="chunks / slots, 0 to 1.")
    inventory_known: bool = Field(description="False until the instance's first inventory has come.")
    last_contact_age_s: float
    member_for_s: float
    behind_bytes: int = Field(description="Notices sent to the instance that it has not reported as received yet.")
    corrupt_chunks: int = Field(
        description="Chunks that others report to have got from this instance with wrong bytes: look at its memory."
    )
    sharing: str = Field(description="on, draining (fetches and publishes nothing new) or drained (holds nothing).")
    pinned_chunks: int = Field(description="Chunks that eviction passes by, as far as the instance has told.")
    rates: RatesView | None = Field(description="null until two heartbeats have come.")
    load: LoadView
    statistics: StatisticsView
    incompatible_count: int
    incompatible_with: list[IncompatibleView] = Field(
        description=f"At most {MAX_INCOMPATIBLE_LISTED}; in the list of all, {FEW_INCOMPATIBLE_LISTED} of one model."
    )


class DepartedView(BaseModel):
    """An instance that was a member until a while ago."""

    instance_id: str
    incarnation: str
    peer_address: str
    model_name: str
    reason: str = Field(description="left, timeout or replaced.")
    age_s: float


class InstancesView(BaseModel):
    """All members, and who has gone in the last minutes (newest first)."""

    instances: list[InstanceView]
    departed: list[DepartedView]


class IncompatibilityView(BaseModel):
    """Two members that cannot share."""

    instance_id: str
    other_instance_id: str
    same_model: bool
    fields: list[DifferenceView]


class ChunkView(BaseModel):
    """One chunk of a lookup."""

    key: str
    holders: list[str]


class PrefixView(BaseModel):
    """How many leading chunks are held. A prefix may be put together from several holders."""

    chunks: int
    tokens: int
    by_instance: dict[str, int] = Field(description="Leading chunks that one instance holds alone; zeros are left out.")


class LookupFormatView(BaseModel):
    """What one format's members hold of the keys."""

    format_id: str
    model_name: str
    chunk_tokens: int
    tokens: int | None = Field(default=None, description="Of the prompt that was looked up; null in lookups by keys.")
    chunks: list[ChunkView]
    longest_prefix: PrefixView


class LookupView(BaseModel):
    """The answer to a lookup, per format: chunks of different formats are never interchangeable."""

    formats: list[LookupFormatView]


class FetchView(BaseModel):
    """One finished fetch."""

    number: int
    age_s: float
    instance_id: str
    request_id: str
    holders: list[str]
    transport: str
    chunks_asked: int
    chunks_fetched: int
    fetched_bytes: int
    seconds: float
    bytes_per_second: float | None
    misses: dict[str, int]


class RefusalView(BaseModel):
    """Somebody who was turned away in the last minutes."""

    who: str = Field(description="Instance id, address, or both.")
    reason: str = Field(description="A wrong cluster key, an id that another live instance has, ...")
    times: int
    age_s: float = Field(description="Since the last time.")


class TotalsView(BaseModel):
    """Sums over the cluster. Fetch figures count since the controller's start."""

    instances: int
    formats: int
    chunks: int = Field(description="Different chunks that somebody holds.")
    entries: int = Field(description="Pairs of chunk and holder.")
    slots: int
    fetches: int
    chunks_asked: int
    chunks_fetched: int
    fetched_bytes: int
    fetch_seconds: float
    misses: dict[str, int]


class HealthView(BaseModel):
    """Whether the controller works."""

    status: str = Field(description="ok or unhealthy.")
    version: str = __version__
    incarnation: str
    uptime_s: float
    instances: int
    problems: list[str]
    directory_problem: str = Field(
        "",
        description="With --lookup-url: what is wrong with the Redis whose directory is shown; empty when all is well.",
    )


def format_view(kv_format: Format, format_id: str) -> FormatView:
    """All fields of a format."""
    values = {name: getattr(kv_format, name) for name in kv_format.__struct_fields__}
    return FormatView(format_id=format_id, model_name=kv_format.model_name, fields=values)


def instance_view(
    registry: Registry, instance: Instance, now_s: float, incompatible: Iterable[Incompatibility] | None = None
) -> InstanceView:
    """One member as it is at `now_s`. `incompatible` are those to list, if not the first of all."""
    listed = incompatible_with(instance, registry.groups) if incompatible is None else incompatible
    member, replica = instance.member, instance.group.replica
    chunks = len(replica.keys_of(instance.instance_id))
    statistics, rates = instance.statistics, instance.rates.rates()
    return InstanceView(
        instance_id=member.instance_id,
        incarnation=member.incarnation,
        state=registry.state(instance, now_s),
        peer_address=member.peer_address,
        admin_address=f"{member.peer_host}:{member.admin_port}" if member.admin_port else None,
        version=member.version,
        transports=list(member.transports),
        format=format_view(instance.group.format, instance.group.format_id),
        slots=member.slots,
        chunks=chunks,
        pool_use=min(1.0, chunks / member.slots) if member.slots else None,
        inventory_known=replica.sequence(instance.instance_id) is not None,
        last_contact_age_s=max(0.0, now_s - instance.last_contact_s),
        member_for_s=max(0.0, now_s - instance.registered_at_s),
        behind_bytes=instance.downstream.outstanding_bytes,
        corrupt_chunks=instance.corrupt_chunks,
        sharing=statistics.sharing,
        pinned_chunks=statistics.pinned_chunks,
        rates=None if rates is None else RatesView(**rates._asdict()),
        load=LoadView(active_fetches=statistics.active_fetches, active_serves=statistics.active_serves),
        statistics=StatisticsView(
            published_chunks=statistics.published_chunks,
            replica_chunks=statistics.replica_chunks,
            fetches=statistics.fetches,
            fetched_chunks=statistics.fetched_chunks,
            fetched_bytes=statistics.fetched_bytes,
            fetch_seconds=statistics.fetch_seconds,
            served_chunks=statistics.served_chunks,
            served_bytes=statistics.served_bytes,
            misses=dict(statistics.misses),
        ),
        incompatible_count=incompatible_count(instance, registry.groups),
        incompatible_with=[
            IncompatibleView(
                instance_id=pair.theirs, same_model=pair.same_model, fields=_difference_views(pair.differences)
            )
            for pair in islice(listed, MAX_INCOMPATIBLE_LISTED)
        ],
    )


def instances_view(registry: Registry, now_s: float) -> InstancesView:
    """All members by id, and who has gone."""
    members = [
        instance_view(registry, one, now_s, _few_incompatible(registry, one))
        for _, one in sorted(registry.instances.items())
    ]
    return InstancesView(
        instances=members, departed=[_departed_view(gone, now_s) for gone in reversed(registry.departed.values())]
    )


def _few_incompatible(registry: Registry, instance: Instance) -> list[Incompatibility]:
    pairs = takewhile(lambda pair: pair.same_model, incompatible_with(instance, registry.groups))
    return list(islice(pairs, FEW_INCOMPATIBLE_LISTED))


def incompatibility_views(pairs: Sequence[Incompatibility]) -> list[IncompatibilityView]:
    """Pairs in the order given."""
    return [
        IncompatibilityView(
            instance_id=pair.ours,
            other_instance_id=pair.theirs,
            same_model=pair.same_model,
            fields=_difference_views(pair.differences),
        )
        for pair in pairs
    ]


def lookup_view(groups: Sequence[FormatGroup], keys: Sequence[ChunkKey]) -> LookupView:
    """What each of these formats' members hold of the keys."""
    return LookupView(formats=[_lookup_format(group, keys) for group in groups])


def _lookup_format(group: FormatGroup, keys: Sequence[ChunkKey]) -> LookupFormatView:
    holders = [group.replica.holders(key) for key in keys]
    prefix = group.replica.longest_prefix(keys)
    alone: dict[str, int] = {}
    for length, names in enumerate(holders[:prefix], start=1):
        for name in names:
            if alone.get(name, 0) == length - 1:
                alone[name] = length
    return LookupFormatView(
        format_id=group.format_id,
        model_name=group.format.model_name,
        chunk_tokens=group.format.chunk_tokens,
        chunks=[ChunkView(key=key.hex(), holders=list(names)) for key, names in zip(keys, holders, strict=True)],
        longest_prefix=PrefixView(chunks=prefix, tokens=prefix * group.format.chunk_tokens, by_instance=alone),
    )


def fetch_view(record: FetchRecord, now_s: float) -> FetchView:
    """One fetch, seen from `now_s`."""
    report = record.report
    return FetchView(
        number=record.number,
        age_s=max(0.0, now_s - record.reported_at_s),
        instance_id=report.instance_id,
        request_id=report.request_id,
        holders=list(report.holders),
        transport=report.transport,
        chunks_asked=report.chunks_asked,
        chunks_fetched=report.chunks_fetched,
        fetched_bytes=report.fetched_bytes,
        seconds=report.seconds,
        bytes_per_second=report.fetched_bytes / report.seconds if report.seconds > 0 else None,
        misses=dict(report.misses),
    )


def refusal_views(registry: Registry, now_s: float) -> list[RefusalView]:
    """Who was turned away, newest first."""
    return [
        RefusalView(who=one.who, reason=one.reason, times=one.times, age_s=max(0.0, now_s - one.at_s))
        for one in registry.refusals.recent(now_s)
    ]


def totals_view(registry: Registry) -> TotalsView:
    """Sums over all formats."""
    replicas = [group.replica.statistics() for group in registry.groups.values()]
    sums = registry.activity.totals
    return TotalsView(
        instances=len(registry.instances),
        formats=len(registry.groups),
        chunks=sum(replica.keys for replica in replicas),
        entries=sum(replica.entries for replica in replicas),
        slots=sum(instance.member.slots for instance in registry.instances.values()),
        fetches=sums.fetches,
        chunks_asked=sums.chunks_asked,
        chunks_fetched=sums.chunks_fetched,
        fetched_bytes=sums.fetched_bytes,
        fetch_seconds=sums.fetch_seconds,
        misses=dict(registry.activity.misses),
    )


def _departed_view(gone: Departed, now_s: float) -> DepartedView:
    return DepartedView(
        instance_id=gone.member.instance_id,
        incarnation=gone.member.incarnation,
        peer_address=gone.member.peer_address,
        model_name=gone.member.format.model_name,
        reason=gone.reason,
        age_s=max(0.0, now_s - gone.at_s),
    )


def _difference_views(found: Sequence[FieldDifference]) -> list[DifferenceView]:
    return [DifferenceView(field=one.field, ours=one.ours, theirs=one.theirs) for one in found]
