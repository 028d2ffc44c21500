from __future__ import annotations

import contextlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmesh.wire import peer
from kvmesh.wire.peer import (
    HEADER_BYTES,
    MAX_KEYS,
    TRAILER_BYTES,
    ChunkHeader,
    ChunkStatus,
    ChunkTrailer,
    Get,
    Held,
    Lookup,
    MessageError,
    NixlAttach,
    NixlMetadata,
    Ping,
    Place,
    Pong,
    Refused,
    Resolve,
    Resolved,
    SlotGeneration,
    Validate,
    Validated,
    Verdict,
)
from support.transfer_holder import hello, key

REQUESTS = [
    Get(1, [key(1), key(2)]),
    Lookup([key(1)]),
    Ping(7),
    NixlAttach(),
    Resolve([key(1)]),
    Validate([SlotGeneration(3, 5)]),
]
ANSWERS = [
    Refused("full", "text"),
    Held(b"\x01"),
    Pong(7),
    NixlMetadata(b"meta", 1, 4096, 64),
    Resolved(1, [Place(1 << 47, 4096, 5, 3), None]),
    Validated([bytes(16), b""]),
]
DECODERS = [peer.decode_hello, peer.decode_greeting, peer.decode_request, peer.decode_answer]
words = st.integers(0, (1 << 32) - 1)


@pytest.mark.parametrize("message", REQUESTS, ids=lambda message: type(message).__name__)
def test_requests_survive_the_wire(message):
    assert peer.decode_request(peer.encode(message)) == message


@pytest.mark.parametrize("message", ANSWERS, ids=lambda message: type(message).__name__)
def test_answers_survive_the_wire(message):
    assert peer.decode_answer(peer.encode(message)) == message


def test_hello_survives_the_wire_and_says_whom_it_wants():
    ours = hello(4096).wanting("b", "0" * 16)
    assert peer.decode_hello(peer.encode(ours)) == ours
    assert peer.decode_greeting(peer.encode(ours)) == ours


@pytest.mark.parametrize("decode", DECODERS)
@given(payload=st.binary(max_size=300))
def test_garbage_is_a_message_error_and_nothing_else(decode, payload):
    """Whatever bytes come, a decoder returns a message or raises MessageError."""
    with contextlib.suppress(MessageError):
        decode(payload)


@pytest.mark.parametrize("decode", DECODERS)
@given(data=st.data(), message=st.sampled_from([*REQUESTS, *ANSWERS, hello(4096)]))
def test_a_flipped_byte_is_another_message_or_a_message_error(decode, data, message):
    """Messages that are nearly right are parsed as strictly as garbage."""
    payload = bytearray(peer.encode(message))
    payload[data.draw(st.integers(0, len(payload) - 1))] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(MessageError):
        decode(bytes(payload))


@pytest.mark.parametrize(
    ("decode", "payload"),
    [
        (peer.decode_request, peer.encode(Get(1, []))),
        (peer.decode_request, peer.encode(Get(1, [key(0)] * (MAX_KEYS + 1)))),
        (peer.decode_request, peer.encode(Get(1, [b"short"]))),
        (peer.decode_request, peer.encode(Get(1, [b"x" * 41]))),
        (peer.decode_request, peer.encode(Get(-1, [key(0)]))),
        (peer.decode_request, peer.encode(Get(1 << 32, [key(0)]))),
        (peer.decode_request, peer.encode(Validate([]))),
        (peer.decode_request, peer.encode(Validate([SlotGeneration(-1, 1)]))),
        (peer.decode_request, peer.encode(Pong(1))),
        (peer.decode_answer, peer.encode(Validated([b"x" * 17]))),
        (peer.decode_answer, peer.encode(Resolved(1, [Place(0, 0, 1, 1)]))),
        (peer.decode_answer, peer.encode(NixlMetadata(b"m", 1, 1, 1 << 20))),
        (peer.decode_answer, peer.encode(Held(bytes(MAX_KEYS)))),
        (peer.decode_hello, peer.encode(msgspec.structs.replace(hello(4096), incarnation="nonsense"))),
        (peer.decode_hello, peer.encode(msgspec.structs.replace(hello(4096), instance_id="x" * 300))),
        (peer.decode_hello, peer.encode(msgspec.structs.replace(hello(4096), challenge=bytes(65)))),
        (peer.decode_hello, b"\x91" * 100_000),
        (peer.decode_request, b""),
    ],
)
def test_counts_and_lengths_over_their_limits_are_refused(decode, payload):
    with pytest.raises(MessageError):
        decode(payload)


def test_the_largest_request_and_answer_fit_into_a_frame():
    """The limits of counts and of frames agree, so that no legal message is refused for its size."""
    largest = (1 << 64) - 1
    for message in (
        Get(0, [b"x" * 40] * MAX_KEYS),
        Resolved(1, [Place(largest, 1 << 32, largest, largest)] * MAX_KEYS),
        Validate([SlotGeneration(largest, largest)] * MAX_KEYS),
        Validated([bytes(16)] * MAX_KEYS),
    ):
        assert len(peer.encode(message)) <= peer.FRAME_LIMIT_BYTES


@given(st.lists(st.booleans(), max_size=100))
def test_bitmaps_survive_the_wire(bits):
    assert peer.unpack_bits(peer.pack_bits(bits), len(bits)) == bits


def test_a_bitmap_of_another_size_is_refused():
    with pytest.raises(MessageError):
        peer.unpack_bits(b"\x00\x00", 8)


@given(st.sampled_from(ChunkStatus), words, st.integers(0, MAX_KEYS - 1), words)
def test_chunk_headers_survive_the_wire(status, request, position, length):
    header = ChunkHeader(status, request, position, length)
    packed = peer.pack_header(header)
    assert len(packed) == HEADER_BYTES
    assert peer.parse_header(packed) == header


@given(st.sampled_from(Verdict), words, st.integers(0, MAX_KEYS - 1), st.binary(min_size=16, max_size=16))
def test_chunk_trailers_survive_the_wire(verdict, request, position, checksum):
    trailer = ChunkTrailer(verdict, request, position, checksum)
    packed = peer.pack_trailer(trailer)
    assert len(packed) == TRAILER_BYTES
    assert peer.parse_trailer(packed) == trailer


@given(
    st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES), st.binary(min_size=TRAILER_BYTES, max_size=TRAILER_BYTES)
)
def test_garbage_headers_and_trailers_are_refused(header, trailer):
    with pytest.raises(MessageError):
        peer.parse_header(header)
    with pytest.raises(MessageError):
        peer.parse_trailer(trailer)


def test_differing_fields_are_named():
    found = peer.format_differences(hello(4096), hello(4096, kv_dtype="float16", hash_seed="1"))
    assert [difference.field for difference in found] == ["kv_dtype", "hash_seed"]


def test_a_format_that_lies_about_its_id_is_not_taken_for_ours():
    liar = msgspec.structs.replace(hello(4096), format_id="0" * 32)
    assert [difference.field for difference in peer.format_differences(hello(4096), liar)] == ["format_id"]
