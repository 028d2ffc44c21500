"""Messages between an engine and its node. This docstring is the protocol's specification.

A unix stream socket that the engine makes before it starts the node; frames (`wire.framing`) with one msgpack struct
each. The node inherits the descriptors of the ledger and the pool by number.

    engine                                node
     |-- Start ----------------------------->|  once; the node binds its ports, reads the ledger, joins the directory
     |<------------------ Ready | Failed ----|
     |-- Publish(slots) -------------------->|  bytes are complete and the ledger names the keys
     |-- Retract(slots) -------------------->|  the ledger's generations have moved already
     |-- Fetch(job) ------------------------>|
     |<------------------- FetchDone(job) ---|  exactly one per job; nothing writes into its slots any more
     |-- GiveUp ---------------------------->|  end all jobs at once (the pool is being reset)
     |-- RequestRecord --------------------->|  what became of a request's lookups; may be left out when much is waiting
     |<------------ Visible(keys) -----------|  the node's replica, as a set of keys that somebody else holds
     |<------------ Directory(state) --------|
     |-- Ask(keys) ------------------------->|  instead of Visible, when the node asks the directory for each request
     |<------------ Answered(held, missing) -|
     |<------------ Operate(id, command) ----|  an operator wants something done to the pool (`kvmesh.wire.operations`)
     |-- Operated(id, report) -------------->|  again and again, until the report's state is final
     |<------------ MakeKeys(tokens) --------|
     |-- KeysMade(keys) -------------------->|
     |<------------ Rates(peers) ------------|  how fast peers are, for the gate (`kvmesh.core.gate`); a Fetch says in
     |                                       |  turn what computing would take, and the node refuses what does not pay

Either side closing the socket ends the node. The engine treats a dead node as absent: every lookup is a miss, and the
jobs that were out have failed once the process is known to be dead.
"""

from __future__ import annotations

from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta

from kvmesh.core.format import Format
from kvmesh.core.gate import Verdict
from kvmesh.core.keys import KEY_MAX_BYTES, KEY_MIN_BYTES
from kvmesh.core.reasons import MissReason
from kvmesh.wire.explain import Detail
from kvmesh.wire.operations import AnyCommand, OperationId, Report, Sharing

MAX_FRAME_BYTES = 16 * 1024 * 1024
MAX_RATES = 32
Slots = list[Annotated[int, Meta(ge=0, lt=1 << 32)]]
Keys = list[Annotated[bytes, Meta(min_length=KEY_MIN_BYTES, max_length=KEY_MAX_BYTES)]]
Count = Annotated[int, Meta(ge=0)]
Port = Annotated[int, Meta(ge=0, le=65535)]
Seconds = Annotated[float, Meta(ge=0, le=1e9)]
"""Finite: a deadline that is no number would never pass."""


class Segment(NamedTuple):
    """A part of the pool, as in `kvmesh.transfer.pool.PoolSegment`: a descriptor number that the node has inherited."""

    fd: int
    offset_bytes: int
    length_bytes: int


class PeerRate(NamedTuple):
    """A fetch of so many bytes from this peer takes fixed_s + bytes * byte_s * (1 + pulls)."""

    instance_id: str
    fixed_s: Seconds
    byte_s: Seconds
    pulls: Count
    """Fetches from it under way."""


class SavedPrefill(NamedTuple):
    """`kvmesh.core.gate.Saved`: what computing the first k chunks of a fetch would take."""

    fixed_s: Seconds
    chunk_s: Seconds
    growth_s: Seconds


class GateReport(NamedTuple):
    """`kvmesh.core.gate.GateDecision`."""

    verdict: Verdict
    chunks: Count
    asked: Count
    fetch_s: Seconds | None
    prefill_s: Seconds | None


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Base of everything on the link."""


class Start(Message, frozen=True):
    config: bytes
    """The engine's resolved configuration (`KVMeshConfig.to_wire`)."""
    format: Format
    ledger_fd: int
    segments: tuple[Segment, ...]
    engine_pid: int
    peer_port: Port = 0
    """The port of the node before this one, 0 for the first: on the same address the directory knows its successor at
    once.
    """

    sharing: Sharing = Sharing.ON
    """What the node before this one had been told."""
    tokenizer: str = ""
    """Folder of the model's tokenizer, if it has one on this host."""


class Publish(Message, frozen=True):
    slots: Slots
    fetched: bool
    """The bytes were pulled from a peer by this node, which knows their checksum already."""


class Retract(Message, frozen=True):
    slots: Slots


class Fetch(Message, frozen=True):
    job_id: int
    request_id: str
    keys: Keys
    slots: Slots
    """As many as keys, each one once."""
    timeout_s: Seconds
    saved: SavedPrefill | None = None
    """None: not measured, or no gate; then everything is fetched."""


class Ask(Message, frozen=True):
    """Find out who holds these: only while the node asks instead of following (`Directory.asks`)."""

    keys: Keys


class GiveUp(Message, frozen=True):
    pass


class Operated(Message, frozen=True):
    operation_id: OperationId
    report: Report


class KeysMade(Message, frozen=True):
    """Answers MakeKeys; with `error` there are no keys."""

    number: Count
    keys: Keys
    error: str = ""


MAX_RECORD_KEYS = 16_384
MAX_RECORD_MISSES = 64


class Miss(NamedTuple):
    """What the engine answered for one chunk."""

    key: Annotated[bytes, Meta(min_length=KEY_MIN_BYTES, max_length=KEY_MAX_BYTES)]
    reason: MissReason
    detail: Detail = {}  # noqa: RUF012  (decoders make a new one)
    """Numbers behind the reason, such as the gate's `fetch_s` and `prefill_s`."""


class RequestRecord(Message, frozen=True, kw_only=True):
    """One request, told once: when the engine knows what it loads, or when the request ends before that."""

    request_id: Annotated[str, Meta(max_length=256)]
    prompt_tokens: Count
    keys: Annotated[Keys, Meta(max_length=MAX_RECORD_KEYS)]
    """The prompt's whole chunks in prefix order, one KV cache group after the other; the first ones of a longer list.
    """
    device_tokens: Count = 0
    """Found in the engine's own prefix cache, on the device."""
    loaded_tokens: Count = 0
    """Found in the pool after that, whatever was fetched included."""
    misses: Annotated[list[Miss], Meta(max_length=MAX_RECORD_MISSES)] = []
    """Chunks that were asked for and not found, in the order in which they were asked for."""
    wait_s: Seconds = 0.0
    """Between the request's arrival at the scheduler and this record: its time in the queue, and its fetches."""
    separated_by: Annotated[list[Annotated[str, Meta(max_length=64)]], Meta(max_length=8)] = []
    """Beside the tokens, what enters the keys: `cache_salt`, `lora`, `multimodal`."""
    tokens_hash: Annotated[bytes, Meta(max_length=16)] = b""
    """Of the tokens of the first chunk alone; empty when they are unknown. Equal with different keys: the same text in
    another context.
    """
    ended_early: bool = False
    lost_before: Count = 0
    """Records that were left out so far."""


class Ready(Message, frozen=True):
    instance_id: str
    incarnation: str
    peer_host: str
    peer_port: Port
    admin_port: Port


class Failed(Message, frozen=True):
    """The node cannot start; `text` is for the person who started the engine."""

    text: str


class FetchDone(Message, frozen=True):
    job_id: int
    reasons: list[MissReason | None]
    """One per key in order; None: the slot holds the chunk."""
    fetched_bytes: Count
    seconds: Seconds
    holders: list[str]
    """Instances that supplied chunks."""
    gate: GateReport | None = None
    """What the node's gate said; None when it had nothing to decide."""


class Visible(Message, frozen=True):
    appeared: Keys
    vanished: Keys
    reset: bool
    """Forget everything first."""


class Answered(Message, frozen=True):
    """The answer to an Ask. Keys of which the directory has not said anything are in neither list."""

    held: Keys
    missing: Keys


class Directory(Message, frozen=True):
    connected: bool
    """The directory answers now."""
    ever_connected: bool
    peers: Count
    """Other instances with our format."""
    sharing: Sharing = Sharing.ON
    asks: bool = False
    """The node asks who holds a chunk (Ask) instead of telling all keys (Visible)."""


class Operate(Message, frozen=True):
    operation_id: OperationId
    command: AnyCommand
    timeout_s: Seconds


class MakeKeys(Message, frozen=True):
    """Under which keys would the chunks of this prompt be published?"""

    number: Count
    tokens: Annotated[list[Annotated[int, Meta(ge=0, lt=1 << 32)]], Meta(max_length=2_000_000)]
    cache_salt: str | None


class Rates(Message, frozen=True):
    peers: Annotated[list[PeerRate], Meta(max_length=MAX_RATES)]
    """The fastest ones of those that hold chunks."""
    unmeasured: Count
    """Peers that hold chunks and have not been measured."""


ToNode = Start | Publish | Retract | Fetch | Ask | GiveUp | Operated | KeysMade | RequestRecord
ToEngine = Ready | Failed | FetchDone | Visible | Answered | Directory | Operate | MakeKeys | Rates

_encoder = msgspec.msgpack.Encoder()
to_node_decoder = msgspec.msgpack.Decoder(ToNode)
to_engine_decoder = msgspec.msgpack.Decoder(ToEngine)


def encode(message: Message) -> bytes:
    """One message as the payload of one frame."""
    return _encoder.encode(message)
