"""Peer connections with a cluster key and with TLS: who gets in, and what a hand on the wire can do."""

from __future__ import annotations

import contextlib
import logging
import random
import select
import socket
import ssl
import threading
import time

import pytest

from kvmesh.core.reasons import PEER_FAULTS, MissReason
from kvmesh.errors import PeerAuthenticationError, PeerCancelledError, PeerError, PeerTimeoutError, StartupError
from kvmesh.node.peer_server import PeerServer
from kvmesh.transfer.base import Deadline
from kvmesh.transfer.link import PeerLink, PeerTarget
from kvmesh.transfer.pool import HostPool
from kvmesh.transfer.security import OPEN, PeerSecurity
from kvmesh.transfer.tcp import TcpTransport
from kvmesh.transfer.tls import Tls
from kvmesh.wire import peer
from kvmesh.wire.framing import pack_frame
from support.keys import KEY_TEXT, OTHER_KEY_TEXT, Authority, keyed, needs_openssl
from support.transfer_holder import HOLDER, HOLDER_INCARNATION, Store, content, hello, items, key

CHUNKS, CHUNK_BYTES = 12, (1 << 18) + 4096
OURS = hello(CHUNK_BYTES, "me", "0" * 16)
UNTOUCHED = b"\xa5" * CHUNK_BYTES


def soon(seconds: float = 20.0, stall_s: float = 10.0) -> Deadline:
    return Deadline(time.monotonic() + seconds, stall_s)


def target(port: int) -> PeerTarget:
    return PeerTarget(HOLDER, HOLDER_INCARNATION, "127.0.0.1", port)


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def certified(authority) -> PeerSecurity:
    return PeerSecurity(tls=Tls.load(authority.issue("node")))


@pytest.fixture(params=["key", pytest.param("tls", marks=needs_openssl), pytest.param("both", marks=needs_openssl)])
def security(request) -> PeerSecurity:
    """Each way to secure a connection."""
    tls = None if request.param == "key" else request.getfixturevalue("certified").tls
    return PeerSecurity(key=None if request.param == "tls" else keyed().key, tls=tls)


@contextlib.contextmanager
def serving(store, security, **options):
    ours = hello(CHUNK_BYTES)
    server = PeerServer(
        store.pool, store.ledger, store.locate, ours, host="127.0.0.1", port=0, security=security, **options
    )
    server.start()
    try:
        yield server
    finally:
        server.close()


@contextlib.contextmanager
def fetching(pool, port, security, **options):
    transport = TcpTransport(target(port), OURS, pool, security=security, **options)
    try:
        yield transport
    finally:
        transport.close()


def fetch(transport, pool, deadline=None) -> set[MissReason | None]:
    """All chunks; whatever is called a hit has the right bytes."""
    outcomes = transport.fetch(items(CHUNKS), deadline or soon())
    for index, outcome in enumerate(outcomes):
        if outcome.reason is None:
            assert bytes(pool.row(index)) == content(index, CHUNK_BYTES)
    return {outcome.reason for outcome in outcomes}


class TestMembers:
    @pytest.mark.parametrize("connections", [1, 3])
    def test_chunks_and_lookups_pass(self, store, pool, security, connections):
        with (
            serving(store, security) as server,
            fetching(pool, server.port, security, connections=connections) as transport,
        ):
            assert fetch(transport, pool) == {None}
            link = PeerLink.dial(target(server.port), OURS, soon(), security)
            assert link.lookup([key(0), key(CHUNKS)], soon()) == [True, False]
            link.ping(soon())
            link.close()

    def test_an_idle_connection_is_used_again(self, store, pool, security):
        """Nothing is said on it that nobody asked for, such as TLS session tickets."""
        with serving(store, security) as server, fetching(pool, server.port, security, connections=1) as transport:
            for _ in range(3):
                assert fetch(transport, pool) == {None}
            assert transport.statistics().connects == 1

    def test_missing_chunks_are_told(self, store, pool, security):
        """Headers without payload are numbered too."""
        store.forget(2)
        try:
            with serving(store, security) as server, fetching(pool, server.port, security) as transport:
                outcomes = [outcome.reason for outcome in transport.fetch(items(CHUNKS), soon())]
                assert outcomes[:3] == [None, None, MissReason.EVICTED]
                assert {None, MissReason.EVICTED} <= fetch(transport, pool)
        finally:
            store.publish(2, 2)

    def test_a_stopped_peer_is_given_up(self, security):
        """Also in the middle of a handshake, whichever it is."""
        with socket.create_server(("127.0.0.1", 0)) as silent:
            port = silent.getsockname()[1]
            with pytest.raises(PeerTimeoutError):
                PeerLink.dial(target(port), OURS, soon(stall_s=0.05), security)

    def test_a_call_that_waits_can_be_cancelled(self, store, security):
        """From another thread, as when a transport is closed."""
        with serving(store, security) as server:
            link = PeerLink.dial(target(server.port), OURS, soon(), security)
            timer = threading.Timer(0.05, link.shut_down)
            timer.start()
            with pytest.raises(PeerCancelledError):
                link.receive_pong(soon(stall_s=20.0))
            timer.join()
            link.close()

    def test_many_at_once(self, store, pool, security):
        """Where there is no room the next one is a miss at once, and served when there is; nobody hangs."""
        with serving(store, security, max_connections=1) as server:
            with fetching(pool, server.port, security, connections=1) as first:
                assert fetch(first, pool) == {None}
                with fetching(pool, server.port, security, connections=1) as second:
                    fetch(second, pool)
            wait_until(lambda: server.statistics().connections == 0)
            with fetching(pool, server.port, security, connections=1) as third:
                assert fetch(third, pool) == {None}


class TestStrangers:
    @pytest.mark.parametrize(
        ("holder", "fetcher"),
        [(keyed(), OPEN), (OPEN, keyed()), (keyed(), keyed(OTHER_KEY_TEXT))],
        ids=["fetcher without a key", "holder without a key", "another key"],
    )
    def test_a_stranger_gets_nothing(self, store, pool, caplog, holder, fetcher):
        """Every chunk is a miss with the reason, no slot is touched, and both sides say so, once."""
        caplog.set_level(logging.WARNING)
        with serving(store, holder) as server, fetching(pool, server.port, fetcher) as transport:
            for _ in range(3):
                assert fetch(transport, pool) == {MissReason.UNAUTHENTICATED}
            wait_until(lambda: server.statistics().unauthenticated >= 3)
            assert server.statistics().served_chunks == 0
        assert all(bytes(pool.row(slot)) == UNTOUCHED for slot in range(CHUNKS))
        said = [record.message for record in caplog.records if "unauthenticated" in record.message]
        assert sum(line.startswith("peer refused") for line in said) == 1  # the holder's
        assert sum(line.startswith("peer failed") for line in said) == 1  # the fetcher's
        assert all("key" in line for line in said)
        assert KEY_TEXT not in str(caplog.text)

    def test_nothing_is_answered_before_the_proof(self, store):
        """A request, or a Hello once more, where the Proof is due: the connection is closed."""
        for payload in (peer.encode(peer.Get(1, [key(0)])), peer.encode(OURS), peer.encode(peer.Ping(1)), b"\x00"):
            with serving(store, keyed()) as server, socket.create_connection(("127.0.0.1", server.port)) as sock:
                ours = OURS.wanting(HOLDER, HOLDER_INCARNATION)
                sock.sendall(pack_frame(peer.encode(keyed().challenge(ours))) + pack_frame(payload))
                said = read_to_end(sock)
                assert peer.decode_hello(said[4:])  # and nothing after it

    def test_a_holder_that_cannot_prove_itself_is_not_asked(self):
        """Something that speaks the protocol but has not the key gets no key of ours to see, and no chunk is taken."""
        heard = []

        def answer(sock: socket.socket) -> None:
            heard.append(sock.recv(1 << 16))
            sock.sendall(pack_frame(peer.encode(keyed().challenge(hello(CHUNK_BYTES)))))
            heard.append(sock.recv(1 << 16))
            sock.sendall(pack_frame(peer.encode(peer.Proof(bytes(32)))))
            heard.append(sock.recv(1 << 16))

        with liar(answer) as port, pytest.raises(PeerAuthenticationError):
            PeerLink.dial(target(port), OURS, soon(), keyed())
        assert heard[2] == b""

    def test_the_reason_is_one_that_opens_the_breaker(self):
        assert MissReason.UNAUTHENTICATED in PEER_FAULTS


@pytest.fixture(scope="module")
def foreign(tmp_path_factory) -> PeerSecurity:
    """With certificates of a CA that is not ours."""
    return PeerSecurity(tls=Tls.load(Authority(tmp_path_factory.mktemp("other"), "other").issue("stranger")))


@needs_openssl
class TestCertificates:
    def test_a_certificate_of_another_ca_is_refused(self, store, pool, certified, foreign):
        for holder, fetcher in ((certified, foreign), (foreign, certified)):
            with serving(store, holder) as server, fetching(pool, server.port, fetcher) as transport:
                assert fetch(transport, pool) == {MissReason.UNAUTHENTICATED}
                assert server.statistics().served_chunks == 0

    def test_a_client_without_a_certificate_is_refused(self, store, certified, authority):
        context = ssl.create_default_context(cafile=authority.ca_file)
        context.check_hostname = False
        with serving(store, certified) as server, socket.create_connection(("127.0.0.1", server.port)) as sock:
            with contextlib.suppress(ssl.SSLError, ConnectionError), context.wrap_socket(sock) as wrapped:
                wrapped.sendall(pack_frame(peer.encode(OURS.wanting(HOLDER, HOLDER_INCARNATION))))
                assert wrapped.recv(1) == b""
            wait_until(lambda: server.statistics().unauthenticated == 1)

    def test_tls_on_one_side_only_is_told(self, store, pool, certified):
        """Neither waits for the other for ever, and the one with TLS names it."""
        with serving(store, certified, handshake_timeout_s=0.5) as server:
            with fetching(pool, server.port, OPEN) as transport:
                assert None not in fetch(transport, pool)
            wait_until(lambda: server.statistics().unauthenticated == 1)
        with serving(store, OPEN) as server, fetching(pool, server.port, certified) as transport:
            assert fetch(transport, pool) == {MissReason.PEER_LOST}  # a peer that dies just then looks the same
            assert "TLS" in transport.statistics().last_error

    def test_a_slow_handshake_holds_up_nobody_else(self, store, pool, certified):
        """Handshakes run in the connections' threads, not in the one that accepts."""
        with serving(store, certified) as server, contextlib.ExitStack() as stack:
            for _ in range(3):
                stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            with fetching(pool, server.port, certified) as transport:
                assert fetch(transport, pool) == {None}

    def test_bad_files_stop_the_start(self, authority, tmp_path):
        good = authority.issue("good")
        (tmp_path / "empty").touch()
        for files, said in (
            (good._replace(cert_file=str(tmp_path / "none")), "tls_cert_file"),
            (good._replace(key_file=authority.issue("another").key_file), "tls_key_file"),
            (good._replace(ca_file=str(tmp_path / "empty")), "tls_ca_file"),
        ):
            with pytest.raises(StartupError, match=said):
                Tls.load(files)


class TestHandOnTheWire:
    """Somebody between the two, who changes, repeats or leaves out bytes, but has not the key."""

    @pytest.mark.parametrize("seed", range(20))
    def test_changed_bytes_are_never_taken(self, store, pool, seed):
        """One byte of what the holder sends, anywhere: a miss, never a wrong hit."""
        chosen = random.Random(seed)
        place = chosen.randrange(1, CHUNKS * (CHUNK_BYTES + 72))
        if seed < 8:  # headers and trailers, which are few
            place = 600 + chosen.randrange(4) * (CHUNK_BYTES + 72) + chosen.randrange(72)
        spoil = spoiler(place)
        with serving(store, keyed()) as server, proxy(server.port, spoil) as port:
            with fetching(pool, port, keyed(), connections=1) as transport:
                found = fetch(transport, pool, soon(stall_s=0.5))
            assert found & {MissReason.UNAUTHENTICATED, MissReason.CORRUPT, MissReason.PROTOCOL} or found - {None} <= {
                MissReason.PEER_STALLED,  # a length that was made longer
                MissReason.TRUNCATED,
                MissReason.PEER_LOST,
            }

    def test_a_repeated_request_is_refused(self, store):
        """The frames of a whole conversation, sent again on the same connection and on a new one."""
        heard: list[bytes] = []
        with serving(store, keyed()) as server:
            with proxy(server.port, to_holder=lambda data: heard.append(data) or data) as port:
                link = PeerLink.dial(target(port), OURS, soon(), keyed())
                link.ping(soon())
                last = heard[-1]
                link.stream._socket.sendall(last)  # as the hand on the wire would
                with pytest.raises(PeerError):
                    link.receive_pong(soon())
                link.close()
            wait_until(lambda: server.statistics().unauthenticated == 1)
            with socket.create_connection(("127.0.0.1", server.port)) as sock:
                sock.sendall(b"".join(heard))
                read_to_end(sock)
            wait_until(lambda: server.statistics().unauthenticated == 2)


# -- helpers -----------------------------------------------------------------------------------------------------------


def wait_until(condition, timeout_s: float = 10.0) -> None:
    until_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until_s
        time.sleep(0.002)


def read_to_end(sock) -> bytes:
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while data := sock.recv(65536):
            found += data
    return found


def spoiler(place: int):
    """Changes the byte at one place of a stream."""
    seen = 0

    def spoil(data: bytes) -> bytes:
        nonlocal seen
        offset, seen = place - seen, seen + len(data)
        if 0 <= offset < len(data):
            data = data[:offset] + bytes([data[offset] ^ 1]) + data[offset + 1 :]
        return data

    return spoil


@contextlib.contextmanager
def liar(answer):
    """A port whose one connection is handled by `answer`."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def run() -> None:
            sock, _ = listener.accept()
            with sock:
                answer(sock)

        thread = threading.Thread(target=run)
        thread.start()
        yield listener.getsockname()[1]
        thread.join(10)
        assert not thread.is_alive()


@contextlib.contextmanager
def proxy(port: int, to_fetcher=lambda data: data, to_holder=lambda data: data):
    """A port that passes all bytes of all connections on, through the two functions."""
    over = threading.Event()

    def carry(client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", port)) as server:
            ways = {client: (server, to_holder), server: (client, to_fetcher)}
            while not over.is_set():
                for source in select.select(list(ways), [], [], 0.05)[0]:
                    sink, change = ways[source]
                    try:
                        data = source.recv(1 << 16)
                        if not data:
                            return
                        sink.sendall(change(data))
                    except OSError:
                        return

    def accept() -> None:
        while not over.is_set():
            if select.select([listener], [], [], 0.05)[0]:
                thread = threading.Thread(target=carry, args=(listener.accept()[0],))
                thread.start()
                threads.append(thread)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threads = [threading.Thread(target=accept)]
        threads[0].start()
        try:
            yield listener.getsockname()[1]
        finally:
            over.set()
            for thread in threads:
                thread.join(10)
