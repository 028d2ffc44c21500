"""The fetching side of shm, against the real server in this process and against holders that lie."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import threading
import time
from pathlib import Path

import pytest
import xxhash

from kvmesh.core.ledger import SlotLedger
from kvmesh.core.reasons import MissReason
from kvmesh.errors import StartupError
from kvmesh.node.peer_server import PeerServer
from kvmesh.transfer import shm_attachment, shm_holder, unix_stream
from kvmesh.transfer.base import Deadline
from kvmesh.transfer.factory import choose
from kvmesh.transfer.link import PeerTarget
from kvmesh.transfer.pool import HostPool, PoolSegment
from kvmesh.transfer.shm import ShmTransport
from kvmesh.transfer.shm_holder import ShmHolder, why_not_shared
from kvmesh.transfer.tcp import TcpTransport
from kvmesh.wire.peer import ShmAttached, ShmSegment
from support.keys import keyed
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

CHUNKS, CHUNK_BYTES = 12, 1 << 20
UNTOUCHED = b"\xa5" * CHUNK_BYTES


def soon(seconds: float = 10.0, stall_s: float = 10.0) -> Deadline:
    return Deadline(time.monotonic() + seconds, stall_s)


def target(port: int, incarnation: str = HOLDER_INCARNATION) -> PeerTarget:
    return PeerTarget(HOLDER, incarnation, "127.0.0.1", port, ("shm", "tcp"))


def reasons(outcomes) -> list[MissReason | None]:
    return [outcome.reason for outcome in outcomes]


@pytest.fixture
def store():
    store = Store(CHUNKS, CHUNK_BYTES)
    yield store
    store.close()


@pytest.fixture
def pool():
    pool = HostPool.create(CHUNKS, CHUNK_BYTES)
    for slot in range(CHUNKS):
        pool.row(slot)[:] = UNTOUCHED
    yield pool
    pool.close()


@contextlib.contextmanager
def serving(store, holder=None, port=0, **options):
    holder = holder or ShmHolder(store.pool, store.ledger, HOLDER_INCARNATION)
    server = PeerServer(
        store.pool, store.ledger, store.locate, hello(CHUNK_BYTES), host="127.0.0.1", port=port, shm=holder, **options
    )
    server.start()
    try:
        yield server
    finally:
        server.close()
        holder.close()


@contextlib.contextmanager
def fetching(pool, whom, ours=None, **options):
    transport = ShmTransport(whom, ours or hello(CHUNK_BYTES, "me", "0" * 16), pool, **options)
    try:
        yield transport
    finally:
        transport.close()


def wait_for(condition) -> None:
    while not condition():
        time.sleep(0.001)


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_chunks_arrive_whole_and_progress_is_told_in_order(store, pool, threads):
    """Every slot holds what was published under its key; the holder serves nothing but its memory."""
    heard = []
    with serving(store) as server, fetching(pool, target(server.port), threads=threads) as transport:
        assert transport.warm_up(soon()) is None
        outcomes = transport.fetch(items(CHUNKS), soon(), heard.append)
        assert transport.statistics().connects == 1
        assert server.statistics().served_chunks == 0
    assert reasons(outcomes) == [None] * CHUNKS
    assert heard == outcomes
    for index, outcome in enumerate(outcomes):
        data = content(index, CHUNK_BYTES)
        assert bytes(pool.row(index)) == data
        assert outcome.checksum == xxhash.xxh3_128_digest(data)


def test_nothing_wanted_needs_no_peer(pool):
    with fetching(pool, target(1)) as transport:
        assert transport.fetch([], soon()) == []


def test_a_pool_of_several_files_is_read_in_the_order_of_its_slots(pool):
    files = [HostPool.create(4, CHUNK_BYTES) for _ in range(3)]
    segments = [
        PoolSegment(os.dup(file.segments[0].fd), 0 if number != 1 else CHUNK_BYTES, (4 - (number == 1)) * CHUNK_BYTES)
        for number, file in enumerate(files)
    ]
    store = Store(11, CHUNK_BYTES, HostPool(segments, chunk_bytes=CHUNK_BYTES))
    with serving(store) as server, fetching(pool, target(server.port)) as transport:
        assert reasons(transport.fetch(items(11), soon())) == [None] * 11
    assert [bytes(pool.row(slot)) for slot in range(11)] == [content(index, CHUNK_BYTES) for index in range(11)]
    store.close()
    for file in files:
        file.close()


def test_a_chunk_that_is_not_held_ends_the_prefix(store, pool):
    """EVICTED for itself, TRUNCATED for what follows; what is published later is found."""
    store.ledger.retract(2)
    with serving(store) as server, fetching(pool, target(server.port), threads=1) as transport:
        outcomes = transport.fetch(items(CHUNKS), soon())
        assert reasons(outcomes) == [None, None, MissReason.EVICTED] + [MissReason.TRUNCATED] * (CHUNKS - 3)
        store.publish(2, 99)
        assert reasons(transport.fetch(items(1, first=99), soon())) == [None]
        assert transport.statistics().connects == 1


def test_a_chunk_without_its_checksum_is_not_held_yet(store, pool):
    """The engine has published it; its node has not hashed it."""
    store.ledger.publish(0, key(0))
    with serving(store) as server, fetching(pool, target(server.port)) as transport:
        assert reasons(transport.fetch(items(1), soon())) == [MissReason.EVICTED]


def test_a_slot_reused_while_it_is_copied_is_stale(store):
    """The generation moved between the two looks at it: never a hit, whatever bytes arrived."""
    source = HostPool.create(CHUNKS, CHUNK_BYTES)
    pool = RacingPool(source.segments, chunk_bytes=CHUNK_BYTES)
    pool.store, pool.racing = store, frozenset({1})
    with serving(store) as server, fetching(pool, target(server.port)) as transport:
        assert reasons(transport.fetch(items(3), soon()))[:2] == [None, MissReason.STALE]


@pytest.mark.parametrize("verify", [True, False])
def test_bytes_that_do_not_have_their_checksum_are_corrupt(store, pool, verify):
    store.pool.row(1)[12345] ^= 1
    with serving(store) as server, fetching(pool, target(server.port), verify=verify) as transport:
        outcomes = transport.fetch(items(2), soon())
    assert reasons(outcomes) == [None, MissReason.CORRUPT if verify else None]


def test_the_holders_memory_cannot_be_written_through_what_it_hands_out(store):
    """Neither by accident through a mapping nor through the descriptors as they are."""
    holder = ShmHolder(store.pool, store.ledger, HOLDER_INCARNATION)
    for fd in holder.describe()[1]:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.pwrite(fd, b"x", 0)
    ledger = SlotLedger.attach(os.dup(holder.describe()[1][0]), writable=False)
    with pytest.raises(TypeError):
        ledger.retract(0)
    ledger.close()
    holder.close()


# -- who may share -----------------------------------------------------------------------------------------------------


def test_a_node_of_this_host_is_seen_without_asking_anybody(store, pool):
    ours = hello(CHUNK_BYTES, "me", "0" * 16)
    with serving(store) as server:
        assert why_not_shared(server.port, HOLDER_INCARNATION) is None
        assert choose("auto", target(server.port), ours, pool, host="127.0.0.1").transport.name == "shm"
        elsewhere = choose("shm", target(server.port, OTHER_INCARNATION), ours, pool, host="127.0.0.1")
        assert isinstance(elsewhere.transport, TcpTransport)
        assert "not on this host" in elsewhere.reason


def test_who_has_no_descriptor_left_fetches_over_tcp(pool, monkeypatch):
    """A peer is met once: it must not be lost because of that moment."""

    def no_socket(*_):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(shm_holder.socket, "socket", no_socket)
    chosen = choose("auto", target(1), hello(CHUNK_BYTES, "me", "0" * 16), pool, host="127.0.0.1")
    assert isinstance(chosen.transport, TcpTransport)


def test_another_user_shares_nothing(store, pool, monkeypatch):
    """Whichever side is the other user's, and whoever has put itself in the holder's place."""
    with serving(store) as server, fetching(pool, target(server.port)) as transport:
        monkeypatch.setattr(shm_holder, "user_of", lambda sock: os.geteuid() + 1)
        assert "another user" in str(why_not_shared(server.port, HOLDER_INCARNATION))
        monkeypatch.setattr(unix_stream, "user_of", lambda sock: os.geteuid() + 1)
        assert reasons(transport.fetch(items(1), soon())) == [MissReason.UNAUTHENTICATED]
        stranger = socket.socket(socket.AF_UNIX)
        with stranger:
            stranger.connect(shm_holder.socket_address(server.port, HOLDER_INCARNATION))
            assert stranger.recv(1) == b""
        wait_for(lambda: server.statistics().unauthenticated)


def test_the_cluster_key_counts_within_a_host_too(store, pool):
    with serving(store, security=keyed()) as server:
        for security, reason in ((keyed(), None), (keyed("some other key, not ours"), MissReason.UNAUTHENTICATED)):
            with fetching(pool, target(server.port), security=security) as transport:
                assert reasons(transport.fetch(items(2), soon())) == [reason] * 2
        with fetching(pool, target(server.port)) as transport:
            assert transport.warm_up(soon()) is MissReason.UNAUTHENTICATED


def test_memory_is_handed_out_on_the_unix_socket_only(store):
    """A peer beyond this host that asks is told no."""
    from kvmesh.transfer.link import PeerLink  # noqa: PLC0415
    from kvmesh.wire.peer import Refused, ShmAttach  # noqa: PLC0415

    with serving(store) as server:
        link = PeerLink.dial(target(server.port), hello(CHUNK_BYTES, "me", "0" * 16), soon())
        assert link.request(ShmAttach(), Refused, soon()).code == "unsupported"
        link.close()


def test_somebody_else_or_nobody_is_unreachable(store, pool):
    with serving(store) as server:
        for whom in (target(server.port, OTHER_INCARNATION), target(1)):
            with fetching(pool, whom) as transport:
                assert set(reasons(transport.fetch(items(2), soon()))) == {MissReason.PEER_UNREACHABLE}
    assert bytes(pool.row(0)) == UNTOUCHED


def test_another_format_is_refused(store, pool):
    ours = hello(CHUNK_BYTES, "me", "0" * 16, kv_dtype="float8")
    with serving(store) as server, fetching(pool, target(server.port), ours) as transport:
        assert transport.warm_up(soon()) is MissReason.FORMAT_MISMATCH


# -- ends --------------------------------------------------------------------------------------------------------------


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_the_holders_end_is_noticed_and_its_memory_let_go(store, pool):
    """Also while nobody fetches: a pool must not outlive its engine because a peer has it open."""
    before = open_files()
    with fetching(pool, target(0)) as never:
        del never
    with serving(store) as server:
        port = server.port
        transport = ShmTransport(target(port), hello(CHUNK_BYTES, "me", "0" * 16), pool)
        assert transport.warm_up(soon()) is None
    wait_for(lambda: transport.statistics().connections == 0 and open_files() == before)
    assert reasons(transport.fetch(items(1), soon())) == [MissReason.PEER_UNREACHABLE]
    with serving(store, port=port):
        assert reasons(transport.fetch(items(CHUNKS), soon())) == [None] * CHUNKS
        transport.close()
    wait_for(lambda: open_files() == before)


def test_close_ends_a_running_fetch_and_lets_go(store, pool):
    before = open_files()
    with serving(store) as server, fetching(pool, target(server.port), threads=1) as transport:
        outcomes = transport.fetch(items(CHUNKS), soon(), lambda _: transport.close())
        assert reasons(outcomes) == [None] + [MissReason.PEER_LOST] * (CHUNKS - 1)
        assert set(reasons(transport.fetch(items(1), soon()))) == {MissReason.PEER_LOST}
    wait_for(lambda: open_files() == before)


def test_a_fetch_ends_at_its_deadline(store, pool):
    with serving(store) as server, fetching(pool, target(server.port), threads=1) as transport:
        transport.warm_up(soon())
        deadline = soon(0.1)
        outcomes = transport.fetch(items(CHUNKS), deadline, lambda _: time.sleep(max(0.0, deadline.remaining_s())))
    assert reasons(outcomes) == [None] + [MissReason.DEADLINE] * (CHUNKS - 1)


def test_fetches_from_many_threads_share_one_connection(store, pool):
    with serving(store) as server, fetching(pool, target(server.port)) as transport:
        found = {}

        def fetch(slot: int) -> None:
            found[slot] = reasons(transport.fetch([items(CHUNKS)[slot]], soon(30)))

        threads = [threading.Thread(target=fetch, args=(slot,)) for slot in range(CHUNKS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == {slot: [None] for slot in range(CHUNKS)}
        assert transport.statistics().connects == 1


def test_more_nodes_than_may_share_are_refused(store, pool, monkeypatch):
    monkeypatch.setattr("kvmesh.node.peer_answers.MAX_ATTACHED", 1)
    with serving(store) as server, fetching(pool, target(server.port)) as first:
        assert first.warm_up(soon()) is None
        with fetching(pool, target(server.port)) as second:
            assert second.warm_up(soon()) is not None
            assert "share our memory already" in second.statistics().last_error
        assert reasons(first.fetch(items(1), soon())) == [None]
        at = target(server.port)
        chosen = choose("shm", at, hello(CHUNK_BYTES), pool, host="127.0.0.1").transport
        assert chosen.name == "shm"
        assert reasons(chosen.fetch(items(CHUNKS), soon())) == [None] * CHUNKS, "over tcp"
        assert chosen.name == "tcp"
        chosen.close()


def test_a_start_without_what_it_needs_says_what_to_do(store, monkeypatch):
    monkeypatch.setattr(shm_holder, "MAX_SEGMENTS", 0)
    with pytest.raises(StartupError, match="files"):
        ShmHolder(store.pool, store.ledger, HOLDER_INCARNATION)
    monkeypatch.undo()
    holder = ShmHolder(store.pool, store.ledger, HOLDER_INCARNATION)
    with holder.listen(1), pytest.raises(StartupError, match="transfer_channel"):
        holder.listen(1)
    holder.close()


# -- holders that lie --------------------------------------------------------------------------------------------------


class LyingHolder(ShmHolder):
    """Describes what it likes."""

    def __init__(self, store, attached, descriptors):
        super().__init__(store.pool, store.ledger, HOLDER_INCARNATION)
        self._lie = attached, descriptors

    def describe(self):
        attached, descriptors = super().describe()
        return self._lie[0] or attached, self._lie[1](list(descriptors))


WHOLE = [ShmSegment(0, CHUNKS * CHUNK_BYTES)]


@contextlib.contextmanager
def odd_descriptors():
    """Files that are none of ours: a pipe, a file on disk, an empty memory file, a ledger that is not sealed."""
    with contextlib.ExitStack() as stack:
        for fd in os.pipe():
            stack.callback(os.close, fd)
        disk = stack.enter_context(tempfile.TemporaryFile(dir="."))
        disk.truncate(CHUNKS * CHUNK_BYTES)
        empty = os.memfd_create("empty")
        stack.callback(os.close, empty)
        unsealed = os.memfd_create("unsealed")
        stack.callback(os.close, unsealed)
        os.ftruncate(unsealed, SlotLedger.size_bytes(CHUNKS))
        SlotLedger(os.dup(unsealed), slots=CHUNKS, chunk_bytes=CHUNK_BYTES, fresh=True).close()
        yield {"pipe": fd, "disk": disk.fileno(), "empty": empty, "unsealed": unsealed}


@pytest.mark.parametrize(
    ("attached", "descriptors"),
    [
        (None, lambda fds, odd: []),
        (None, lambda fds, odd: fds[:1]),
        (None, lambda fds, odd: fds + fds[1:]),
        (None, lambda fds, odd: fds * 60),
        (None, lambda fds, odd: fds[::-1]),
        (None, lambda fds, odd: [fds[0], odd["pipe"]]),
        (None, lambda fds, odd: [fds[0], odd["disk"]]),
        (None, lambda fds, odd: [fds[0], odd["empty"]]),
        (None, lambda fds, odd: [odd["pipe"], fds[1]]),
        (None, lambda fds, odd: [odd["unsealed"], fds[1]]),
        (None, lambda fds, odd: [odd["empty"], fds[1]]),
        (ShmAttached([ShmSegment(CHUNK_BYTES, CHUNKS * CHUNK_BYTES)]), lambda fds, odd: fds),
        (ShmAttached([ShmSegment(0, CHUNKS * CHUNK_BYTES - 1)]), lambda fds, odd: fds),
        (ShmAttached([ShmSegment(0, CHUNK_BYTES)]), lambda fds, odd: fds),
        (ShmAttached([ShmSegment(1 << 63, CHUNK_BYTES)]), lambda fds, odd: fds),
        (ShmAttached([ShmSegment(0, (1 << 64) - CHUNK_BYTES)]), lambda fds, odd: fds),
        (ShmAttached(WHOLE * 2), lambda fds, odd: [*fds, fds[1]]),
    ],
)
def test_descriptors_that_are_not_what_they_are_said_to_be_are_closed(store, pool, attached, descriptors):
    """PROTOCOL, nothing is read, no descriptor stays, and nobody is killed by it."""
    with odd_descriptors() as odd:
        holder = LyingHolder(store, attached, lambda fds: descriptors(fds, odd))
        with serving(store, holder) as server, fetching(pool, target(server.port)) as transport:
            wait_for(lambda: server.statistics().connections == 0)
            before = open_files()
            assert set(reasons(transport.fetch(items(2), soon()))) == {MissReason.PROTOCOL}
            wait_for(lambda: server.statistics().connections == 0)
            assert open_files() == before
    assert bytes(pool.row(0)) == UNTOUCHED


def test_a_pool_cut_short_while_it_is_read_is_a_miss(pool):
    """The pool of an engine cannot be sealed. Reading through a mapping would end our process here."""
    fd = os.memfd_create("vllm")
    os.ftruncate(fd, CHUNKS * CHUNK_BYTES)
    store = Store(CHUNKS, CHUNK_BYTES, HostPool([PoolSegment(fd, 0, CHUNKS * CHUNK_BYTES)], chunk_bytes=CHUNK_BYTES))
    with serving(store) as server, fetching(pool, target(server.port), threads=1) as transport:
        outcomes = transport.fetch(items(CHUNKS), soon(), lambda _: os.ftruncate(fd, 2 * CHUNK_BYTES + 4096))
        assert reasons(outcomes) == [None, None] + [MissReason.PEER_LOST] * (CHUNKS - 2)
        assert "cut short" in transport.statistics().last_error
    store.close()


def test_a_holder_that_accepts_and_says_nothing_has_stalled(pool):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(shm_holder.socket_address(7, HOLDER_INCARNATION))
        listener.listen()
        with fetching(pool, target(7)) as transport:
            assert reasons(transport.fetch(items(1), soon(60, 0.05))) == [MissReason.PEER_STALLED]
            assert reasons(transport.fetch(items(1), soon(0.05, 60))) == [MissReason.DEADLINE]


def test_a_ledger_too_large_to_be_true_is_refused(store, pool, monkeypatch):
    monkeypatch.setattr(shm_attachment, "MAX_SLOTS", CHUNKS - 1)
    with serving(store) as server, fetching(pool, target(server.port)) as transport:
        assert transport.warm_up(soon()) is MissReason.PROTOCOL
