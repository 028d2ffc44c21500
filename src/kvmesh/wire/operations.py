"""What can be done to one instance's pool, and how it went: the words of operations.

A Command goes controller -> node (inside a question, `kvmesh.wire.control`) -> engine (`kvmesh.wire.link`), where the
thread that owns the pool carries it out between two steps. A Report comes back the same way, again and again until its
state is final. Commands are identified by the operation's id; the same id twice is the same command.
"""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import msgspec
from msgspec import Meta

from kvmesh.wire.directory import Count, Keys, Name, Seconds

MAX_HOT = 6000
"""Keys in one Report: 228 kB."""

OperationId = Annotated[str, Meta(pattern="^[0-9a-f]{16}", max_length=16)]


class RunState(str, Enum):
    """Where a command is. The last three are final."""

    PENDING = "pending"
    """Handed over; the engine has not got to it."""
    RUNNING = "running"
    DONE = "done"
    """Every chunk is as asked for."""
    PARTLY = "partly"
    FAILED = "failed"
    """No chunk is, or the command could not be carried out."""

    @property
    def is_final(self) -> bool:
        return self in (RunState.DONE, RunState.PARTLY, RunState.FAILED)


class Sharing(str, Enum):
    """What an instance takes part in."""

    ON = "on"
    DRAINING = "draining"
    """Publishes nothing new and fetches nothing; what it has published can still be fetched."""
    DRAINED = "drained"
    """Publishes nothing at all. It is still a member."""
    LEFT = "left"
    """As drained, and no member of the cluster any more until its engine starts anew."""


class Command(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Base of everything that an engine can be told to do with its pool."""


class ClearChunks(Command, frozen=True):
    """Retract chunks and give their slots back."""

    keys: Keys | None = None
    """None: all."""


class PinChunks(Command, frozen=True):
    """Keep chunks that are in the pool from being evicted, for a time. Pinning again sets the time anew."""

    keys: Keys
    seconds: Seconds


class UnpinChunks(Command, frozen=True):
    keys: Keys | None = None
    """None: all that are pinned."""


class WarmChunks(Command, frozen=True):
    """Fetch chunks from whoever holds them into the own pool, in the given order."""

    keys: Keys


class ListHot(Command, frozen=True):
    """Name the chunks of the pool that were used last, most recent first, heads of prefixes before their tails."""

    limit: Annotated[int, Meta(ge=1, le=MAX_HOT)]


AnyCommand = ClearChunks | PinChunks | UnpinChunks | WarmChunks | ListHot


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """How far a command is."""

    state: RunState
    chunks_done: Count = 0
    """As asked for by now."""
    chunks_total: Count = 0
    bytes_done: Count = 0
    outcomes: Annotated[dict[Name, Count], Meta(max_length=64)] = {}
    """Chunks by what became of them."""
    keys: Annotated[list[Annotated[bytes, Meta(min_length=8, max_length=40)]], Meta(max_length=MAX_HOT)] = []
    """Of ListHot."""
    pinned_chunks: Count = 0
    """Pinned in the whole pool now."""
    text: Annotated[str, Meta(max_length=4096)] = ""
    """For people: what it waits for, or why it failed."""
