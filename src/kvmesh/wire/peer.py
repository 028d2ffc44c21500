"""Messages between two nodes. This docstring is the protocol's specification.

One stream socket per conversation. The side that connects asks, the side that accepted answers, strictly in the order
of the requests; several may be under way (pipelining). Requests and answers are msgpack of the structs below, as
arrays, tagged by their class name, in frames (`wire.framing`) of at most FRAME_LIMIT_BYTES. Only chunks travel outside
frames.

Opening

    fetcher                               holder
     |-- Hello(wanted=(id, incarnation)) -->|   within the holder's handshake deadline
     |<---------------- Hello or Refused ---|

Each side checks the other's Hello: protocol version, identity, format. The holder always shows its own Hello, so that
both sides can name what differs, and then closes when it is not the `wanted` instance and incarnation (the address was
reused: the fetcher reports PEER_UNREACHABLE) or the formats differ (both log the fields; FORMAT_MISMATCH). Refused
means: not now (too many connections, draining).

Chunks (tcp)

     |-- Get(request, keys) --------------->|
     |<-- header | payload | trailer -------|   for each key, in order; header alone, status GONE, when it is not held

Header and trailer have a fixed size; the payload is the slot's bytes, `length` of them. The holder reads the slot's
generation before it sends the header and again after the last payload byte has left its memory, and puts the verdict
into the trailer: VALID with the checksum recorded for that generation, or STALE when the slot was reused meanwhile
(what arrived is thrown away).

Chunks (nixl)

     |-- NixlAttach() --------------------->|   once per connection
     |<------------ NixlMetadata -----------|
     |-- Resolve(keys) -------------------->|
     |<--- Resolved([place or nil, ...]) ---|   address, length, generation, slot; and which agent they are of
     |   ... one-sided READs ...            |
     |-- Validate([(slot, generation)]) --->|   after the bytes have arrived
     |<--- Validated([checksum or empty]) --|   empty: STALE

Besides: Lookup/Held (direct lookup, when no directory is reachable) and Ping/Pong (is the peer's process alive?).

Anything else (unknown tag, wrong type, a count or length over its limit, an answer out of order) ends the connection:
whoever notices closes it with one logged reason and touches nothing else.

Room for authentication. Hello carries a `challenge`; with a cluster key the two proofs follow the two Hellos as further
frames. The `mac` fields of header and trailer, and 16 bytes at the end of every frame, hold the MAC then. Without a key
the fields are zero (a receiver refuses others) and frames have no MAC.
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

PROTOCOL_VERSION = 1
FRAME_LIMIT_BYTES = 1 << 20
HELLO_LIMIT_BYTES = 1 << 16
"""A stranger may make the other side read this much before it is known."""
MAX_KEYS = 4096
"""Keys of one request: a prefix of a million tokens in chunks of 256. Longer ones are asked in parts."""
MAX_CHUNK_BYTES = 1 << 32

Name = Annotated[str, Meta(min_length=1, max_length=256)]
Incarnation = Annotated[str, Meta(pattern="^[0-9a-f]{16}$")]
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
    format_id: Annotated[str, Meta(pattern="^[0-9a-f]{32}$")]
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

    @classmethod
    def of(
        cls,
        instance_id: str,
        incarnation: str,
        kv_format: Format,
        *,
        transports: Sequence[str] = ("tcp",),
        pid: int = 0,
    ) -> Hello:
        """A node's own Hello, made once at its start."""
        return cls(
            instance_id=instance_id,
            incarnation=incarnation,
            format_id=kv_format.format_id(),
            format=kv_format,
            transports=tuple(transports),
            pid=pid,
        )

    def wanting(self, instance_id: str, incarnation: str) -> Hello:
        """This Hello as the connecting side sends it to one peer."""
        return msgspec.structs.replace(self, wanted_instance_id=instance_id, wanted_incarnation=incarnation)


# -- fetcher to holder -------------------------------------------------------------------------------------------------


class Get(Message, frozen=True):
    request: RequestNumber
    """Repeated in every header and trailer of the answer."""
    keys: Keys


class Lookup(Message, frozen=True):
    keys: Keys


class Ping(Message, frozen=True):
    nonce: Word


class NixlAttach(Message, frozen=True):
    """Ask for what is needed to read this node's slots with NIXL."""


class Resolve(Message, frozen=True):
    keys: Keys


class SlotGeneration(msgspec.Struct, frozen=True, array_like=True):
    slot: Word
    generation: Word


class Validate(Message, frozen=True):
    slots: Annotated[list[SlotGeneration], Meta(min_length=1, max_length=MAX_KEYS)]


# -- holder to fetcher -------------------------------------------------------------------------------------------------


class Refused(Message, frozen=True):
    code: Name
    """`full`, `unsupported`."""
    text: Annotated[str, Meta(max_length=1024)]


class Held(Message, frozen=True):
    bitmap: Annotated[bytes, Meta(max_length=MAX_KEYS // 8)]
    """One bit per key asked for, in order, lowest bit first."""


class Pong(Message, frozen=True):
    nonce: Word


class NixlMetadata(Message, frozen=True):
    metadata: Annotated[bytes, Meta(min_length=1, max_length=1 << 18)]
    serving: Word
    """Changes when the holder's agent is replaced; connections that know an older one must attach again."""
    probe_address: Word
    """A readable address, for the small READ that sets the connection up."""
    probe_bytes: Annotated[int, Meta(ge=1, le=4096)]


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


Request = Get | Lookup | Ping | NixlAttach | Resolve | Validate
Answer = Refused | Held | Pong | NixlMetadata | Resolved | Validated
Greeting = Hello | Refused

_encoder = msgspec.msgpack.Encoder()
_hello_decoder = msgspec.msgpack.Decoder(Hello)
_greeting_decoder: msgspec.msgpack.Decoder[Greeting] = msgspec.msgpack.Decoder(Greeting)
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

_MAC_BYTES = 16
_NO_MAC = bytes(_MAC_BYTES)
_HEADER = struct.Struct(f"<4sBxHIQ{_MAC_BYTES}s")  # magic, status, position, request, length, mac
_TRAILER = struct.Struct(f"<4sBxHI{CHECKSUM_BYTES}s{_MAC_BYTES}s")  # magic, verdict, position, request, checksum, mac
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


def pack_header(header: ChunkHeader) -> bytes:
    """HEADER_BYTES bytes."""
    return _HEADER.pack(_HEADER_MAGIC, header.status, header.position, header.request, header.length, _NO_MAC)


def parse_header(buffer: bytes | bytearray | memoryview) -> ChunkHeader:
    """The header in the first HEADER_BYTES of `buffer`. Raises MessageError."""
    magic, status, position, request, length, mac = _HEADER.unpack_from(buffer)
    if magic != _HEADER_MAGIC or status not in {1, 2} or mac != _NO_MAC or length > MAX_CHUNK_BYTES:
        raise MessageError("not a chunk header")
    return ChunkHeader(ChunkStatus(status), request, position, length)


def pack_trailer(trailer: ChunkTrailer) -> bytes:
    """TRAILER_BYTES bytes."""
    return _TRAILER.pack(_TRAILER_MAGIC, trailer.verdict, trailer.position, trailer.request, trailer.checksum, _NO_MAC)


def parse_trailer(buffer: bytes | bytearray | memoryview) -> ChunkTrailer:
    """The trailer in the first TRAILER_BYTES of `buffer`. Raises MessageError."""
    magic, verdict, position, request, checksum, mac = _TRAILER.unpack_from(buffer)
    if magic != _TRAILER_MAGIC or verdict not in {1, 2} or mac != _NO_MAC:
        raise MessageError("not a chunk trailer")
    return ChunkTrailer(Verdict(verdict), request, position, checksum)
