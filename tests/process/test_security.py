"""A cluster with a key, and with certificates: members share, strangers stay out and are named, nobody else suffers."""

from __future__ import annotations

import json
import logging
import os
import random
import re
import socket
import ssl
import threading
from collections.abc import Iterator

import httpx
import pytest
import zmq
from pydantic import SecretStr

from kvmesh.bench.cluster import Controller, wait_healthy
from kvmesh.bench.stand_in import StandInEngine, make_key
from kvmesh.config import TlsFiles
from kvmesh.core.reasons import MissReason
from kvmesh.errors import StartupError
from kvmesh.transfer.nixl_agent import unavailable
from kvmesh.wire import directory as wire
from kvmesh.wire.auth import ClusterKey
from kvmesh.wire.curve import CurveKeys, secure_node
from process.controller_nodes import wait_for
from support.keys import KEY_TEXT, OTHER_KEY_TEXT, Authority, needs_openssl
from support.stand_ins import make_config, running_controller, running_engine
from unit.controller.makers import make_member

pytestmark = [pytest.mark.process, pytest.mark.timeout(120)]

KEYS = [make_key(f"secured-{number}") for number in range(8)]
VARIABLE = "KVMESH_CLUSTER_KEY"


@pytest.fixture(autouse=True)
def no_key_around(monkeypatch):
    """These tests say themselves who has which key."""
    monkeypatch.delenv(VARIABLE, raising=False)


@pytest.fixture(scope="module")
def controller(tmp_path_factory) -> Iterator[Controller]:
    """A controller with the key, by file."""
    folder = tmp_path_factory.mktemp("keyed")
    file = folder / "cluster.key"
    file.touch(0o600)
    file.write_text(KEY_TEXT + "\n")
    with running_controller(folder, arguments=("--cluster-key-file", str(file)), env={VARIABLE: ""}) as running:
        yield running


@pytest.fixture(scope="module")
def open_controller(tmp_path_factory) -> Iterator[Controller]:
    with running_controller(tmp_path_factory.mktemp("open"), env={VARIABLE: ""}) as running:
        yield running


def config(controller: Controller, name: str, key: str | None = KEY_TEXT, **changed: object):
    secret = None if key is None else SecretStr(key)
    return make_config(controller, f"{name}-{os.urandom(3).hex()}", cluster_key=secret, **changed)


def share(left: StandInEngine, right: StandInEngine, names: list[bytes] = KEYS) -> None:
    """What one stores the other fetches, every byte right."""
    left.put(names)
    assert right.wait_visible(names)
    got = right.get(names)
    assert (got.fetched, got.wrong, got.misses) == (len(names), 0, {})


def refused(controller: Controller) -> float:
    text = httpx.get(f"{controller.url}/metrics").text
    return sum(map(float, re.findall(r"^kvmesh_controller_refused_handshakes_total.* (\S+)$", text, re.MULTILINE)))


@pytest.mark.parametrize(
    "channel",
    [
        "tcp",
        pytest.param("nixl", marks=[pytest.mark.nixl, pytest.mark.skipif(bool(unavailable()), reason="no NIXL")]),
    ],
)
@pytest.mark.parametrize("heartbeat", [False, True], ids=["two sockets", "three sockets"])
def test_members_share(controller, channel, heartbeat):
    """Chunks travel under a cluster key as they do without one, whichever sockets are used."""
    changed: dict[str, object] = {"transfer_channel": channel}
    if heartbeat:
        changed["controller_heartbeat_url"] = f"tcp://127.0.0.1:{controller.heartbeat_port}"
    with (
        running_engine(config(controller, "left", **changed)) as left,
        running_engine(config(controller, "right", **changed)) as right,
    ):
        assert left.wait_peers(1)
        assert right.wait_peers(1)
        share(left, right)


@pytest.mark.parametrize(
    ("key", "node_says", "controller_says"),
    [
        (OTHER_KEY_TEXT, "most likely it has another cluster key", "its cluster key is another one"),
        (None, "it wants a cluster key", "it has no cluster key"),
    ],
    ids=["another key", "no key"],
)
def test_a_stranger_sees_nobody_and_is_named(controller, capfd, key, node_says, controller_says):
    """It stays out, both logs say why, once (the node twice at most: a guess, then what it knows), and the members do
    not notice.
    """
    before = refused(controller)
    with (
        running_engine(config(controller, "left")) as left,
        running_engine(config(controller, "right")) as right,
        running_engine(config(controller, "stranger", key)) as stranger,
    ):
        assert left.wait_peers(1)
        assert right.wait_peers(1)
        wait_for(lambda: refused(controller) >= before + 4)
        share(left, right)
        assert not stranger.wait_peers(1, timeout_s=0.0)
        assert not any(stranger.node.is_visible(name) for name in KEYS)
        assert stranger.get(KEYS).misses == {MissReason.NOT_PUBLISHED: len(KEYS)}
        assert left.node.state.peers == right.node.state.peers == 1
        listed = {instance["instance_id"] for instance in controller.instances() if instance["state"] == "up"}
        assert not any(str(name).startswith("stranger") for name in listed)
    lines = capfd.readouterr().err.splitlines()
    complaints = [line for line in lines if "does not accept this node" in line]
    assert len(complaints) in {1, 2}, lines
    assert any(node_says in line for line in complaints), lines
    told = re.findall(r"event=handshake_refused.*", controller.log())
    assert any(controller_says in line and re.search(r" peer=(127\.0\.0\.1:|unknown)", line) for line in told)
    assert KEY_TEXT not in controller.log() + "".join(lines)


def test_a_node_with_a_key_stays_out_of_a_cluster_without_one(open_controller, capfd):
    """The reverse: it does not fall back to an open connection."""
    with (
        running_engine(config(open_controller, "open", None)) as member,
        running_engine(config(open_controller, "keyed")) as stranger,
    ):
        assert not stranger.wait_peers(1, timeout_s=2.0)
        assert member.node.state.peers == 0
    assert re.search(r"the controller does not accept this node .*: .* none", capfd.readouterr().err)


def test_a_node_is_let_in_once_the_controller_has_the_key(tmp_path):
    """A refused node tries again for ever, so that mending the controller is enough."""
    with running_controller(tmp_path, env={VARIABLE: ""}) as first:
        settings = config(first, "patient", heartbeat_interval_s=0.5)
        with running_engine(settings) as engine:
            wait_for(lambda: "event=handshake_refused" in first.log())
            first.stop()
            first.env = {VARIABLE: KEY_TEXT}
            first.start()
            wait_healthy(first, timeout_s=60)
            wait_for(lambda: [one for one in first.instances() if one["instance_id"] == settings.instance_id])
            assert engine.node.state.alive


def test_the_right_controller_key_with_another_client_key_is_refused(controller):
    """Knowing the controller's public key, which travels with nobody's consent, is not enough."""
    ours, other = (CurveKeys.derive(ClusterKey(text)) for text in (KEY_TEXT, OTHER_KEY_TEXT))
    mixed = ours._replace(node_public=other.node_public, node_secret=other.node_secret)
    context = zmq.Context()
    try:
        answers = []
        for keys, name in ((mixed, "mixed"), (ours, "member")):
            dealer = context.socket(zmq.DEALER)
            dealer.linger = 0
            secure_node(dealer, keys)
            dealer.connect(f"tcp://127.0.0.1:{controller.reply_port}")
            dealer.send(wire.encode(wire.Register(make_member(name, peer_port=1))))
            answers.append(dealer.poll(500 if name == "mixed" else 10_000))
        assert answers == [0, zmq.POLLIN]
    finally:
        context.destroy(linger=0)


def test_garbage_at_every_port_disturbs_nobody(controller):
    """1,000 random frames at each port of controller and node, while members share."""
    with (
        running_engine(config(controller, "left")) as left,
        running_engine(config(controller, "right")) as right,
    ):
        assert left.wait_peers(1)
        assert right.wait_peers(1)
        node = json.loads(httpx.get(f"{controller.url}/api/v1/instances").text)["instances"]
        ports = [controller.port, controller.pull_port, controller.reply_port, controller.heartbeat_port]
        ports += [int(str(one["peer_address"]).rpartition(":")[2]) for one in node if one["state"] == "up"]
        throwers = [threading.Thread(target=throw_garbage, args=(port, port)) for port in ports]
        for thrower in throwers:
            thrower.start()
        for round_number in range(5):
            share(left, right, [make_key(f"under fire {round_number}-{number}") for number in range(4)])
        for thrower in throwers:
            thrower.join()
        share(left, right, [make_key(f"afterwards-{number}") for number in range(4)])
        assert left.node.restarts == right.node.restarts == 0
        assert controller.is_running()


def throw_garbage(port: int, seed: int) -> None:
    """Random bytes, some of them beginning as this port's protocol does."""
    chosen = random.Random(seed)
    openings = (
        b"",
        b"\xff\0\0\0\0\0\0\0\1\x7f\x03\x00CURVE" + bytes(15) + bytes(32),
        b"\x40\0\0\0",
        b"GET / HTTP/1.1\r\n",
    )
    for _ in range(50):
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=5) as sock:
                sock.sendall(chosen.choice(openings))
                for _ in range(20):
                    sock.sendall(chosen.randbytes(chosen.randrange(1, 300)))
        except OSError:  # noqa: PERF203 - each connection by itself
            continue  # it has hung up: that is its right


# -- certificates ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority(tmp_path_factory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


def tls(files: TlsFiles) -> dict[str, object]:
    return {"tls_cert_file": files.cert_file, "tls_key_file": files.key_file, "tls_ca_file": files.ca_file}


@needs_openssl
@pytest.mark.parametrize(
    "channel",
    [
        "tcp",
        pytest.param("nixl", marks=[pytest.mark.nixl, pytest.mark.skipif(bool(unavailable()), reason="no NIXL")]),
    ],
)
def test_members_share_inside_tls(controller, authority, channel):
    settings = [
        config(controller, name, transfer_channel=channel, admin_port=0, **tls(authority.issue(name)))
        for name in ("left", "right")
    ]
    with running_engine(settings[0]) as left, running_engine(settings[1]) as right:
        assert left.wait_peers(1)
        assert right.wait_peers(1)
        share(left, right)
        ready = left.node.ready
        assert ready is not None
        context = ssl.create_default_context(cafile=authority.ca_file)
        page = httpx.get(f"https://127.0.0.1:{ready.admin_port}/metrics", verify=context)
        assert "kvmesh_node_served_chunks_total 8.0" in page.text


@needs_openssl
def test_a_certificate_of_another_ca_is_no_peer(controller, authority, tmp_path):
    """It has the cluster key, so it is a member; but nobody gives it chunks."""
    other = Authority(tmp_path, "other").issue("stranger")
    with (
        running_engine(config(controller, "left", **tls(authority.issue("member")))) as left,
        running_engine(config(controller, "stranger", **tls(other))) as stranger,
    ):
        assert left.wait_peers(1)
        assert stranger.wait_peers(1)
        names = [make_key(f"certified-{number}") for number in range(4)]
        left.put(names)
        assert stranger.wait_visible(names)
        misses = stranger.get(names).misses
        assert set(misses) <= {MissReason.UNAUTHENTICATED, MissReason.BREAKER_OPEN, MissReason.TRUNCATED}, misses


@needs_openssl
def test_the_controllers_page_by_https(authority, tmp_path):
    files = authority.issue("controller")
    arguments = ("--tls-cert-file", files.cert_file, "--tls-key-file", files.key_file)
    with running_controller(tmp_path, arguments=arguments, scheme="https") as controller:
        context = ssl.create_default_context(cafile=authority.ca_file)
        assert httpx.get(f"{controller.url}/api/v1/totals", verify=context).status_code == 200
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"http://127.0.0.1:{controller.port}/healthz")


def test_a_certificate_that_is_none_stops_the_start(controller, tmp_path):
    """In one sentence that names the file."""
    (tmp_path / "nothing.pem").touch()
    files = TlsFiles(*[str(tmp_path / "nothing.pem")] * 3)
    with pytest.raises(StartupError, match=r"nothing\.pem"), running_engine(config(controller, "bad", **tls(files))):
        pass


def test_logging_is_quiet_about_secrets(controller, caplog):
    """Not even at the most talkative level."""
    caplog.set_level(logging.DEBUG)
    settings = config(controller, "talkative", log_level="debug")
    logging.getLogger("test").debug("%s %r", settings, settings)
    assert KEY_TEXT not in caplog.text
