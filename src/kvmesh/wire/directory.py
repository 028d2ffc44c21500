"""Messages between nodes and the directory (the controller). This docstring is the protocol's specification.

Encoding: msgpack of the structs below, as arrays, tagged by their class name; one message per ZMQ frame. A receiver
decodes with the union type of its direction, so that an unknown tag, a wrong type or a length over the limits is
refused as a whole: it costs the sender one logged error and nothing else.

Sockets (all on the controller)

    reply      ROUTER   nodes connect a DEALER. Requests up, answers and the fan-out down.
    heartbeat  ROUTER   the same protocol on a second port, for heartbeats kept apart from bulk (optional)
    pull       PULL     nodes connect a PUSH. Their inventory events, ordered: Changes, Snapshot, FetchReport,
                        UseReport.

Life of a node

    node                                   controller
     |-- Register(member) ------------------>|  refused when another live incarnation has the id
     |<------------- Registered(members) ----|  everybody else who is a member now
     |== Snapshot(own chunks) ==============>|  (pull socket) parts: first..last
     |<-------------- Snapshot(of others) ---|  one per member with the node's format
     |== Changes(seq n+1, n+2, ...) ========>|  added and removed keys, batched
     |<-------------- Changes(of others) ----|  forwarded as they came: sequence numbers are the publisher's own
     |-- Heartbeat ------------------------->|
     |<-------------------- HeartbeatAck ----|  known=False: the controller was restarted; register again
     |<------- MemberUp / MemberDown --------|  newcomers that come together: MembersUp
     |<------------------ Ask(question) -----|  any time: see `kvmesh.wire.control`
     |-- Answer(reply) --------------------->|
     |-- Leave ----------------------------->|

Sequence numbers. Each publisher numbers its Changes 1, 2, 3 ... A Snapshot with number n is its inventory after Changes
n. A receiver that holds state n applies n+1, ignores n and older, and on anything newer has a gap: it asks for a
Snapshot (SnapshotRequest up, Resync down) and ignores the publisher's Changes until it has come. An incarnation is 16
random hexadecimal digits made at the start of a node; a new incarnation of an id drops all entries of the old one at
once. After Registered, and whenever it is asked, a node sends its Snapshot, also when it is empty; the controller
forwards no Changes of a publisher before a Snapshot of it.

Registering again. A node registers again, with the same incarnation, when an answer says known=False and when its
connection to the controller was made anew (notices may have been lost with the old one). Registered is always the whole
truth: instances that it does not list are gone, and Snapshots of those with the node's format follow. A node may get it
at any time. Only when controller_incarnation is new may a node keep what it knows of instances not listed for
instance_timeout_s more: they are about to register as well. A node may repeat a Register for which no answer has come;
over the same connection it gets none for it while the first answer may still be under way.

Asking. A node that registers with `asks` gets no Changes and no Snapshots, only who is a member; it sends a Query with
all keys of a request, and gets one Holders. Nothing else is different: it publishes as everybody does.

Flow. Registered carries a registration number, Heartbeat returns it together with the bytes of all notices received
since, so that the controller knows what is still under way. A node that is too far behind gets no Changes and Snapshots
until it has caught up, then a fresh Snapshot of each publisher that it missed something of; notices that never arrive
are noticed, and the node is told to register again. Nothing is kept in memory for a slow or stopped node beyond the
socket's own limit.

Connections. A node's DEALER sets no routing id, so that each connection has an identity of its own. Frames of more than
MAX_REQUEST_BYTES (reply, heartbeat) or MAX_EVENT_BYTES (pull) close the connection they came on.

The directory is a hint: the holder decides. Nothing here can cause wrong bytes, only a fetch that misses.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from kvmesh.core.format import Format

PROTOCOL_VERSION = 3
MAX_KEYS_PER_MESSAGE = 20_000
"""A larger inventory is sent in parts. 20,000 keys are under 1 MB, so nobody's event loop stops for long."""
MAX_BATCH_CHANGES = 5_000

MAX_QUERY_KEYS = 4096
"""Keys of one Query: a prefix of a million tokens in chunks of 256."""
MAX_HOLDERS = 16
"""Holders of one chunk that an answer names."""

Name = Annotated[str, Meta(min_length=1, max_length=256)]
Incarnation = Annotated[str, Meta(pattern="^[0-9a-f]{16}", max_length=16)]
AskId = Incarnation
Key = Annotated[bytes, Meta(min_length=8, max_length=40)]
Keys = Annotated[list[Key], Meta(max_length=MAX_KEYS_PER_MESSAGE)]
MAX_REQUEST_BYTES = 256 * 1024
"""Longest frame up the reply and heartbeat sockets. A Register is about 1 kB."""
MAX_EVENT_BYTES = 4 * 1024 * 1024
"""Longest frame up the pull socket: Changes with MAX_KEYS_PER_MESSAGE keys added and as many removed are 1.7 MB."""
MAX_SAMPLE_BYTES = 8 * 20_000
_MAX_COUNT = 2**53 - 1
"""Counters stay exact in JSON and JavaScript."""

Sequence = Annotated[int, Meta(ge=0, le=_MAX_COUNT)]
Port = Annotated[int, Meta(ge=0, le=65535)]
Seconds = Annotated[float, Meta(ge=0, le=1e9)]
"""Finite: infinity cannot be said in JSON."""
Count = Annotated[int, Meta(ge=0, le=_MAX_COUNT)]


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Base of everything on the directory's sockets."""


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """An instance as the directory knows it. Identity is (instance_id, incarnation), never an address."""

    instance_id: Name
    incarnation: Incarnation
    peer_host: Name
    peer_port: Port
    admin_port: Port
    """0: no admin port."""
    transports: Annotated[tuple[Name, ...], Meta(max_length=8)]
    format: Format
    slots: Count
    version: Name

    @property
    def peer_address(self) -> str:
        return f"{self.peer_host}:{self.peer_port}"


class NodeStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """A node's counters since its start, sent with every heartbeat."""

    published_chunks: Count = 0
    """Chunks published now."""
    replica_chunks: Count = 0
    """Chunks of others that the replica knows now."""
    fetched_chunks: Count = 0
    fetched_bytes: Count = 0
    fetch_seconds: Seconds = 0.0
    fetches: Count = 0
    served_chunks: Count = 0
    served_bytes: Count = 0
    misses: Annotated[dict[Name, Count], Meta(max_length=64)] = {}
    """Chunks asked for and not fetched, by reason."""
    prefill_tokens_per_s: Seconds = 0.0
    """How fast the engine prefills, as measured; 0 while that is unknown."""
    sharing: Name = "on"
    """`kvmesh.wire.operations.Sharing`."""
    pinned_chunks: Count = 0
    active_fetches: Count = 0
    """Fetch jobs that run now."""
    active_serves: Count = 0
    """Connections of other nodes that are open now."""


# -- node to controller ------------------------------------------------------------------------------------------------


class Register(Message, frozen=True):
    member: Member
    protocol: int = PROTOCOL_VERSION
    asks: bool = False
    """Send no Changes and Snapshots: this node asks who holds a chunk when it needs one (Query)."""


class Heartbeat(Message, frozen=True):
    instance_id: Name
    incarnation: Incarnation
    sequence: Sequence
    """Number of the last Changes sent, so that a lost last batch is noticed on a quiet cluster."""
    statistics: NodeStatistics
    registration: Count = 0
    """Number from the last Registered; 0 from a node that does not count."""
    received_bytes: Count = 0
    """Frame bytes of all notices since that Registered: without it, without HeartbeatAck and Refused."""


class SnapshotRequest(Message, frozen=True):
    """Ask for another instance's inventory, after a gap."""

    instance_id: Name
    incarnation: Incarnation


class Query(Message, frozen=True):
    """Who holds these chunks?"""

    instance_id: Name
    incarnation: Incarnation
    number: Count
    """Repeated in the answer."""
    keys: Annotated[list[Key], Meta(max_length=MAX_QUERY_KEYS)]


class Leave(Message, frozen=True):
    instance_id: Name
    incarnation: Incarnation


class FetchReport(Message, frozen=True, kw_only=True):
    """One finished fetch, for the page and the API; lost reports cost nothing."""

    instance_id: Name
    incarnation: Incarnation
    request_id: Annotated[str, Meta(max_length=256)]
    holders: Annotated[tuple[Name, ...], Meta(max_length=64)]
    transport: Name
    chunks_asked: Count
    chunks_fetched: Count
    fetched_bytes: Count
    seconds: Seconds
    misses: Annotated[dict[Name, Count], Meta(max_length=64)]
    corrupt: Annotated[dict[Name, Count], Meta(max_length=64)] = {}
    """Chunks whose bytes did not have their checksum, by the instance that delivered them."""


class UseReport(Message, frozen=True, kw_only=True):
    """How an instance's lookups went since its node's start, and a sample of the chunks that it was asked for
    (`kvmesh.core.sketch`). Sent after a Registered, with the whole sample, and then with heartbeats when there is news.
    """

    instance_id: Name
    incarnation: Incarnation
    requests: Count
    chunks: Count
    """Whole chunks of prompts. The next three are parts of them."""
    device_chunks: Count
    own_chunks: Count
    peer_chunks: Count
    new_alone: Annotated[float, Meta(ge=0, le=1e18)]
    """Estimate of the chunks that this instance had not been asked for before."""
    threshold: Annotated[int, Meta(ge=0, le=2**63 - 1)]
    """The highest hash that is in the sample."""
    hashes: Annotated[bytes, Meta(max_length=MAX_SAMPLE_BYTES)]
    """Hashes of keys that have come into the sample since the last report, eight bytes each, little-endian."""


class AskError(msgspec.Struct, frozen=True):
    """Why a node does not answer a question (`kvmesh.wire.control.ControlError`)."""

    code: Name
    text: Annotated[str, Meta(max_length=4096)]


class Answer(Message, frozen=True):
    """The answer to one Ask; see `kvmesh.wire.control`."""

    instance_id: Name
    incarnation: Incarnation
    ask_id: AskId
    reply: Annotated[bytes, Meta(max_length=MAX_REQUEST_BYTES)]
    """Empty with an error."""
    error: AskError | None = None


# -- both ways ---------------------------------------------------------------------------------------------------------


class Changes(Message, frozen=True):
    """One batch of a publisher's inventory changes. Removals are applied before additions."""

    instance_id: Name
    incarnation: Incarnation
    sequence: Sequence
    added: Keys
    removed: Keys


class Batch(Message, frozen=True):
    """Changes of several publishers, each as it came, in the order in which they came. Down only. When much happens the
    controller gathers Changes for a moment, because a frame costs more than what is in it. A receiver applies one after
    the other; it may find its own among them, which it ignores.
    """

    changes: Annotated[list[Changes], Meta(max_length=MAX_BATCH_CHANGES)]


class Snapshot(Message, frozen=True):
    """A part of a publisher's whole inventory. `first` starts over, `last` ends it and sets the sequence number."""

    instance_id: Name
    incarnation: Incarnation
    sequence: Sequence
    keys: Keys
    first: bool
    last: bool


# -- controller to node ------------------------------------------------------------------------------------------------


class Registered(Message, frozen=True):
    controller_incarnation: Incarnation
    heartbeat_interval_s: Seconds
    instance_timeout_s: Seconds
    members: Annotated[list[Member], Meta(max_length=100_000)]
    registration: Count = 0
    """To be returned in every Heartbeat."""


class Refused(Message, frozen=True):
    """The registration was not accepted. The node logs `text`, which names the other party, and tries again later."""

    code: Name
    """`duplicate_instance`, `protocol_version`, `connection_in_use`, `too_many_instances`."""
    text: Annotated[str, Meta(max_length=4096)]


class HeartbeatAck(Message, frozen=True):
    controller_incarnation: Incarnation
    known: bool


class Holders(Message, frozen=True):
    """The answer to a Query."""

    number: Count
    instances: Annotated[list[tuple[Name, Incarnation]], Meta(max_length=20_000)]
    """Everybody who holds one of the chunks."""
    holders: Annotated[list[Annotated[list[Count], Meta(max_length=64)]], Meta(max_length=MAX_QUERY_KEYS)]
    """For each key in order, who holds it: places in `instances`."""


class MemberUp(Message, frozen=True):
    member: Member


class MembersUp(Message, frozen=True):
    """Several MemberUp in one frame, as when many join at once. A receiver ignores itself among them."""

    members: Annotated[list[Member], Meta(max_length=100_000)]


class MemberDown(Message, frozen=True):
    instance_id: Name
    incarnation: Incarnation
    reason: Name
    """`left`, `timeout`, `replaced`."""


class Resync(Message, frozen=True):
    """The controller lost track of this node's events and asks for a Snapshot."""

    instance_id: Name
    incarnation: Incarnation


class Ask(Message, frozen=True):
    """A question to this very node; see `kvmesh.wire.control`. Not counted in Heartbeat.received_bytes."""

    instance_id: Name
    incarnation: Incarnation
    ask_id: AskId
    question: Annotated[bytes, Meta(max_length=2**20)]
    timeout_s: Seconds


Request = Register | Heartbeat | SnapshotRequest | Query | Leave | Answer
"""Up the reply and heartbeat sockets."""
Event = Changes | Snapshot | FetchReport | UseReport
"""Up the pull socket."""
Notice = (
    Registered
    | Refused
    | HeartbeatAck
    | MemberUp
    | MembersUp
    | MemberDown
    | Resync
    | Changes
    | Batch
    | Snapshot
    | Ask
    | Holders
)
"""Down the reply and heartbeat sockets."""

_encoder = msgspec.msgpack.Encoder()
request_decoder = msgspec.msgpack.Decoder(Request)
event_decoder = msgspec.msgpack.Decoder(Event)
notice_decoder = msgspec.msgpack.Decoder(Notice)


def encode(message: Message) -> bytes:
    """One message as the bytes of one frame."""
    return _encoder.encode(message)
