"""What the command line reads out of the controller's answers (`docs/api.md`).

Fields that are not read are left out, and what a controller of another version may lack has a default: an operator's
command must be able to say "that version differs" instead of failing on it.
"""

from __future__ import annotations

import msgspec


class Health(msgspec.Struct, frozen=True):
    """`/healthz`."""

    status: str
    version: str = ""
    incarnation: str = ""
    uptime_s: float = 0.0
    instances: int = 0
    problems: list[str] = []


class Difference(msgspec.Struct, frozen=True):
    """One field in which two formats differ."""

    field: str
    ours: str
    theirs: str


class FormatOf(msgspec.Struct, frozen=True):
    """What an instance's KV bytes depend on."""

    format_id: str
    model_name: str
    fields: dict[str, str | int] = {}


class Statistics(msgspec.Struct, frozen=True):
    """An instance's own counters since its start."""

    published_chunks: int = 0
    replica_chunks: int = 0
    fetches: int = 0
    fetched_chunks: int = 0
    fetched_bytes: int = 0
    fetch_seconds: float = 0.0
    served_chunks: int = 0
    served_bytes: int = 0
    misses: dict[str, int] = {}


class InstanceRates(msgspec.Struct, frozen=True):
    """What an instance does now, by its last heartbeats."""

    fetched_bytes_per_s: float = 0.0
    served_bytes_per_s: float = 0.0
    fetches_per_s: float = 0.0


class Instance(msgspec.Struct, frozen=True):
    """One member."""

    instance_id: str
    incarnation: str
    state: str
    peer_address: str
    format: FormatOf
    admin_address: str | None = None
    version: str = ""
    transports: list[str] = []
    slots: int = 0
    chunks: int = 0
    pool_use: float | None = None
    inventory_known: bool = True
    last_contact_age_s: float = 0.0
    member_for_s: float = 0.0
    behind_bytes: int = 0
    corrupt_chunks: int = 0
    statistics: Statistics = msgspec.field(default_factory=Statistics)
    incompatible_count: int = 0
    sharing: str = "on"
    """on, draining or drained."""
    pinned_chunks: int = 0
    rates: InstanceRates | None = None


class Departed(msgspec.Struct, frozen=True):
    """An instance that was a member until a while ago."""

    instance_id: str
    incarnation: str
    peer_address: str
    reason: str
    age_s: float
    model_name: str = ""


class Instances(msgspec.Struct, frozen=True):
    """`/api/v1/instances`."""

    instances: list[Instance]
    departed: list[Departed] = []


class Incompatibility(msgspec.Struct, frozen=True):
    """Two members that cannot share."""

    instance_id: str
    other_instance_id: str
    same_model: bool
    fields: list[Difference]


class Refusal(msgspec.Struct, frozen=True):
    """Somebody who was turned away a short while ago."""

    who: str
    reason: str
    times: int
    age_s: float


class Totals(msgspec.Struct, frozen=True):
    """`/api/v1/totals`."""

    instances: int = 0
    formats: int = 0
    chunks: int = 0
    entries: int = 0
    slots: int = 0
    fetches: int = 0
    chunks_asked: int = 0
    chunks_fetched: int = 0
    fetched_bytes: int = 0
    fetch_seconds: float = 0.0
    misses: dict[str, int] = {}


class Fetch(msgspec.Struct, frozen=True):
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
    misses: dict[str, int] = {}


class HitRate(msgspec.Struct, frozen=True):
    """Shares of the chunks of all prompts, 0 to 1; None while there were none."""

    requests: int = 0
    chunks: int = 0
    device_chunks: int = 0
    own_chunks: int = 0
    peer_chunks: int = 0
    achieved: float | None = None
    achievable: float | None = None
    """What unlimited pools and perfect sharing would have given."""
    achievable_alone: float | None = None
    """What unlimited pools would have given without sharing."""


class HitRatesOf(msgspec.Struct, frozen=True):
    """Of an instance, or of the whole cluster."""

    recent: HitRate
    since_start: HitRate
    instance_id: str = ""


class HitRates(msgspec.Struct, frozen=True):
    """`/api/v1/hit-rates`."""

    window_s: float
    cluster: HitRatesOf
    instances: list[HitRatesOf] = []


class HeldChunk(msgspec.Struct, frozen=True):
    """One chunk of a lookup."""

    key: str
    holders: list[str]


class Prefix(msgspec.Struct, frozen=True):
    """How many leading chunks are held."""

    chunks: int
    tokens: int
    by_instance: dict[str, int] = {}


class LookupFormat(msgspec.Struct, frozen=True):
    """What one format's members hold."""

    format_id: str
    model_name: str
    chunk_tokens: int
    chunks: list[HeldChunk]
    longest_prefix: Prefix
    tokens: int | None = None
    """Tokens looked up; None where keys were given."""


class Lookup(msgspec.Struct, frozen=True):
    """`/api/v1/lookup`."""

    formats: list[LookupFormat]


class ApiErrorBody(msgspec.Struct, frozen=True):
    """What is wrong, and what to do about it."""

    code: str
    message: str
    hint: str = ""


class ApiErrorAnswer(msgspec.Struct, frozen=True):
    """Every answer of the API from 400 on."""

    error: ApiErrorBody
