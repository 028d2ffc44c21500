"""The records that the registry keeps of its members. Plain state, no decisions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from kvmesh.controller.downstream import Downstream
from kvmesh.controller.rates import RateMeter
from kvmesh.core.format import FieldDifference, Format
from kvmesh.core.replica import Replica
from kvmesh.wire.directory import Member, NodeStatistics, Notice

SocketName = Literal["reply", "heartbeat", "redis"]
"""`redis`: none; the instance is known from Redis and not connected to us."""
State = Literal["up", "suspect"]
DownReason = Literal["left", "timeout", "replaced"]


class Peer(NamedTuple):
    """Where requests come from and answers go: one of our sockets, and ZMQ's routing id of one connection to it."""

    socket: SocketName
    routing_id: bytes

    @classmethod
    def of_redis(cls, instance_id: str) -> Peer:
        """What stands for the connection of an instance that is known from Redis, and has none to us."""
        return cls("redis", instance_id.encode())

    @property
    def is_connected(self) -> bool:
        return self.socket != "redis"


class Send(NamedTuple):
    """One frame for one or many. `message` is what the frame says."""

    to: tuple[Peer, ...]
    message: Notice
    frame: bytes


def address(notice: Notice, frame: bytes, receivers: Sequence[Instance]) -> Send:
    """One frame to these, counted as under way to each."""
    size_bytes = len(frame)
    for instance in receivers:
        instance.downstream.sent_bytes += size_bytes
    return Send(tuple(instance.peer for instance in receivers), notice, frame)


@dataclass(slots=True, eq=False)
class FormatGroup:
    """The members of one format and what they hold. Groups never meet in a lookup."""

    format: Format
    format_id: str
    replica: Replica = field(default_factory=Replica)
    members: dict[str, Instance] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Instance:
    """One member. Times are the registry's clock, in seconds."""

    member: Member
    group: FormatGroup
    peer: Peer
    downstream: Downstream
    registered_at_s: float
    last_contact_s: float
    resynced_at_s: float
    """When a Snapshot was last asked for; registering asks for one too."""
    statistics: NodeStatistics = field(default_factory=NodeStatistics)
    upload_part_at_s: float | None = None
    """When the last part of a Snapshot from this member came, while more are due."""
    behind_at: int | None = None
    behind_since_s: float | None = None
    """Since when a heartbeat's sequence number has been ahead of `behind_at`, ours."""
    asks: bool = False
    """It asks who holds a chunk, and is told no inventories."""
    corrupt_chunks: int = 0
    """Chunks that others report to have got from this member with wrong bytes."""
    rates: RateMeter = field(default_factory=RateMeter)

    @property
    def instance_id(self) -> str:
        return self.member.instance_id

    @property
    def incarnation(self) -> str:
        return self.member.incarnation


class Departed(NamedTuple):
    """A member that is gone, for people to see."""

    member: Member
    reason: DownReason
    at_s: float


class Incompatibility(NamedTuple):
    """Two members whose KV is not interchangeable."""

    ours: str
    theirs: str
    same_model: bool
    """Both name the same model, so somebody expects them to share: worth a warning."""
    differences: tuple[FieldDifference, ...]


@dataclass(slots=True)
class Counters:
    """What the registry has seen since its start."""

    registrations: int = 0
    repeated: int = 0
    """Registers that came again while the answer was under way."""
    refused: int = 0
    timeouts: int = 0
    resyncs: int = 0
    strangers: int = 0
    """Messages of instances that are no members: normal for a moment after a restart."""
    stale: int = 0
    """Changes and snapshots that were old or did not continue the sequence."""
    lost: int = 0
    """Members told to register again because notices did not reach them."""
    snapshots_sent: int = 0
    """Whole inventories sent, one per publisher and receiver."""
    held_back: int = 0
    """Changes not sent to a slow member, which gets a snapshot instead."""
