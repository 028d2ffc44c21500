"""The fetching side of tcp, against the real server in this process and against servers that lie."""

from __future__ import annotations

import contextlib
import logging
import math
import socket
import threading
import time

import pytest
import xxhash

from kvmesh.core.reasons import MissReason
from kvmesh.node.peer_server import PeerServer
from kvmesh.transfer import pull, tcp
from kvmesh.transfer.base import Deadline
from kvmesh.transfer.link import PeerTarget
from kvmesh.transfer.pool import HostPool
from kvmesh.transfer.tcp import TcpTransport
from kvmesh.wire import peer
from kvmesh.wire.framing import pack_frame
from support.transfer_holder import (
    HOLDER,
    HOLDER_INCARNATION,
    OTHER_INCARNATION,
    RacingPool,
    Store,
    content,
    hello,
    items,
    key,
)

CHUNKS, CHUNK_BYTES = 24, 1 << 20
RUN_BYTES = 4 << 20
UNTOUCHED = b"\xa5" * CHUNK_BYTES


def soon(seconds: float = 10.0, stall_s: float = 10.0) -> Deadline:
    return Deadline(time.monotonic() + seconds, stall_s)


def target(port: int, instance_id: str = HOLDER, incarnation: str = HOLDER_INCARNATION) -> PeerTarget:
    return PeerTarget(instance_id, incarnation, "127.0.0.1", port)


def reasons(outcomes) -> list[MissReason | None]:
    return [outcome.reason for outcome in outcomes]


@pytest.fixture
def store():
    store = Store(CHUNKS, CHUNK_BYTES)
    yield store
    store.close()


@contextlib.contextmanager
def serving(store, port=0, **options):
    server = PeerServer(
        store.pool, store.ledger, store.locate, hello(CHUNK_BYTES), host="127.0.0.1", port=port, **options
    )
    server.start()
    try:
        yield server
    finally:
        server.close()


@pytest.fixture
def pool():
    pool = HostPool.create(CHUNKS, CHUNK_BYTES)
    for slot in range(CHUNKS):
        pool.row(slot)[:] = UNTOUCHED
    yield pool
    pool.close()


@contextlib.contextmanager
def fetching(pool, whom, ours=None, **options):
    transport = TcpTransport(whom, ours or hello(CHUNK_BYTES, "me", "0" * 16), pool, **options)
    try:
        yield transport
    finally:
        transport.close()


@pytest.fixture(autouse=True)
def many_connections(monkeypatch):
    """As for a fetch of hundreds of MiB."""
    monkeypatch.setattr(tcp, "BYTES_PER_CONNECTION", RUN_BYTES)
    monkeypatch.setattr(pull, "RUN_BYTES", RUN_BYTES)
    monkeypatch.setattr(pull, "AHEAD_BYTES", RUN_BYTES)
    monkeypatch.setattr(pull, "REST_S", 10.0)


@pytest.mark.parametrize(("chunks_per_connection", "helpers"), [(CHUNKS, 0), (CHUNKS - 1, 1), (1, 2)])
def test_a_large_fetch_has_more_connections(store, pool, monkeypatch, chunks_per_connection, helpers):
    monkeypatch.setattr(tcp, "BYTES_PER_CONNECTION", chunks_per_connection * CHUNK_BYTES)
    started = []
    monkeypatch.setattr(TcpTransport, "_start_helpers", lambda _self, count, *_: started.append(count) or [])
    with serving(store) as server, fetching(pool, target(server.port), connections=3) as transport:
        assert reasons(transport.fetch(items(CHUNKS), soon())) == [None] * CHUNKS
    assert started == [helpers]


@pytest.mark.parametrize("connections", [1, 2, 4])
def test_chunks_arrive_whole_and_progress_is_told_in_order(store, pool, connections):
    """Every slot holds what was published under its key, over any number of connections."""
    heard = []
    with serving(store) as server, fetching(pool, target(server.port), connections=connections) as transport:
        outcomes = transport.fetch(items(CHUNKS), soon(), heard.append)
    assert reasons(outcomes) == [None] * CHUNKS
    assert heard == outcomes
    for index, outcome in enumerate(outcomes):
        data = content(index, CHUNK_BYTES)
        assert bytes(pool.row(index)) == data
        assert outcome.checksum == xxhash.xxh3_128_digest(data)


def test_nothing_wanted_needs_no_peer(pool):
    with fetching(pool, target(1)) as transport:
        assert transport.fetch([], soon()) == []


def test_a_chunk_that_is_not_held_ends_the_prefix(store, pool):
    """EVICTED for itself; what was not asked for yet is TRUNCATED, what was asked for may still arrive."""
    store.forget(2)
    with serving(store) as server, fetching(pool, target(server.port), connections=1) as transport:
        outcomes = transport.fetch(items(CHUNKS), soon())
        assert reasons(outcomes)[:3] == [None, None, MissReason.EVICTED]
        assert set(reasons(outcomes)[3:]) == {None, MissReason.TRUNCATED}
        assert reasons(transport.fetch(items(2), soon())) == [None, None]
        assert transport.statistics().connects == 1


def test_an_announcement_that_the_ledger_contradicts_is_a_miss(store, pool):
    """The slot was reused and the directory does not know yet: EVICTED, and no byte is sent."""
    store.retract(0)
    store.ledger.publish(1, key(99))
    with serving(store) as server, fetching(pool, target(server.port)) as transport:
        assert reasons(transport.fetch(items(1), soon())) == [MissReason.EVICTED]
        assert reasons(transport.fetch(items(1, first=1), soon())) == [MissReason.EVICTED]
    assert bytes(pool.row(0)) == UNTOUCHED


def test_a_slot_reused_while_it_is_sent_is_stale(pool):
    """The generation moved between the two looks at it: never a hit, whatever bytes arrived."""
    source = HostPool.create(CHUNKS, CHUNK_BYTES)
    racing = RacingPool(source.segments, chunk_bytes=CHUNK_BYTES)
    store = Store(CHUNKS, CHUNK_BYTES, racing)
    racing.store, racing.racing = store, frozenset({1})
    with serving(store) as server, fetching(pool, target(server.port)) as transport:
        outcomes = transport.fetch(items(3), soon())
        assert reasons(outcomes)[:2] == [None, MissReason.STALE]
        assert server.statistics().stale == 1


@pytest.mark.parametrize("verify", [True, False])
def test_bytes_that_do_not_have_their_checksum_are_corrupt(store, pool, verify):
    """One wrong bit in the holder's memory, behind the ledger's back. Only switching the check off lets it pass."""
    store.pool.row(1)[12345] ^= 1
    with serving(store) as server, fetching(pool, target(server.port), verify=verify) as transport:
        outcomes = transport.fetch(items(2), soon())
    assert reasons(outcomes) == [None, MissReason.CORRUPT if verify else None]


def test_somebody_else_at_the_address_is_unreachable(store, pool):
    """The address was reused, or the peer was restarted: nothing is asked, and both sides say who was found."""
    for who in (target(0, incarnation=OTHER_INCARNATION), target(0, instance_id="another")):
        with serving(store) as server, fetching(pool, who._replace(port=server.port)) as transport:
            assert set(reasons(transport.fetch(items(2), soon()))) == {MissReason.PEER_UNREACHABLE}
            assert f"instance {HOLDER} incarnation {HOLDER_INCARNATION}" in transport.statistics().last_error
    assert bytes(pool.row(0)) == UNTOUCHED


def test_another_format_is_refused_and_both_sides_name_the_field(store, pool, caplog):
    ours = hello(CHUNK_BYTES, "me", "0" * 16, kv_dtype="float8")
    with (
        caplog.at_level(logging.WARNING),
        serving(store) as server,
        fetching(pool, target(server.port), ours) as transport,
    ):
        assert transport.warm_up(soon()) is MissReason.FORMAT_MISMATCH
        assert set(reasons(transport.fetch(items(2), soon()))) == {MissReason.FORMAT_MISMATCH}
    said = {record.name.rpartition(".")[2] for record in caplog.records if "kv_dtype" in record.getMessage()}
    assert said == {"tcp", "peer_server"}


def test_nobody_listening_is_unreachable(pool):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with fetching(pool, target(port)) as transport:
        assert transport.warm_up(soon()) is MissReason.PEER_UNREACHABLE
        assert set(reasons(transport.fetch(items(2), soon()))) == {MissReason.PEER_UNREACHABLE}


@pytest.mark.parametrize("host", ["no-such-host.invalid", "..", "a" * 256, "\0", "999.1.1.1", "%", "ß." * 99])
def test_a_name_that_does_not_resolve_is_unreachable(pool, host):
    """Nor one that cannot be a name: it comes from the directory, and must not look like a broken transport."""
    with fetching(pool, target(1)._replace(host=host)) as transport:
        assert reasons(transport.fetch(items(1), soon())) == [MissReason.PEER_UNREACHABLE]


def test_a_holder_that_is_full_says_so(store, pool):
    """One that is busy with somebody else, who has not even said who it is."""
    with serving(store, max_connections=1) as server, fetching(pool, target(server.port)) as transport:
        with socket.create_connection(("127.0.0.1", server.port)):
            while not server.statistics().connections:
                time.sleep(0.001)
            assert transport.warm_up(soon()) is MissReason.PEER_UNREACHABLE
            assert "1 connections are open" in transport.statistics().last_error
        while server.statistics().connections:
            time.sleep(0.001)
        assert reasons(transport.fetch(items(CHUNKS), soon())) == [None] * CHUNKS  # without its second connection


def test_an_idle_connection_that_the_peer_closed_is_reopened(store, pool):
    """A node that came back on its port is fetched from without a miss."""
    with serving(store) as server:
        port = server.port
        transport = TcpTransport(target(port), hello(CHUNK_BYTES, "me", "0" * 16), pool)
        assert transport.warm_up(soon()) is None
    with serving(store, port=port):
        assert reasons(transport.fetch(items(CHUNKS), soon())) == [None] * CHUNKS
        transport.close()


def test_the_first_connection_is_told_once(store, pool, caplog):
    with caplog.at_level(logging.INFO), serving(store) as server, fetching(pool, target(server.port)) as transport:
        transport.warm_up(soon())
        transport.fetch(items(CHUNKS), soon())
    told = [record.getMessage() for record in caplog.records if "Established connection to peer" in record.getMessage()]
    assert len(told) == 1
    assert f"127.0.0.1:{server.port}" in told[0]


def test_fetches_from_many_threads_share_a_bounded_number_of_connections(store, pool):
    with serving(store) as server, fetching(pool, target(server.port), connections=2, max_connections=3) as transport:
        found = {}

        def fetch(slot: int) -> None:
            found[slot] = reasons(transport.fetch([items(CHUNKS)[slot]], soon(30)))

        threads = [threading.Thread(target=fetch, args=(slot,)) for slot in range(CHUNKS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == {slot: [None] for slot in range(CHUNKS)}
        assert transport.statistics().connections <= 3
    for slot in range(CHUNKS):
        assert bytes(pool.row(slot)) == content(slot, CHUNK_BYTES)


# -- servers that lie --------------------------------------------------------------------------------------------------


class Liar:
    """Accepts connections and hands each to `talk`, which plays a holder gone wrong."""

    def __init__(self, talk):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.over = threading.Event()
        self.talk = talk
        self.threads = [threading.Thread(target=self.accept)]
        self.threads[0].start()

    def accept(self):
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self.serve, args=(sock,))
            self.threads.append(thread)
            thread.start()

    def serve(self, sock):
        with sock, contextlib.suppress(OSError, ValueError):
            self.talk(self, sock)

    def greet(self, sock):
        self.frame(sock)
        sock.sendall(pack_frame(peer.encode(hello(CHUNK_BYTES))))

    def get(self, sock) -> peer.Get:
        return peer.decode_request(self.frame(sock))

    def frame(self, sock) -> bytes:
        length = int.from_bytes(sock.recv(4, socket.MSG_WAITALL), "little")
        return sock.recv(length, socket.MSG_WAITALL)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.over.set()
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for thread in self.threads:
            thread.join()


def header(request=1, position=0, length=CHUNK_BYTES, status=peer.ChunkStatus.HELD) -> bytes:
    return peer.pack_header(peer.ChunkHeader(status, request, position, length))


def trailer(request=1, position=0, checksum=bytes(16), verdict=peer.Verdict.VALID) -> bytes:
    return peer.pack_trailer(peer.ChunkTrailer(verdict, request, position, checksum))


DATA = content(0, CHUNK_BYTES)


def lie(answer: bytes):
    """A holder that greets well and then answers the first Get with these bytes."""

    def talk(liar, sock):
        liar.greet(sock)
        liar.get(sock)
        sock.sendall(answer)
        liar.over.wait()

    return talk


def garbage_at_once(liar, sock):
    sock.sendall(b"SSH-2.0-OpenSSH_9.2p1 Debian-2+deb12u3\r\n" * 10)
    liar.over.wait()


@pytest.mark.parametrize(
    ("talk", "reason"),
    [
        (garbage_at_once, MissReason.PROTOCOL),
        (lie(b"\x00" * 100), MissReason.PROTOCOL),
        (lie(header(request=2)), MissReason.PROTOCOL),
        (lie(header(position=1)), MissReason.PROTOCOL),
        (lie(header(length=CHUNK_BYTES - 1)), MissReason.PROTOCOL),
        (lie(header(length=1 << 31)), MissReason.PROTOCOL),
        (lie(header() + DATA + b"\xff" * 100), MissReason.PROTOCOL),
        (lie(header() + DATA + trailer(position=1)), MissReason.PROTOCOL),
        (lie(header() + DATA + trailer()), MissReason.CORRUPT),
        (lie(header() + DATA + trailer(verdict=peer.Verdict.STALE)), MissReason.STALE),
    ],
)
def test_an_answer_that_breaks_the_protocol_is_never_a_hit(pool, talk, reason):
    """Each lie has its reason, ends the connection, and nothing is written after the fetch has returned."""
    with Liar(talk) as liar, fetching(pool, target(liar.port)) as transport:
        outcomes = transport.fetch(items(1), soon())
        assert reasons(outcomes) == [reason]
        assert outcomes[0].checksum is None
        if reason is MissReason.PROTOCOL:
            assert transport.statistics().connections == 0


def test_a_later_chunks_lie_leaves_the_prefix_usable(pool):
    """What was good before the connection broke counts; the rest carries the reason."""
    good = header() + DATA + trailer(checksum=xxhash.xxh3_128_digest(DATA))
    with Liar(lie(good + b"\x00" * 100)) as liar, fetching(pool, target(liar.port), connections=1) as transport:
        outcomes = transport.fetch(items(CHUNKS), soon())
    assert reasons(outcomes) == [None] + [MissReason.PROTOCOL] * (CHUNKS - 1)
    assert bytes(pool.row(0)) == DATA


@pytest.mark.parametrize(
    ("first", "reason"),
    [
        (header(length=0, status=peer.ChunkStatus.GONE), MissReason.EVICTED),
        (header() + DATA + trailer(verdict=peer.Verdict.STALE) + header(position=1), MissReason.STALE),
    ],
)
def test_what_comes_behind_a_hole_is_not_waited_for(pool, caplog, monkeypatch, first, reason):
    """Over a slow link it would take many seconds. The peer is not to blame, and has another connection next time."""
    monkeypatch.setattr(pull, "REST_S", 0.05)
    with Liar(lie(first)) as liar, fetching(pool, target(liar.port), connections=1) as transport:
        started_s = time.monotonic()
        outcomes = transport.fetch(items(CHUNKS), soon(60, 60))
        assert time.monotonic() - started_s < 20
        assert reasons(outcomes) == [reason] + [MissReason.TRUNCATED] * (CHUNKS - 1)
        assert (transport.statistics().connections, transport.statistics().last_error) == (0, "")
        assert "peer failed" not in caplog.text


@pytest.mark.parametrize(
    "talk",
    [
        lambda liar, sock: liar.over.wait(),
        lie(b""),
        lie(header() + DATA[:5000]),
        lie(header() + DATA),
    ],
    ids=["before hello", "before the header", "in the payload", "before the trailer"],
)
def test_a_silent_peer_is_given_up_for_its_silence_or_at_the_deadline(pool, talk):
    """Whichever of stall time and deadline comes first names the reason."""
    with Liar(talk) as liar, fetching(pool, target(liar.port)) as transport:
        assert reasons(transport.fetch(items(1), soon(math.inf, 0.05))) == [MissReason.PEER_STALLED]
        assert reasons(transport.fetch(items(1), soon(0.05, 60))) == [MissReason.DEADLINE]
        assert transport.statistics().connections == 0


def test_a_trickle_does_not_outlive_the_deadline(pool):
    """A peer that sends a byte now and then is never stalled, and still ends with the fetch."""

    def trickle(liar, sock):
        liar.greet(sock)
        liar.get(sock)
        sock.sendall(header())
        while not liar.over.wait(0.01):
            sock.sendall(b"x")

    with Liar(trickle) as liar, fetching(pool, target(liar.port)) as transport:
        assert reasons(transport.fetch(items(1), soon(0.3, 0.1))) == [MissReason.DEADLINE]


def test_a_connection_that_breaks_in_the_middle_is_lost(pool):
    def leave(liar, sock):
        liar.greet(sock)
        liar.get(sock)
        sock.sendall(header() + DATA[:5000])

    with Liar(leave) as liar, fetching(pool, target(liar.port)) as transport:
        assert reasons(transport.fetch(items(2), soon())) == [MissReason.PEER_LOST] * 2


def test_after_a_fetch_nobody_writes_into_its_slots(pool):
    """The peer goes on sending when we have given up: the bytes go nowhere."""
    gave_up, sent = threading.Event(), threading.Event()

    def late(liar, sock):
        liar.greet(sock)
        liar.get(sock)
        sock.sendall(header() + DATA[:5000])
        gave_up.wait()
        try:
            sock.sendall(DATA[5000:])
        finally:
            sent.set()

    with Liar(late) as liar, fetching(pool, target(liar.port)) as transport:
        assert reasons(transport.fetch(items(1), soon(0.05, 60))) == [MissReason.DEADLINE]
        pool.row(0)[:] = UNTOUCHED
        gave_up.set()
        sent.wait()
        assert bytes(pool.row(0)) == UNTOUCHED


def test_close_ends_a_running_fetch(pool):
    """PEER_LOST, from another thread, without waiting for the peer or the deadline."""
    asked = threading.Event()

    def silent(liar, sock):
        liar.greet(sock)
        liar.get(sock)
        asked.set()
        liar.over.wait()

    with Liar(silent) as liar, fetching(pool, target(liar.port), connections=1) as transport:
        closer = threading.Thread(target=lambda: (asked.wait(), transport.close()))
        closer.start()
        assert set(reasons(transport.fetch(items(2), soon(50, 50)))) == {MissReason.PEER_LOST}
        closer.join()
        assert set(reasons(transport.fetch(items(2), soon()))) == {MissReason.PEER_LOST}


def test_when_one_connection_fails_the_others_finish_what_they_have(store, pool):
    """A prefix that other connections were pulling is not thrown away for a failure behind it."""
    run = RUN_BYTES // CHUNK_BYTES
    broken = {}

    def proxy(liar, sock):
        """The first connection is good for its runs; any other one breaks at its first Get."""
        liar.greet(sock)
        is_first = broken.setdefault("first", sock) is sock
        while True:
            get = liar.get(sock)
            if not is_first:
                broken["other"] = True
                return
            for position, wanted in enumerate(get.keys):
                data = content(int.from_bytes(wanted[:8], "big"), CHUNK_BYTES)
                checksum = xxhash.xxh3_128_digest(data)
                sock.sendall(header(get.request, position) + data + trailer(get.request, position, checksum))

    with Liar(proxy) as liar, fetching(pool, target(liar.port), connections=2) as transport:
        assert transport.warm_up(soon()) is None  # so that the caller's own connection is the good one
        found = reasons(transport.fetch(items(CHUNKS), soon()))
    if "other" in broken:
        first_miss = found.index(MissReason.PEER_LOST)
        assert first_miss % run == 0
        assert set(found) == {None, MissReason.PEER_LOST}
    else:
        assert set(found) == {None}
