from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time

import msgspec
import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvmesh.errors import PeerClosedError, PeerError, PeerRefusedError, StartupError, TransferError
from kvmesh.node.peer_server import PeerServer
from kvmesh.transfer.base import Deadline
from kvmesh.transfer.link import PeerLink, PeerTarget
from kvmesh.transfer.pool import HostPool
from kvmesh.transfer.security import PeerSecurity
from kvmesh.transfer.tcp import TcpTransport
from kvmesh.wire import peer
from kvmesh.wire.framing import pack_frame
from support.transfer_holder import HOLDER, HOLDER_INCARNATION, OTHER_INCARNATION, Store, content, hello, items, key

CHUNKS, CHUNK_BYTES = 4, 1 << 16
OURS = hello(CHUNK_BYTES, "me", "0" * 16)


def soon() -> Deadline:
    return Deadline(time.monotonic() + 10, 10)


@pytest.fixture
def store():
    store = Store(CHUNKS, CHUNK_BYTES)
    yield store
    store.close()


@contextlib.contextmanager
def serving(store, port=0, **options):
    ours = hello(CHUNK_BYTES)
    server = PeerServer(store.pool, store.ledger, store.locate, ours, host="127.0.0.1", port=port, **options)
    server.start()
    try:
        yield server
    finally:
        server.close()


@pytest.fixture
def server(store):
    with serving(store, lookup_port=0) as server:
        yield server


@contextlib.contextmanager
def linked(port, instance_id=HOLDER, incarnation=HOLDER_INCARNATION):
    link = PeerLink.dial(PeerTarget(instance_id, incarnation, "127.0.0.1", port), OURS, soon())
    try:
        yield link
    finally:
        link.close()


@contextlib.contextmanager
def raw(port):
    with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
        yield sock


def read_to_end(sock) -> bytes:
    """What the server still says until it closes."""
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while data := sock.recv(65536):
            found += data
    return found


def test_a_lookup_says_which_keys_are_held_on_both_ports(server, store):
    store.forget(2)
    assert server.lookup_port not in {None, server.port}
    for port in (server.port, server.lookup_port):
        with linked(port) as link:
            assert link.lookup([key(0), key(2), key(99), key(1)], soon()) == [True, False, False, True]


def test_a_ping_is_answered(server):
    with linked(server.port) as link:
        link.ping(soon())
        link.ping(soon())


def test_hello_tells_who_serves(server):
    with linked(server.port) as link:
        assert (link.theirs.instance_id, link.theirs.incarnation) == (HOLDER, HOLDER_INCARNATION)


def test_get_answers_each_key_in_order(server, store):
    """Header, bytes and trailer of what is held, a bare header for what is not."""
    store.forget(1)
    with linked(server.port) as link:
        link.send(peer.Get(7, [key(2), key(1), key(0)]), soon())
        for position, index in enumerate([2, None, 0]):
            header = bytearray(peer.HEADER_BYTES)
            link.stream.receive_into(memoryview(header), soon())
            if index is None:
                assert peer.parse_header(header) == (peer.ChunkStatus.GONE, 7, position, 0)
                continue
            assert peer.parse_header(header) == (peer.ChunkStatus.HELD, 7, position, CHUNK_BYTES)
            payload, trailer = bytearray(CHUNK_BYTES), bytearray(peer.TRAILER_BYTES)
            link.stream.receive_into(memoryview(payload), soon())
            link.stream.receive_into(memoryview(trailer), soon())
            data = content(index, CHUNK_BYTES)
            assert payload == data
            assert peer.parse_trailer(trailer) == (peer.Verdict.VALID, 7, position, xxhash.xxh3_128_digest(data))
        assert link.is_quiet()
    statistics = server.statistics()
    assert (statistics.served_chunks, statistics.served_bytes, statistics.gone) == (2, 2 * CHUNK_BYTES, 1)


def test_a_get_of_many_chunks_that_are_not_held_is_answered_for_each(server):
    """Also of more than the kernel takes in one call."""
    with linked(server.port) as link:
        missing = [key(CHUNKS + index) for index in range(peer.MAX_KEYS)]
        link.send(peer.Get(7, missing), soon())
        header = memoryview(bytearray(peer.HEADER_BYTES))
        for position in range(len(missing)):
            link.stream.receive_into(header, soon())
            assert peer.parse_header(header) == (peer.ChunkStatus.GONE, 7, position, 0)


def test_validate_gives_the_checksum_of_what_is_still_there(server, store):
    generation = store.ledger.generation(0)
    with linked(server.port) as link:
        ask = peer.Validate([peer.SlotGeneration(0, generation), peer.SlotGeneration(1, 12345)])
        answer = link.request(ask, peer.Validated, soon())
        assert answer.checksums == [xxhash.xxh3_128_digest(content(0, CHUNK_BYTES)), b""]
        store.retract(0)
        assert link.request(ask, peer.Validated, soon()).checksums == [b"", b""]
        even = peer.Validate([peer.SlotGeneration(0, store.ledger.generation(0))])
        assert link.request(even, peer.Validated, soon()).checksums == [b""]


def test_nixl_that_is_not_offered_is_refused(server):
    with linked(server.port) as link, pytest.raises(PeerRefusedError, match="not offered"):
        link.request(peer.NixlAttach(), peer.NixlMetadata, soon())


def test_nixl_places_are_those_of_the_serving_process(store):
    class Serving:
        def describe(self):
            return peer.NixlMetadata(b"meta", 3, 1000, 64)

        def addresses(self, slots):
            return 3, [1000 + slot * CHUNK_BYTES for slot in slots]

    with serving(store, nixl=Serving()) as server, linked(server.port) as link:
        assert link.request(peer.NixlAttach(), peer.NixlMetadata, soon()).metadata == b"meta"
        found = link.request(peer.Resolve([key(1), key(99), key(3)]), peer.Resolved, soon())
    expected = [(1000 + slot * CHUNK_BYTES, CHUNK_BYTES, store.ledger.generation(slot), slot) for slot in (1, 3)]
    first, second = (peer.Place(*place) for place in expected)
    assert found == peer.Resolved(3, [first, None, second])


def test_nixl_that_broke_is_refused_and_the_connection_lives(store):
    class Broken:
        def describe(self):
            raise TransferError("nixl holder process", found="ended with -6")

    with serving(store, nixl=Broken()) as server, linked(server.port) as link:
        with pytest.raises(PeerRefusedError, match="ended with -6"):
            link.request(peer.NixlAttach(), peer.NixlMetadata, soon())
        link.ping(soon())


# -- strangers ---------------------------------------------------------------------------------------------------------


@given(garbage=st.binary(min_size=1, max_size=300))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_garbage_costs_its_connection_only(server, garbage):
    """Whatever a stranger sends first, others are served, and no thread is left behind."""
    with raw(server.port) as stranger, linked(server.port) as link:
        stranger.sendall(garbage)
        with contextlib.suppress(OSError):  # the server was quicker
            stranger.shutdown(socket.SHUT_WR)
        assert read_to_end(stranger) == b""
        link.ping(soon())


@given(message=st.binary(min_size=1, max_size=100))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_garbage_after_a_good_hello_costs_its_connection_only(server, message):
    """A peer that goes mad in the middle of a conversation."""
    with linked(server.port) as mad, linked(server.port) as link:
        with contextlib.suppress(PeerError):
            mad.stream.send_frame(message, soon())
            mad.stream.receive_frame(soon(), peer.FRAME_LIMIT_BYTES)
        link.ping(soon())


@pytest.mark.parametrize(
    "payload",
    [
        pack_frame(b"\xff" * 10),
        b"\xff\xff\xff\xff",
        b"\0\0\0\0",
        pack_frame(peer.encode(peer.Pong(1))),
        pack_frame(peer.encode(peer.Validate([peer.SlotGeneration(CHUNKS, 1)]))),
        pack_frame(peer.encode(OURS)),
    ],
    ids=["no msgpack", "too long", "empty", "an answer", "a slot outside", "hello again"],
)
def test_what_breaks_the_protocol_closes_its_connection_with_one_logged_reason(server, payload, caplog):
    with caplog.at_level(logging.WARNING), linked(server.port) as mad:
        mad.stream.send([payload], soon())
        with pytest.raises(PeerClosedError):
            mad.stream.receive_frame(soon(), peer.FRAME_LIMIT_BYTES)
        assert [record.getMessage().split(" error=")[0] for record in caplog.records] == [
            f"peer connection closed peer={caplog.records[0].args[0]} reason=protocol"
        ]
    assert server.statistics().protocol_errors == 1
    with linked(server.port) as link:
        link.ping(soon())


def test_a_stranger_that_says_nothing_is_closed(store):
    """Half-open connections cannot collect: each has the handshake's time."""
    with serving(store, handshake_timeout_s=0.05) as server, raw(server.port) as stranger:
        assert stranger.recv(1) == b""


def test_a_peer_that_stops_in_the_middle_of_a_request_is_closed(store):
    with serving(store, stall_timeout_s=0.05) as server, linked(server.port) as link:
        link.stream.send([b"\x10\0\0\0half"], soon())
        with pytest.raises(PeerError):
            link.receive(peer.Pong, soon())


def test_an_idle_peer_is_closed_after_a_while(store):
    with serving(store, idle_timeout_s=0.05) as server, linked(server.port) as link:
        assert link.stream.wait_readable(10)
        assert not link.is_quiet()


def test_a_peer_that_does_not_read_what_it_asked_for_is_closed(store):
    """A thread that cannot send waits no longer than the stall time."""
    with serving(store, stall_timeout_s=0.1) as server, linked(server.port) as link:
        serving_thread = next(thread for thread in threading.enumerate() if thread.name.startswith("kvmesh-peer-127"))
        with contextlib.suppress(PeerError):  # closed already, or its buffers are full
            for request in range(200):
                link.send(peer.Get(request, [key(index) for index in range(CHUNKS)] * 16), Deadline(soon().at_s, 1.0))
        serving_thread.join(20)
        assert server.statistics().connections == 0


def test_connections_over_the_limit_are_refused_by_name(store):
    """While those that are there are busy, such as with greeting."""
    with serving(store, max_connections=1) as server, raw(server.port):
        while not server.statistics().connections:
            time.sleep(0.001)
        with pytest.raises(PeerRefusedError, match="full"), linked(server.port):
            pass
        assert server.statistics().refused == 1


def test_idle_connections_make_room_for_others_and_their_owners_do_not_notice(store):
    """More nodes than connections: all of them are served, by turns."""
    pools = [HostPool.create(CHUNKS, CHUNK_BYTES) for _ in range(5)]
    with serving(store, max_connections=2, spare_idle_s=0.0) as server:
        target = PeerTarget(HOLDER, HOLDER_INCARNATION, "127.0.0.1", server.port)
        transports = [TcpTransport(target, OURS, pool, connections=1) for pool in pools]
        for _ in range(3):
            for transport in transports:
                outcomes = transport.fetch(items(CHUNKS), soon())
                assert [outcome.reason for outcome in outcomes] == [None] * CHUNKS
                while not server._idle:  # its thread has not yet come round to waiting
                    time.sleep(0.001)
        assert server.statistics().refused == 0
        for transport in transports:
            transport.close()
    for pool in pools:
        pool.close()


def test_a_connection_that_was_just_used_keeps_its_place(store):
    """Its owner may be about to ask again, and would not know why it was closed."""
    with serving(store, max_connections=1) as server, linked(server.port) as link:
        link.ping(soon())
        with pytest.raises(PeerRefusedError, match="full"), linked(server.port):
            pass
        link.ping(soon())


@pytest.mark.parametrize(
    ("instance_id", "incarnation"), [("another", HOLDER_INCARNATION), (HOLDER, OTHER_INCARNATION), (HOLDER, "")]
)
def test_who_looks_for_another_instance_learns_who_is_here_and_is_closed(server, instance_id, incarnation):
    with raw(server.port) as sock:
        sock.sendall(pack_frame(peer.encode(OURS.wanting(instance_id, incarnation))))
        found = read_to_end(sock)
    assert peer.decode_greeting(found[4:]).incarnation == HOLDER_INCARNATION
    assert server.statistics().refused == 1


def test_another_version_of_the_protocol_is_closed(server):
    with raw(server.port) as sock:
        future = msgspec.structs.replace(OURS.wanting(HOLDER, HOLDER_INCARNATION), protocol=2)
        sock.sendall(pack_frame(peer.encode(future)))
        assert peer.decode_greeting(read_to_end(sock)[4:]).protocol == peer.PROTOCOL_VERSION
    assert server.statistics().protocol_errors == 1


# -- life --------------------------------------------------------------------------------------------------------------


def test_a_connection_that_cannot_be_taken_costs_itself(store, monkeypatch):
    """Whatever it is that goes wrong with it: the port is served for whoever comes next."""
    security, failures = PeerSecurity(), [ValueError("nobody foresaw this")]
    accept = security.accept

    def fail_once(sock, peer):
        if failures:
            raise failures.pop()
        return accept(sock, peer)

    monkeypatch.setattr(PeerSecurity, "accept", lambda self, sock, peer: fail_once(sock, peer))
    with serving(store) as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as first:
            assert first.recv(1) == b""
        with linked(server.port) as link:
            link.ping(soon())


def test_a_busy_port_is_named(server, store):
    other = PeerServer(
        store.pool, store.ledger, store.locate, hello(CHUNK_BYTES), host="127.0.0.1", port=0, lookup_port=server.port
    )
    with pytest.raises(StartupError, match=f":{server.port}"):
        other.start()


def test_a_host_that_is_not_ours_is_named(store):
    with pytest.raises(StartupError, match=r"192\.0\.2\.1:"), serving_at(store, "192.0.2.1"):
        pass


@contextlib.contextmanager
def serving_at(store, host):
    server = PeerServer(store.pool, store.ledger, store.locate, hello(CHUNK_BYTES), host=host, port=0)
    server.start()
    yield


def test_close_ends_every_thread_while_peers_are_connected(store):
    """Idle ones, half-greeted ones, and one that is in the middle of being sent something it does not read."""
    before = set(threading.enumerate())
    server = PeerServer(store.pool, store.ledger, store.locate, hello(CHUNK_BYTES), host="127.0.0.1", port=0)
    server.start()
    with linked(server.port) as idle, linked(server.port) as greedy, raw(server.port):
        idle.ping(soon())
        with contextlib.suppress(PeerError):
            for request in range(100):
                asked = peer.Get(request, [key(index) for index in range(CHUNKS)] * 16)
                greedy.send(asked, Deadline(time.monotonic() + 0.2, 0.2))
        server.close()
        server.close()
        assert set(threading.enumerate()) <= before
        with pytest.raises(PeerError):
            idle.ping(soon())
    assert server.statistics().connections == 0
