"""Checks that connect to something: to a control socket, to Redis, to a peer port. Each against a small server here."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

import msgspec
import pytest
import zmq

from kvmesh.client import Instance, Refusal
from kvmesh.core.format import Format
from kvmesh.doctor import peers, redis, sockets
from kvmesh.doctor.findings import Level
from kvmesh.doctor.sockets import Handshake, shake_hands
from kvmesh.node.peer_server import PeerServer
from kvmesh.transfer.security import PeerSecurity
from kvmesh.wire.auth import ClusterKey
from kvmesh.wire.curve import CurveKeys, secure_controller
from support.fake_controller import FORMAT_FIELDS
from support.keys import KEY_TEXT, OTHER_KEY_TEXT, keyed
from support.transfer_holder import HOLDER, HOLDER_INCARNATION, Store, hello
from unit.doctor.makers import make_cluster, make_config, make_situation, member, told

KEY, OTHER = ClusterKey(KEY_TEXT), ClusterKey(OTHER_KEY_TEXT)


@contextlib.contextmanager
def control_socket(key: ClusterKey | None, kind: int = zmq.ROUTER) -> Iterator[str]:
    context = zmq.Context()
    router = context.socket(kind)
    if key is not None:
        secure_controller(router, CurveKeys.derive(key))
    router.bind("tcp://127.0.0.1:0")
    try:
        yield router.getsockopt_string(zmq.LAST_ENDPOINT)
    finally:
        context.destroy(linger=0)


@pytest.mark.parametrize(
    ("there", "here", "result"),
    [
        (None, None, Handshake.MADE),
        (None, KEY, Handshake.KEY_MISSING_THERE),
        (KEY, None, Handshake.KEY_MISSING_HERE),
        (KEY, OTHER, Handshake.REFUSED),
    ],
)
def test_handshakes(there, here, result):
    """Each with ZMQ itself; what it means is told with a way out."""
    with control_socket(there) as url:
        assert shake_hands(url, zmq.DEALER, here, 5.0) is result
    found = sockets.handshake_finding("pull", result, has_key=here is not None)
    assert (found.level is Level.OK) == (result is Handshake.MADE)


@pytest.mark.parametrize("key", [None, KEY])
def test_a_socket_without_a_key_says_so_in_its_greeting(key):
    """However early it hangs up on somebody with a key."""
    with control_socket(key) as url:
        assert sockets.speaks_without_key(url, 5.0) == (key is None)


@pytest.mark.parametrize("name", sockets.SOCKETS)
def test_each_control_socket_is_connected_to_by_its_own_kind(name):
    """A controller's event socket is no request socket, and takes no handshake of one."""
    with control_socket(KEY, zmq.PULL if "pull" in name else zmq.ROUTER) as url:
        assert shake_hands(url, sockets.SOCKETS[name], KEY, 5.0) is Handshake.MADE


def test_a_control_port_that_is_closed_or_somebody_elses():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        config = make_config(controller_pull_url=f"tcp://127.0.0.1:{port}", controller_reply_url=None)
        (found,) = sockets.check(make_situation(config=config))
        assert found.level is Level.PROBLEM
        assert "says nothing" in found.message
    (found,) = sockets.check(make_situation(config=config))
    assert (found.check, found.level) == ("key.socket", Level.PROBLEM)


def test_who_was_turned_away_is_told():
    """By name while it tries; later, that there was somebody."""
    found = list(sockets.turned_away(make_cluster(refused_handshakes=3)))
    assert told(found) == [("key.refused", Level.WARNING)]
    assert "3 connections" in found[0].message
    refusals = [Refusal("10.0.0.7", "its cluster key is another one", 9, 2.0), Refusal("b", "id taken", 1, 2.0)]
    found = list(sockets.turned_away(make_cluster(refused_handshakes=3, refusals=refusals)))
    assert told(found) == [("key.refused", Level.PROBLEM), ("member.refused", Level.PROBLEM)]
    assert (found[0].about, "9 times" in found[0].message) == ("10.0.0.7", True)


# -- Redis -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def redis_server(*answers: bytes) -> Iterator[tuple[str, list[bytes]]]:
    """Answers one connection, command by command."""
    heard: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):
                connection, _ = listener.accept()
                with connection:
                    for answer in answers:
                        heard.append(connection.recv(4096))
                        connection.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}", heard
        thread.join(5)


def levels(url: str) -> list[Level]:
    return [one.level for one in redis.reachable(url, 5.0)]


def test_a_redis_that_answers():
    with redis_server(b"+PONG\r\n") as (address, heard):
        assert levels(f"redis://{address}") == [Level.OK]
    assert heard == [b"*1\r\n$4\r\nPING\r\n"]


def test_a_password_is_sent_and_never_shown():
    with redis_server(b"-WRONGPASS invalid\r\n") as (address, heard):
        (found,) = redis.reachable(f"redis://me:se%3Acret@{address}", 5.0)
    assert heard == [b"*3\r\n$4\r\nAUTH\r\n$2\r\nme\r\n$7\r\nse:cret\r\n"]
    assert found.level is Level.PROBLEM
    assert "cret" not in f"{found}"


@pytest.mark.parametrize("answer", [b"-NOAUTH Authentication required.\r\n", b"HTTP/1.1 400 Bad Request\r\n", b""])
def test_another_answer(answer):
    with redis_server(answer) as (address, _):
        assert levels(f"redis://{address}") == [Level.PROBLEM]


def test_no_redis():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        assert levels(f"127.0.0.1:{unused.getsockname()[1]}") == [Level.PROBLEM]
    assert told(list(redis.check(make_situation()))) == [("redis.reachable", Level.SKIPPED)]


def test_every_server_of_a_cluster_and_its_sentinels(tmp_path):
    """With the ports that they have unless it is said, and the password that is theirs."""
    file = tmp_path / "password"
    file.write_text("secret\n")
    several = redis.servers(f"rediss+cluster://a,[::1]:7000?password_file={file}&ca_file=ca.pem")
    assert [(one.host, one.port, one.tls, one.password) for one in several] == [
        ("a", 6379, True, "secret"),
        ("::1", 7000, True, "secret"),
    ]
    (sentinel,) = redis.servers("redis+sentinel://me:masters@s/mymaster")
    assert (sentinel.port, sentinel.user, sentinel.password) == (26379, "", "")
    assert levels("redis+cluster://:hidden@/no") == [Level.PROBLEM]
    assert levels(f"redis://a?password_file={tmp_path / 'none'}") == [Level.PROBLEM]


# -- peers -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def peer_server(security: PeerSecurity) -> Iterator[str]:
    """A real one, of the instance HOLDER; the address that it listens on."""
    store = Store(1, 1 << 16)
    server = PeerServer(
        store.pool, store.ledger, store.locate, hello(1 << 16), host="127.0.0.1", port=0, security=security
    )
    server.start()
    try:
        yield f"127.0.0.1:{server.port}"
    finally:
        server.close()
        store.close()


def holder(address: str, **changed: object) -> Instance:
    fields = msgspec.to_builtins(hello(1 << 16).format)
    shown = {"format_id": "c7" * 16, "model_name": fields["model_name"], "fields": fields}
    return member(HOLDER, **({"incarnation": HOLDER_INCARNATION, "peer_address": address, "format": shown} | changed))


@pytest.mark.parametrize(
    ("there", "here", "check", "level"),
    [
        (PeerSecurity(), None, "peer.reachable", Level.OK),
        (keyed(), KEY, "peer.reachable", Level.OK),
        (keyed(), OTHER, "peer.key", Level.PROBLEM),
        (PeerSecurity(), KEY, "peer.key", Level.PROBLEM),
        (keyed(), None, "peer.key", Level.SKIPPED),  # nobody has told this command the key
    ],
)
def test_a_member_is_greeted_as_a_node_does_it(there, here, check, level):
    with peer_server(there) as address:
        cluster = make_cluster(holder(address))
        found = list(peers.check(make_situation(cluster=cluster, cluster_key=here, timeout_s=5.0)))
    assert told(found) == [(check, level)]


def test_an_instance_without_the_key_that_its_peers_have_is_a_problem():
    with peer_server(keyed()) as address:
        situation = make_situation(cluster=make_cluster(holder(address)), config=make_config(), timeout_s=5.0)
        assert told(list(peers.check(situation))) == [("peer.key", Level.PROBLEM)]


def test_another_node_at_the_advertised_address():
    """Here, what is advertised leads to somebody else: each machine has a 127.0.0.1 of its own."""
    with peer_server(PeerSecurity()) as address:
        found = peers.ask(holder(address, instance_id="b"), PeerSecurity(), make_situation(timeout_s=5.0))
    assert (found.check, found.level) == ("address.loopback", Level.PROBLEM)
    assert "another node is there" in found.message


def test_members_that_advertise_one_address():
    """Such as 127.0.0.1:8200 on two machines."""
    found = list(peers.shared_addresses([member("a"), member("b"), member("c", peer_address="10.0.0.3:8200")]))
    assert told(found) == [("address.shared", Level.PROBLEM)]
    assert found[0].about == "a, b"


def test_a_member_that_cannot_be_connected_to():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        loopback = peers.ask(member("a", peer_address=address), keyed(), make_situation())
    assert (loopback.check, loopback.level) == ("address.loopback", Level.PROBLEM)
    elsewhere = peers.unreachable(member("a", peer_address="10.9.9.9:8200"), "refused: nothing listens there")
    assert (elsewhere.check, elsewhere.level) == ("peer.unreachable", Level.PROBLEM)
    assert "10.9.9.9:8200" in elsewhere.advice


def test_a_member_that_accepts_and_says_nothing():
    """As a stopped process does: the kernel takes the connection."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        found = peers.ask(member("a", peer_address=address), keyed(), make_situation(timeout_s=0.1))
    assert (found.check, found.level) == ("peer.stopped", Level.PROBLEM)


def test_a_member_of_a_later_version_is_not_asked():
    later = member("a", format={"format_id": "c7" * 16, "model_name": "x", "fields": {"colour": "blue"}})
    assert peers.ask(later, keyed(), make_situation()).level is Level.SKIPPED


def test_formats_of_the_tests_are_whole():
    assert set(FORMAT_FIELDS) == set(Format.__struct_fields__)
