"""Messages between two nodes. This docstring is the protocol's specification.

One stream socket per conversation. The side that connects asks, the side that accepted answers, strictly in the order
of the requests; several may be under way (pipelining). Requests and answers are msgpack of the structs below, as
arrays, tagged by their class name, in frames (`wire.framing`) of at most FRAME_LIMIT_BYTES. Only chunks travel outside
frames.

Opening

    fetcher                               holder
     |-- Hello(wanted=(id, incarnation)) -->|   within the holder's handshake deadline
     |<---------------- Hello or Refused ---|

With a cluster key on both sides, two Proofs follow, fetcher first, and MACs from then on (`kvmesh.wire.auth`); with a
key on one side only, or another one, the connection ends here and nothing else is read: Refused("unauthenticated").

Each side checks the other's Hello: protocol version, identity, format. The holder always shows its own Hello, so that
both sides can name what differs, and then closes when it is not the `wanted` instance and incarnation (the address was
reused: the fetcher reports PEER_UNREACHABLE; who does not know yet who is there wants nobody in particular) or the
formats differ (both log the fields; FORMAT_MISMATCH). Refused means: not now (too many connections, draining).

Chunks (tcp)

     |-- Get(request, keys) --------------->|
     |<-- header | payload | trailer -------|   for each key, in order; header alone, status GONE, when it is not held

Header and trailer have a fixed size; the payload is the slot's bytes, `length` of them. The holder reads the slot's
generation before it sends the header and again after the last payload byte has left its memory, and puts the verdict
into the trailer: VALID with the checksum recorded for that generation, or STALE when the slot was reused meanwhile
(what arrived is thrown away).

Chunks (tcp, coded)

Each Hello names the codecs that its node knows (`kvmesh.transfer.codec`). A Get may name one that both do; then the
payload of every chunk in its answer is the chunk's blocks, coded one by one. `length` remains the slot's, and the
checksum is that of the chunk as the fetcher has it then: for a lossless codec, of the slot's bytes. In a format whose
chunks travel as int8 all Gets name that codec; a holder closes the connection of one that does not. Nodes that name no
codec are asked raw, and never see the field.

Chunks (nixl)

     |-- NixlAttach() --------------------->|   once per connection
     |<------------ NixlMetadata -----------|
     |-- Resolve(keys) -------------------->|
     |<--- Resolved([place or nil, ...]) ---|   address, length, generation, slot; and which agent they are of
     |   ... one-sided READs ...            |
     |-- Validate([(slot, generation)]) --->|   after the bytes have arrived
     |<--- Validated([checksum or empty]) --|   empty: STALE

Chunks (shm; on a unix socket only, see below)

    |-- ShmAttach() ---------------------->|   once per connection
    |<------------------ ShmAttached ------|   with it, as SCM_RIGHTS: the slot ledger, then one descriptor per segment
    |   ... reads, without the holder ...  |   generation before and after, checksum from the ledger
    |-- (end of the connection) -----------|   either side: the fetcher lets go of the holder's memory

A holder that offers shm listens on an abstract unix socket besides, whose name is made of its peer port and incarnation
(`kvmesh.transfer.shm_holder`). There both sides speak this same protocol, greeting and Proofs included, without TLS;
both look at the other's user id, which the kernel vouches for, and end the connection when it is not their own.

Handing over

     |-- Offer(keys, seconds) ------------->|   the holder of these is about to leave, and nobody else has them
     |<------------ Accepted or Refused ----|   Accepted: the other side's engine is going to fetch them, if it can

Questions

     |-- Ask(question) -------------------->|   of a controller that shows a directory in Redis: no node connects to it
     |<------------ Answered(reply) --------|   or with an error instead, as in `kvmesh.wire.control`

Besides: Lookup/Held (direct lookup, when no directory is reachable), Ping/Pong (is the peer's process alive?) and
Follow, after which the conversation is another one (`kvmesh.wire.follow`).

Anything else (unknown tag, wrong type, a count or length over its limit, an answer out of order) ends the connection:
whoever notices closes it with one logged reason and touches nothing else.

After the Proofs the `mac` fields of header and trailer, and 16 more bytes at the end of every frame, hold the MAC.
Without a cluster key the fields are zero (a receiver refuses others) and frames have no MAC.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum
from typing import Annotated, NamedTuple, TypeVar

import msgspec
from msgspec import Meta

from kvmesh.core.format import FieldDifference, Format, differences
from kvmesh.core.keys import KEY_MAX_BYTES, KEY_MIN_BYTES
from kvmesh.core.ledger import CHECKSUM_BYTES
from kvmesh.wire.auth import MAC_BYTES, PROOF_BYTES, Kind, MacChain
from kvmesh.wire.control import MAX_TIMEOUT_S
from kvmesh.wire.directory import MAX_REQUEST_BYTES, AskError, Member

PROTOCOL_VERSION = 1
FRAME_LIMIT_BYTES = 1 << 20
HELLO_LIMIT_BYTES = 1 << 16
"""A stranger may make the other side read this much before it is known."""
MAX_KEYS = 4096
"""Keys of one request: a prefix of a million tokens in chunks of 256. Longer ones are asked in parts."""
MAX_CHUNK_BYTES = 1 << 32
MAX_SEGMENTS = 128
"""Files of one pool. The kernel passes at most 253 descriptors at a time."""

Name = Annotated[str, Meta(min_length=1, max_length=256)]
Incarnation = Annotated[str, Meta(pattern="^[0-9a-f]{16}", max_length=16)]
Key = Annotated[bytes, Meta(min_length=KEY_MIN_BYTES, max_length=KEY_MAX_BYTES)]
Keys = Annotated[list[Key], Meta(min_length=1, max_length=MAX_KEYS)]
Word = Annotated[int, Meta(ge=0)]
"""Addresses, generations and the like. msgpack holds at most 64 bits."""
RequestNumber = Annotated[int, Meta(ge=0, lt=1 << 32)]


class MessageError(ValueError):
    """The other side sent what this protocol does not allow; the connection must be closed."""


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Base of everything that travels in a frame."""


# -- both ways ---------------------------------------------------------------------------------------------------------


class Hello(Message, frozen=True, kw_only=True):
    """Who is speaking. The first frame in each direction."""

    protocol: int = PROTOCOL_VERSION
    instance_id: Name
    incarnation: Incarnation
    format_id: Annotated[str, Meta(pattern="^[0-9a-f]{32}", max_length=32)]
    format: Format
    transports: Annotated[tuple[Name, ...], Meta(max_length=8)]
    """What this node serves: `tcp`, `shm`, `nixl`."""
    pid: Word = 0
    """For the logs, and for transports between processes of one host."""
    wanted_instance_id: Annotated[str, Meta(max_length=256)] = ""
    """Who the connecting side expects here; empty in the answer."""
    wanted_incarnation: Annotated[str, Meta(max_length=16)] = ""
    challenge: Annotated[bytes, Meta(max_length=64)] = b""
    """Empty without a cluster key."""
    codecs: Annotated[tuple[Name, ...], Meta(max_length=8)] = ()
    """Wire codecs that this node knows. Nodes that do not know the field read past it."""

    @classmethod
    def of(
        cls,
        instance_id: str,
        incarnation: str,
        kv_format: Format,
        *,
        transports: Sequence[str] = ("tcp",),
        pid: int = 0,
        codecs: Sequence[str] = (),
    ) -> Hello:
        """A node's own Hello, made once at its start."""
        return cls(
            instance_id=instance_id,
            incarnation=incarnation,
            format_id=kv_format.format_id(),
            format=kv_format,
            transports=tuple(transports),
            pid=pid,
            codecs=tuple(codecs),
        )

    def wanting(self, instance_id: str, incarnation: str) -> Hello:
        """This Hello as the connecting side sends it to one peer."""
        return msgspec.structs.replace(self, wanted_instance_id=instance_id, wanted_incarnation=incarnation)


class Proof(Message, frozen=True):
    """The sender has the cluster key: the second frame in each direction, where there is one."""

    proof: Annotated[bytes, Meta(min_length=PROOF_BYTES, max_length=PROOF_BYTES)]


# -- fetcher to holder -------------------------------------------------------------------------------------------------


class Get(Message, frozen=True):
    request: RequestNumber
    """Repeated in every header and trailer of the answer."""
    keys: Keys
    codec: Annotated[str, Meta(max_length=64)] = ""
    """One of the holder's Hello, for all chunks of the answer; empty for raw ones."""


class Lookup(Message, frozen=True):
    keys: Keys


class Follow(Message, frozen=True):
    """Tell me from now on what you hold: `kvmesh.wire.follow`. The last request of a conversation."""

    member: Member | None = None
    """The follower, so that it can be followed in turn."""


class Ping(Message, frozen=True):
    nonce: Word


class NixlAttach(Message, frozen=True):
    """Ask for what is needed to read this node's slots with NIXL."""


class ShmAttach(Message, frozen=True):
    """Ask for the descriptors of this node's pool and ledger. Only on a unix socket."""


class Resolve(Message, frozen=True):
    keys: Keys


class Offer(Message, frozen=True):
    """Take these chunks over: fetch them into your own pool, in this order."""

    keys: Keys
    seconds: Annotated[float, Meta(gt=0, le=3600)]
    """So long they can be fetched."""


class Ask(Message, frozen=True):
    """A question of `kvmesh.wire.control`."""

    question: Annotated[bytes, Meta(max_length=FRAME_LIMIT_BYTES)]
    timeout_s: Annotated[float, Meta(gt=0, le=MAX_TIMEOUT_S)]


class SlotGeneration(msgspec.Struct, frozen=True, array_like=True):
    slot: Word
    generation: Word


class Validate(Message, frozen=True):
    slots: Annotated[list[SlotGeneration], Meta(min_length=1, max_length=MAX_KEYS)]


# -- holder to fetcher -------------------------------------------------------------------------------------------------


class Refused(Message, frozen=True):
    code: Name
    """`full`, `unsupported`, `unauthenticated`."""
    text: Annotated[str, Meta(max_length=1024)]


class Held(Message, frozen=True):
    bitmap: Annotated[bytes, Meta(max_length=MAX_KEYS // 8)]
    """One bit per key asked for, in order, lowest bit first."""


class Pong(Message, frozen=True):
    nonce: Word


class Accepted(Message, frozen=True):
    """The chunks of an Offer will be fetched; the directory says when they are held."""


class Answered(Message, frozen=True):
    """The answer to an Ask."""

    reply: Annotated[bytes, Meta(max_length=MAX_REQUEST_BYTES)]
    """Empty with an error."""
    error: AskError | None = None


class NixlMetadata(Message, frozen=True):
    metadata: Annotated[bytes, Meta(min_length=1, max_length=1 << 18)]
    serving: Word
    """Changes when the holder's agent is replaced; connections that know an older one must attach again."""
    probe_address: Word
    """A readable address, for the small READ that sets the connection up."""
    probe_bytes: Annotated[int, Meta(ge=1, le=4096)]


class ShmSegment(msgspec.Struct, frozen=True, array_like=True):
    """A run of whole slots in the file of one descriptor."""

    offset: Word
    length: Annotated[int, Meta(ge=1)]


class ShmAttached(Message, frozen=True):
    segments: Annotated[list[ShmSegment], Meta(min_length=1, max_length=MAX_SEGMENTS)]
    """In the order of the slots; as many as descriptors came with it, less the first, which is the ledger's."""


class Place(msgspec.Struct, frozen=True, array_like=True):
    """Where a chunk lies in the holder's memory."""

    address: Word
    length: Annotated[int, Meta(ge=1, le=MAX_CHUNK_BYTES)]
    generation: Word
    slot: Word


class Resolved(Message, frozen=True):
    serving: Word
    """The agent (see NixlMetadata) whose addresses these are."""
    places: Annotated[list[Place | None], Meta(max_length=MAX_KEYS)]


class Validated(Message, frozen=True):
    checksums: Annotated[list[Annotated[bytes, Meta(max_length=CHECKSUM_BYTES)]], Meta(max_length=MAX_KEYS)]
    """16 bytes: VALID. Empty: STALE."""


Request = Get | Lookup | Follow | Ping | NixlAttach | Resolve | Validate | ShmAttach | Offer | Ask
Answer = Refused | Held | Pong | NixlMetadata | Resolved | Validated | ShmAttached | Accepted | Answered
Greeting = Hello | Refused
Proven = Proof | Refused
UNAUTHENTICATED = "unauthenticated"
"""Code of a Refused."""

_encoder = msgspec.msgpack.Encoder()
_hello_decoder = msgspec.msgpack.Decoder(Hello)
_greeting_decoder: msgspec.msgpack.Decoder[Greeting] = msgspec.msgpack.Decoder(Greeting)
_proof_decoder = msgspec.msgpack.Decoder(Proof)
_proven_decoder: msgspec.msgpack.Decoder[Proven] = msgspec.msgpack.Decoder(Proven)
_request_decoder: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_answer_decoder: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)

_T = TypeVar("_T")


def encode(message: Message) -> bytes:
    """One message as the payload of one frame."""
    return _encoder.encode(message)


def decode_hello(payload: bytes) -> Hello:
    """The first frame that a holder gets. Raises MessageError."""
    return _decode(_hello_decoder, payload)


def decode_greeting(payload: bytes) -> Greeting:
    """The first frame that a fetcher gets. Raises MessageError."""
    return _decode(_greeting_decoder, payload)


def decode_proof(payload: bytes) -> Proof:
    """The second frame that a holder with a cluster key gets. Raises MessageError."""
    return _decode(_proof_decoder, payload)


def decode_proven(payload: bytes) -> Proven:
    """The second frame that a fetcher with a cluster key gets. Raises MessageError."""
    return _decode(_proven_decoder, payload)


def decode_request(payload: bytes) -> Request:
    """Any later frame that a holder gets. Raises MessageError."""
    return _decode(_request_decoder, payload)


def decode_answer(payload: bytes) -> Answer:
    """Any later frame that a fetcher gets. Raises MessageError."""
    return _decode(_answer_decoder, payload)


def _decode(decoder: msgspec.msgpack.Decoder[_T], payload: bytes) -> _T:
    try:
        return decoder.decode(payload)
    except (msgspec.MsgspecError, RecursionError, ValueError) as error:  # ValueError: bytes that are not UTF-8
        raise MessageError(f"not a message of this protocol: {error}") from None


def format_differences(ours: Hello, theirs: Hello) -> list[FieldDifference]:
    """The differing fields of two nodes' formats; empty when they may exchange chunks."""
    if ours.format_id == theirs.format_id:
        return []
    found = differences(ours.format, theirs.format)
    return found or [FieldDifference("format_id", ours.format_id, theirs.format_id)]


# -- bitmaps -----------------------------------------------------------------------------------------------------------


def pack_bits(bits: Sequence[bool]) -> bytes:
    """`bits` as a bitmap, lowest bit of the first byte first."""
    digits = "".join("1" if bit else "0" for bit in reversed(bits))
    return int(digits or "0", 2).to_bytes((len(bits) + 7) // 8, "little")


def unpack_bits(bitmap: bytes, count: int) -> list[bool]:
    """The first `count` bits. Raises MessageError when the bitmap is not of exactly that size."""
    if len(bitmap) != (count + 7) // 8:
        raise MessageError(f"bitmap of {len(bitmap)} bytes for {count} keys")
    value = int.from_bytes(bitmap, "little")
    return [bool(value >> index & 1) for index in range(count)]


# -- chunks ------------------------------------------------------------------------------------------------------------

# Both have 64 bytes: payloads begin at whole cache lines of the stream, and the kernel copies them a little cheaper.
_NO_MAC = bytes(MAC_BYTES)
_HEADER = struct.Struct(f"<4sBxHIQ28x{MAC_BYTES}s")  # magic, status, position, request, length, mac
_TRAILER = struct.Struct(f"<4sBxHI{CHECKSUM_BYTES}s20x{MAC_BYTES}s")  # magic, verdict, position, request, checksum, mac
_HEADER_MAGIC, _TRAILER_MAGIC = b"kvmC", b"kvmT"
HEADER_BYTES = _HEADER.size
TRAILER_BYTES = _TRAILER.size


class ChunkStatus(IntEnum):
    HELD = 1
    """The payload and a trailer follow."""
    GONE = 2
    """The key is not held here (any more). Nothing follows."""


class Verdict(IntEnum):
    VALID = 1
    STALE = 2


class ChunkHeader(NamedTuple):
    status: ChunkStatus
    request: int
    position: int
    """Position of the key in the Get."""
    length: int
    """Payload bytes; 0 when GONE."""


class ChunkTrailer(NamedTuple):
    verdict: Verdict
    request: int
    position: int
    checksum: bytes
    """Zero when STALE."""


NO_CHECKSUM = bytes(CHECKSUM_BYTES)


def pack_header(header: ChunkHeader, macs: MacChain | None = None) -> bytes:
    """HEADER_BYTES bytes, with the next MAC of `macs` where there is authentication."""
    packed = _HEADER.pack(_HEADER_MAGIC, header.status, header.position, header.request, header.length, _NO_MAC)
    return _with_mac(packed, Kind.HEADER, macs)


def parse_header(buffer: bytes | bytearray | memoryview, macs: MacChain | None = None) -> ChunkHeader:
    """The header in the first HEADER_BYTES of `buffer`. Raises MessageError, or AuthenticationError for a wrong MAC."""
    _check_mac(memoryview(buffer)[:HEADER_BYTES], Kind.HEADER, macs)
    magic, status, position, request, length, _ = _HEADER.unpack_from(buffer)
    if magic != _HEADER_MAGIC or status not in {1, 2} or length > MAX_CHUNK_BYTES:
        raise MessageError("not a chunk header")
    return ChunkHeader(ChunkStatus(status), request, position, length)


def pack_trailer(trailer: ChunkTrailer, macs: MacChain | None = None) -> bytes:
    """TRAILER_BYTES bytes, with the next MAC of `macs` where there is authentication."""
    packed = _TRAILER.pack(
        _TRAILER_MAGIC, trailer.verdict, trailer.position, trailer.request, trailer.checksum, _NO_MAC
    )
    return _with_mac(packed, Kind.TRAILER, macs)


def parse_trailer(buffer: bytes | bytearray | memoryview, macs: MacChain | None = None) -> ChunkTrailer:
    """The trailer in the first TRAILER_BYTES of `buffer`. Raises as `parse_header`."""
    _check_mac(memoryview(buffer)[:TRAILER_BYTES], Kind.TRAILER, macs)
    magic, verdict, position, request, checksum, _ = _TRAILER.unpack_from(buffer)
    if magic != _TRAILER_MAGIC or verdict not in {1, 2}:
        raise MessageError("not a chunk trailer")
    return ChunkTrailer(Verdict(verdict), request, position, checksum)


def _with_mac(packed: bytes, kind: Kind, macs: MacChain | None) -> bytes:
    if macs is None:
        return packed
    body = packed[:-MAC_BYTES]
    return body + macs.mac(kind, body)


def _check_mac(packed: memoryview, kind: Kind, macs: MacChain | None) -> None:
    if macs is not None:
        macs.check(kind, packed[:-MAC_BYTES], packed[-MAC_BYTES:])
    elif packed[-MAC_BYTES:] != _NO_MAC:
        raise MessageError(f"a {kind.name.lower()} with a MAC where there is no cluster key")
