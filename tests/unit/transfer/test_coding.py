"""Chunks over tcp that travel coded: between two nodes that can, and past those that cannot, may not or lie."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Iterator, Sequence

import msgspec
import pytest
import xxhash
import zstandard

from kvmesh.core.format import Format, with_int8
from kvmesh.core.reasons import MissReason
from kvmesh.errors import StartupError
from kvmesh.node.peer_server import PeerServer
from kvmesh.transfer import coding as coding_module
from kvmesh.transfer.base import Deadline
from kvmesh.transfer.codec import BLOCK_BYTES, restored_digest
from kvmesh.transfer.coding import Coding, make_coding
from kvmesh.transfer.link import PeerTarget
from kvmesh.transfer.pool import HostPool
from kvmesh.transfer.tcp import TcpTransport
from kvmesh.wire import peer
from kvmesh.wire.framing import pack_frame
from support.transfer_holder import HOLDER, HOLDER_INCARNATION, RacingPool, Store, items, key, kv_format, kv_like

CHUNKS, CHUNK_BYTES = 12, 2 * BLOCK_BYTES + 4096
PLAIN = kv_format(CHUNK_BYTES)
INT8 = with_int8(PLAIN, 64)


def soon(seconds: float = 20.0) -> Deadline:
    return Deadline(time.monotonic() + seconds, seconds)


def hello(kv_format: Format, coding: Coding | None, name: str = HOLDER, life: str = HOLDER_INCARNATION) -> peer.Hello:
    return peer.Hello.of(name, life, kv_format, codecs=() if coding is None else (coding.name,))


def chunk(index: int) -> bytes:
    return kv_like(index, CHUNK_BYTES)


def filled_store(pool: HostPool | None = None, coding: Coding | None = None) -> Store:
    """Chunks like those of KV, with checksums as a node of this codec makes them."""
    store = Store(0, CHUNK_BYTES, pool or HostPool.create(CHUNKS, CHUNK_BYTES))
    store.ledger.close()
    store.ledger = type(store.ledger).create(CHUNKS, CHUNK_BYTES)
    digest = coding.digest if coding is not None and coding.is_lossy else xxhash.xxh3_128_digest
    for index in range(CHUNKS):
        store.fill(index, index, chunk(index), digest)
    return store


@contextlib.contextmanager
def serving(store: Store, kv_format: Format, coding: Coding | None) -> Iterator[PeerServer]:
    server = PeerServer(
        store.pool, store.ledger, store.locate, hello(kv_format, coding), host="127.0.0.1", port=0, coding=coding
    )
    server.start()
    try:
        yield server
    finally:
        server.close()


@contextlib.contextmanager
def fetching(port: int, kv_format: Format, coding: Coding | None) -> Iterator[tuple[TcpTransport, HostPool]]:
    pool = HostPool.create(CHUNKS, CHUNK_BYTES)
    ours = hello(kv_format, coding, "me", "0" * 16)
    target = PeerTarget(HOLDER, HOLDER_INCARNATION, "127.0.0.1", port)
    transport = TcpTransport(target, ours, pool, coding=coding)
    try:
        yield transport, pool
    finally:
        transport.close()
        pool.close()


@pytest.fixture
def store() -> Iterator[Store]:
    store = filled_store()
    yield store
    store.close()


def test_chunks_come_coded_and_whole(store: Store) -> None:
    """The slots hold what was published; fewer bytes have travelled, and both sides count the same."""
    theirs, ours = make_coding("lossless", PLAIN), make_coding("lossless", PLAIN)
    assert theirs is not None
    assert ours is not None
    with serving(store, PLAIN, theirs) as server, fetching(server.port, PLAIN, ours) as (transport, pool):
        outcomes = transport.fetch(items(CHUNKS), soon())
        assert [outcome.reason for outcome in outcomes] == [None] * CHUNKS
        assert all(bytes(pool.row(slot)) == chunk(slot) for slot in range(CHUNKS))
        sent, received = theirs.statistics(), ours.statistics()
        assert received.received_raw_bytes == sent.sent_raw_bytes == CHUNKS * CHUNK_BYTES
        assert received.received_wire_bytes == sent.sent_wire_bytes < 0.9 * CHUNKS * CHUNK_BYTES


@pytest.mark.parametrize("sides", ["holder", "fetcher"])
def test_a_codec_that_one_side_offers_is_not_used(store: Store, sides: str) -> None:
    made = make_coding("lossless", PLAIN)
    theirs, ours = (made, None) if sides == "holder" else (None, made)
    with serving(store, PLAIN, theirs) as server, fetching(server.port, PLAIN, ours) as (transport, pool):
        outcomes = transport.fetch(items(CHUNKS), soon())
        assert [outcome.reason for outcome in outcomes] == [None] * CHUNKS
        assert bytes(pool.row(0)) == chunk(0)
        assert made is not None
        assert not any(made.statistics())


def test_auto_codes_when_it_has_learned_that_it_pays(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first fetches come raw and one of their chunks is measured; a link that is said to be slow is then coded."""
    theirs, ours = make_coding("auto", PLAIN), make_coding("auto", PLAIN)
    assert ours is not None
    sampled = threading.Event()
    sample = ours.sample
    monkeypatch.setattr(ours, "sample", lambda row: (sample(row), sampled.set()))
    with serving(store, PLAIN, theirs) as server, fetching(server.port, PLAIN, ours) as (transport, pool):
        assert not any(outcome.reason for outcome in transport.fetch(items(CHUNKS), soon()))
        assert ours.statistics().received_raw_bytes == 0
        assert sampled.wait(10)
        for _ in range(4):
            ours.towards(HOLDER_INCARNATION).came(1 << 20, 0, 100.0)
        assert not any(outcome.reason for outcome in transport.fetch(items(CHUNKS), soon()))
        assert ours.statistics().received_raw_bytes == CHUNKS * CHUNK_BYTES
        assert all(bytes(pool.row(slot)) == chunk(slot) for slot in range(CHUNKS))


def test_int8_is_the_same_at_every_instance_after_the_first() -> None:
    """A second instance has the rounded bytes, a third one the very same, under the first one's checksum."""
    theirs, ours, third = (make_coding("int8", INT8) for _ in range(3))
    assert theirs is not None
    assert ours is not None
    first = filled_store(coding=theirs)
    with serving(first, INT8, theirs) as server, fetching(server.port, INT8, ours) as (transport, pool):
        outcomes = transport.fetch(items(CHUNKS), soon())
        assert [outcome.reason for outcome in outcomes] == [None] * CHUNKS
        second = filled_store(coding=theirs)
        for slot, outcome in enumerate(outcomes):
            restored = bytes(pool.row(slot))
            assert restored != chunk(slot)
            assert outcome.checksum == ours.digest(pool.row(slot)) == xxhash.xxh3_128_digest(restored)
            second.fill(slot, slot, restored, lambda _, known=outcome.checksum: known)
        with serving(second, INT8, ours) as again, fetching(again.port, INT8, third) as (onwards, last):
            assert not any(outcome.reason for outcome in onwards.fetch(items(CHUNKS), soon()))
            assert all(bytes(last.row(slot)) == bytes(pool.row(slot)) for slot in range(CHUNKS))
        second.close()
    first.close()


def test_int8_and_exact_instances_never_meet(store: Store) -> None:
    """They name the field that differs; configuration and format must say the same."""
    with (
        serving(store, PLAIN, None) as server,
        fetching(server.port, INT8, make_coding("int8", INT8)) as (transport, _),
    ):
        outcomes = transport.fetch(items(2), soon())
        assert {outcome.reason for outcome in outcomes} == {MissReason.FORMAT_MISMATCH}
        assert "kv_dtype" in transport.statistics().last_error
    for wire_codec, wrong in (("int8", PLAIN), ("auto", INT8), ("none", INT8)):
        with pytest.raises(StartupError, match="wire_codec"):
            make_coding(wire_codec, wrong)  # type: ignore[arg-type]


def test_a_slot_reused_while_it_is_coded_is_stale() -> None:
    pool = RacingPool(HostPool.create(CHUNKS, CHUNK_BYTES).segments, chunk_bytes=CHUNK_BYTES)
    store = filled_store(pool)
    pool.store, pool.racing = store, frozenset({1})
    both = make_coding("lossless", PLAIN)
    with serving(store, PLAIN, both) as server, fetching(server.port, PLAIN, both) as (transport, _):
        outcomes = transport.fetch(items(3), soon())
        assert [outcome.reason for outcome in outcomes][:2] == [None, MissReason.STALE]
    store.close()


# -- peers that know nothing of codecs ---------------------------------------------------------------------------------


def without_last(message: peer.Message) -> bytes:
    """As a node would send it whose struct lacks the last field."""
    return msgspec.msgpack.encode(msgspec.msgpack.decode(peer.encode(message))[:-1])


def answer(request: int, payloads: Sequence[bytes], checksums: Sequence[bytes]) -> bytes:
    parts = []
    for position, (payload, checksum) in enumerate(zip(payloads, checksums, strict=True)):
        parts.append(peer.pack_header(peer.ChunkHeader(peer.ChunkStatus.HELD, request, position, CHUNK_BYTES)))
        parts.append(payload)
        parts.append(peer.pack_trailer(peer.ChunkTrailer(peer.Verdict.VALID, request, position, checksum)))
    return b"".join(parts)


@contextlib.contextmanager
def scripted(stream: bytes) -> Iterator[tuple[int, bytearray]]:
    """A holder that says this to everybody; and what it has heard."""
    heard = bytearray()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    accepted, _ = listener.accept()
                    with accepted:
                        accepted.sendall(stream)
                        while data := accepted.recv(1 << 16):
                            heard.extend(data)

        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1], heard
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


class OldGet(msgspec.Struct, array_like=True, tag="Get"):
    request: int
    keys: list[bytes]


def test_an_old_holder_reads_past_the_codec() -> None:
    """What a new fetcher sends it is what it knows, and something more at the end."""
    read = msgspec.msgpack.decode(peer.encode(peer.Get(7, [key(0)], "planes")), type=OldGet)
    assert (read.request, read.keys) == (7, [key(0)])


def test_an_old_holder_is_asked_raw() -> None:
    payload = chunk(0)
    greeting = pack_frame(without_last(hello(PLAIN, None)))
    stream = greeting + answer(1, [payload], [xxhash.xxh3_128_digest(payload)])
    with scripted(stream) as (port, _), fetching(port, PLAIN, make_coding("lossless", PLAIN)) as (transport, pool):
        assert [outcome.reason for outcome in transport.fetch(items(1), soon())] == [None]
        assert bytes(pool.row(0)) == payload


def test_an_old_fetcher_is_served_raw(store: Store) -> None:
    with serving(store, PLAIN, make_coding("lossless", PLAIN)) as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as old:
            old.sendall(pack_frame(without_last(hello(PLAIN, None, "me", "0" * 16).wanting("", ""))))
            old.sendall(pack_frame(without_last(peer.Get(1, [key(0)]))))
            old.shutdown(socket.SHUT_WR)
            received = b"".join(iter(lambda: old.recv(1 << 16), b""))
        assert received.endswith(answer(1, [chunk(0)], [xxhash.xxh3_128_digest(chunk(0))]))


@pytest.mark.parametrize(("kv_format", "asked"), [(PLAIN, "planes"), (PLAIN, "x" * 65), (INT8, ""), (INT8, "planes")])
def test_a_codec_that_was_not_offered_ends_the_connection(store: Store, kv_format: Format, asked: str) -> None:
    """So does none at all where bytes only travel as int8: they would have the wrong checksum."""
    coding = make_coding("int8", INT8) if kv_format is INT8 else None
    with serving(store, kv_format, coding) as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as stranger:
            stranger.sendall(pack_frame(peer.encode(hello(kv_format, coding, "me", "0" * 16).wanting("", ""))))
            stranger.sendall(pack_frame(peer.encode(peer.Get(1, [key(0)], asked))))
            received = b"".join(iter(lambda: stranger.recv(1 << 16), b""))
        assert len(received) < CHUNK_BYTES
        assert server.statistics().protocol_errors == 1


# -- holders that lie --------------------------------------------------------------------------------------------------


def coded(blocks: Sequence[bytes]) -> bytes:
    return b"".join(struct.pack("<I", len(block)) + block for block in blocks)


def good_blocks(payload: bytes) -> list[bytes]:
    codec = coding_module.lossless_codec(PLAIN)
    assert codec is not None
    return [codec.encode(memoryview(payload)[at : at + BLOCK_BYTES]) for at in range(0, CHUNK_BYTES, BLOCK_BYTES)]  # type: ignore[misc]


BOMB = zstandard.ZstdCompressor().compress(bytes(1 << 28))
GOOD = good_blocks(chunk(0))


@pytest.mark.parametrize(
    ("blocks", "reason"),
    [
        (GOOD, None),
        (good_blocks(chunk(1)), MissReason.CORRUPT),
        ([GOOD[0], GOOD[0], GOOD[2]], MissReason.CORRUPT),
        ([b"", *GOOD], MissReason.PROTOCOL),
        ([GOOD[0][:-1], *GOOD[1:]], MissReason.PROTOCOL),
        ([bytes(BLOCK_BYTES + 1), *GOOD[1:]], MissReason.PROTOCOL),
        ([2 * (struct.pack("<I", len(BOMB)) + BOMB), *GOOD[1:]], MissReason.PROTOCOL),
        ([GOOD[2], *GOOD[1:]], MissReason.PROTOCOL),
    ],
)
def test_what_a_lying_holder_sends_is_a_miss_with_a_reason(blocks: list[bytes], reason: MissReason | None) -> None:
    coding = make_coding("lossless", PLAIN)
    greeting = pack_frame(peer.encode(hello(PLAIN, coding)))
    checksum = xxhash.xxh3_128_digest(chunk(0))
    with (
        scripted(greeting + answer(1, [coded(blocks)], [checksum])) as (port, heard),
        fetching(port, PLAIN, coding) as (transport, _),
    ):
        assert [outcome.reason for outcome in transport.fetch(items(1), soon())] == [reason]
    assert b"planes" in heard


def test_an_int8_checksum_is_not_that_of_the_slot(store: Store) -> None:
    """A holder that has hashed its own bytes is found out."""
    both = make_coding("int8", INT8)
    with serving(store, INT8, both) as server, fetching(server.port, INT8, both) as (transport, _):
        assert transport.fetch(items(1), soon())[0].reason is MissReason.CORRUPT
    codec = coding_module.int8_codec(INT8)
    assert codec is not None
    assert restored_digest(store.pool.row(0), codec) != xxhash.xxh3_128_digest(store.pool.row(0))
