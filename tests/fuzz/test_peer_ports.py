"""Peer port and lookup port of a real server, and the fetching side, against anything at the other end."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import get_args

import msgspec
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from fuzz.effort import fuzz
from fuzz.inputs import changed, frames, hostile
from kvmesh.core.reasons import MissReason
from kvmesh.node.peer_server import PeerServer
from kvmesh.transfer.base import Deadline
from kvmesh.transfer.codec import PlaneCodec
from kvmesh.transfer.coding import Coding, make_coding
from kvmesh.transfer.link import PeerTarget
from kvmesh.transfer.pool import HostPool
from kvmesh.transfer.tcp import TcpTransport
from kvmesh.wire import peer
from kvmesh.wire.framing import pack_frame
from support.transfer_holder import HOLDER, HOLDER_INCARNATION, Store, content, hello, items, key, kv_format, kv_like

CHUNKS, CHUNK_BYTES = 4, 8192
CODING = make_coding("lossless", kv_format(CHUNK_BYTES))
OFFERING = msgspec.structs.replace(hello(CHUNK_BYTES), codecs=("planes",))
OURS = hello(CHUNK_BYTES, "me", "0" * 16)
HELLO = pack_frame(peer.encode(OURS.wanting(HOLDER, HOLDER_INCARNATION)))
ASKED = [
    peer.encode(request)
    for request in (
        peer.Get(1, [key(0), key(99), key(1)]),
        peer.Get(2, [key(0), key(2)], "planes"),
        peer.Lookup([key(0), key(1)]),
        peer.Ping(7),
        peer.NixlAttach(),
        peer.Resolve([key(2)]),
        peer.Validate([peer.SlotGeneration(0, 1)]),
    )
]
KINDS = get_args(peer.Request)
conversations = (
    changed([HELLO + b"".join(map(pack_frame, ASKED))])
    | st.builds(lambda rest: HELLO + rest, frames(hostile(KINDS, ASKED)))
    | frames(hostile((peer.Hello, *KINDS), ASKED))
)


@pytest.fixture(scope="module")
def server() -> Iterator[PeerServer]:
    store = Store(CHUNKS, CHUNK_BYTES)
    made = PeerServer(
        store.pool,
        store.ledger,
        store.locate,
        OFFERING,
        coding=CODING,
        host="127.0.0.1",
        port=0,
        lookup_port=0,
        handshake_timeout_s=5.0,
        stall_timeout_s=5.0,
    )
    made.start()
    yield made
    made.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("kvmesh-peer")]
    assert made.statistics().connections == 0
    store.ledger.check_integrity()
    store.close()


@pytest.fixture
def fetched(server: PeerServer) -> Iterator[TcpTransport]:
    """A transport that fetches as a good peer would."""
    pool = HostPool.create(CHUNKS, CHUNK_BYTES)
    transport = TcpTransport(PeerTarget(HOLDER, HOLDER_INCARNATION, "127.0.0.1", server.port), OURS, pool)
    yield transport
    transport.close()
    pool.close()


def soon(seconds: float = 20.0) -> Deadline:
    return Deadline(time.monotonic() + seconds, seconds)


@given(stream=conversations, is_lookup_port=st.booleans())
@fuzz(80)
def test_anything_at_the_ports(server: PeerServer, fetched: TcpTransport, stream: bytes, is_lookup_port: bool) -> None:
    """It costs its own connection at most: the next fetch by somebody else brings the right bytes."""
    port = server.lookup_port if is_lookup_port else server.port
    with socket.create_connection(("127.0.0.1", port), timeout=20) as stranger:
        with contextlib.suppress(OSError):  # the server was quicker
            stranger.sendall(stream)
            stranger.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):
            while stranger.recv(65536):
                pass
    outcomes = fetched.fetch(items(CHUNKS), soon())
    assert [outcome.reason for outcome in outcomes] == [None] * CHUNKS
    assert all(bytes(fetched._pool.row(slot)) == content(slot, CHUNK_BYTES) for slot in range(CHUNKS))


def answer(request: int, count: int) -> bytes:
    """What a good holder answers to a Get of chunks 0, 1, ..."""
    parts = []
    for position in range(count):
        data = content(position, CHUNK_BYTES)
        checksum = xxhash.xxh3_128_digest(data)
        parts.append(peer.pack_header(peer.ChunkHeader(peer.ChunkStatus.HELD, request, position, CHUNK_BYTES)))
        parts.append(data)
        parts.append(peer.pack_trailer(peer.ChunkTrailer(peer.Verdict.VALID, request, position, checksum)))
    return b"".join(parts)


GREETING = pack_frame(peer.encode(hello(CHUNK_BYTES)))
GOOD = GREETING + answer(1, CHUNKS)


@given(
    stream=changed([GOOD])
    | st.builds(lambda end: GREETING + end, st.binary(max_size=200) | changed([answer(1, CHUNKS)]))
    | frames(hostile((peer.Hello, *get_args(peer.Answer)), [peer.encode(hello(CHUNK_BYTES))]))
)
@fuzz(100)
def test_a_holder_that_lies(stream: bytes) -> None:
    """Whatever it sends, `fetch` ends with a reason for each chunk, and what counts as come has the bytes that were
    published (a changed checksum included: it does not fit the bytes).
    """
    fetch_from(stream, OURS, None)


def coded_answer(request: int, count: int) -> bytes:
    """The same as `answer`, coded; with chunks that can be."""
    codec, parts = PlaneCodec(2), []
    for position in range(count):
        data = kv_like(position, CHUNK_BYTES)
        coded = codec.encode(memoryview(data)) or data
        parts.append(peer.pack_header(peer.ChunkHeader(peer.ChunkStatus.HELD, request, position, CHUNK_BYTES)))
        parts.append(len(coded).to_bytes(4, "little") + coded)
        checksum = xxhash.xxh3_128_digest(data)
        parts.append(peer.pack_trailer(peer.ChunkTrailer(peer.Verdict.VALID, request, position, checksum)))
    return b"".join(parts)


CODED = pack_frame(peer.encode(OFFERING)) + coded_answer(1, CHUNKS)


def test_the_coded_original_is_good() -> None:
    assert fetch_from(CODED, OFFERING, CODING) == [None] * CHUNKS


@given(stream=changed([CODED]) | st.builds(lambda rest: CODED[:-5000] + rest, st.binary(max_size=6000)))
@fuzz(100)
def test_a_holder_that_lies_about_coded_chunks(stream: bytes) -> None:
    """As above: a reason for each chunk, or the bytes that were published."""
    fetch_from(stream, OFFERING, CODING)


def fetch_from(stream: bytes, theirs: peer.Hello, coding: Coding | None) -> list[MissReason | None]:
    """Fetch from a holder that says `stream` to everybody; what counts as come has the bytes that were published."""
    ours = msgspec.structs.replace(OURS, codecs=theirs.codecs)
    pool = HostPool.create(CHUNKS, CHUNK_BYTES)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):
                for _ in range(2):  # a fetch tries a second connection when the first was no good
                    accepted, _ = listener.accept()
                    with accepted:
                        accepted.sendall(stream)
                        accepted.shutdown(socket.SHUT_WR)
                        while accepted.recv(65536):
                            pass

        holder = threading.Thread(target=serve)
        holder.start()
        target = PeerTarget(HOLDER, HOLDER_INCARNATION, "127.0.0.1", listener.getsockname()[1])
        transport = TcpTransport(target, ours, pool, connections=1, coding=coding)
        outcomes = transport.fetch(items(CHUNKS), soon())
        transport.close()
        listener.shutdown(socket.SHUT_RDWR)
        holder.join()
    assert len(outcomes) == CHUNKS
    for slot, outcome in enumerate(outcomes):
        if outcome.reason is None:
            published = content(slot, CHUNK_BYTES) if coding is None else kv_like(slot, CHUNK_BYTES)
            assert bytes(pool.row(slot)) == published
    pool.close()
    return [outcome.reason for outcome in outcomes]


def test_the_good_holder_is_believed() -> None:
    """Otherwise the test above tries nothing."""
    assert GOOD.startswith(GREETING)
    test_a_holder_that_lies.hypothesis.inner_test(stream=GOOD)
