"""A real controller process, talked to over real sockets."""

from __future__ import annotations

import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time

import httpx
import msgspec
import pytest
import zmq

from kvmesh.wire import directory as wire
from process.controller_nodes import FAST, IMPATIENT, ControllerProcess, Node, running_controller, secure, wait_for
from unit.controller.makers import make_format, make_keys, make_member

pytestmark = pytest.mark.process
ONE_AND_OTHER = (("a", 1), ("b", 2))


@pytest.fixture(scope="module")
def controller():
    with running_controller() as made:
        yield made


@pytest.fixture
def context():
    made = zmq.Context()
    yield made
    made.destroy(linger=0)


@pytest.fixture
def make_node(controller, context):
    """Nodes with ids of their own, which leave at the end."""
    nodes: list[Node] = []

    def make(**changes: object) -> Node:
        port = 10_000 + secrets.randbelow(50_000)
        member = make_member(f"{secrets.token_hex(4)}-{len(nodes)}", **{"peer_port": port, **changes})
        nodes.append(Node(context, controller.ports, member))
        return nodes[-1]

    yield make
    for node in nodes:
        node.say(wire.Leave(*node.who))
        node.send_beat()
        node.expect(wire.HeartbeatAck)


def ids(controller: ControllerProcess) -> set[str]:
    return {instance["instance_id"] for instance in controller.get("/api/v1/instances")["instances"]}


class TestDirectory:
    def test_inventory_changes_and_departure_reach_the_other(self, make_node):
        """The whole way: register, snapshot, changes both ways, leave."""
        a, b = make_node(), make_node()
        a.inventory = make_keys(5)
        a.register()
        registered = b.register()
        assert registered.heartbeat_interval_s == pytest.approx(0.2)
        b.expect_holders(make_keys(5)[4], a.who[0])
        a.change(added=make_keys(3, "new"), removed=make_keys(1))
        b.expect_holders(make_keys(3, "new")[2], a.who[0])
        b.expect_holders(make_keys(1)[0])
        b.change(added=make_keys(5))
        a.expect_holders(make_keys(5)[4], b.who[0])
        assert a.beat().known
        b.say(wire.Leave(*b.who))
        assert a.expect(wire.MemberDown).reason == "left"

    def test_large_inventory(self, make_node):
        """More than one part up, more than one part down."""
        a, b = make_node(), make_node()
        a.register()
        keys = make_keys(45_000)
        a.sequence, a.inventory = 7, keys
        for start in range(0, len(keys), wire.MAX_KEYS_PER_MESSAGE):
            part = keys[start : start + wire.MAX_KEYS_PER_MESSAGE]
            a.tell(wire.Snapshot(*a.who, 7, part, start == 0, start + wire.MAX_KEYS_PER_MESSAGE >= len(keys)))
        b.register()
        wait_for(lambda: b.drain(20) or len(b.replica.keys_of(a.who[0])) == len(keys))
        assert b.replica.sequence(a.who[0]) == 7

    def test_formats_do_not_mix(self, make_node, controller):
        """Members of another format are told of each other, but not of their chunks; the API names the field."""
        a, b = make_node(), make_node(format=make_format(chunk_tokens=128))
        a.register()
        assert a.who[0] in {member.instance_id for member in b.register().members}
        a.change(added=make_keys(2))
        c = make_node()
        c.register()
        c.expect_holders(make_keys(2)[0], a.who[0])
        assert b.beat().known
        b.drain()
        assert not any(isinstance(notice, (wire.Changes, wire.Snapshot)) for notice in b.notices)
        seen = controller.get(f"/api/v1/instances/{a.who[0]}")["incompatible_with"]
        (entry,) = [other for other in seen if other["instance_id"] == b.who[0]]
        assert entry["same_model"]
        assert {"field": "chunk_tokens", "ours": "256", "theirs": "128"} in entry["fields"]

    def test_gap_is_made_good(self, make_node):
        """A lost batch: the publisher is asked for its inventory, and everybody has it right again."""
        a, b = make_node(), make_node()
        a.register()
        b.register()
        a.change(added=make_keys(1))
        b.expect_holders(make_keys(1)[0], a.who[0])
        wait_for(
            lambda: (
                a.live() or b.live() or not a.change(added=make_keys(1, secrets.token_hex(4)), skip=1) or _resynced(a)
            )
        )
        a.upload()
        b.expect_holders(a.inventory[-1], a.who[0])

    def test_silent_member_is_dropped(self, context):
        """A process that was killed says nothing; everybody else hears of it after the time-out."""
        with running_controller(*IMPATIENT) as controller:
            a, b = (Node(context, controller.ports, make_member(name, peer_port=port)) for name, port in ONE_AND_OTHER)
            a.register()
            b.register()
            down = wait_for(lambda: b.live() or _found(b, wire.MemberDown, a.who[0]))
            assert down.reason == "timeout"

    def test_duplicate_id_is_refused_with_both_addresses(self, make_node, context, controller):
        a = make_node()
        a.register()
        rival = Node(context, controller.ports, make_member(a.who[0], peer_host="10.0.0.9", peer_port=1))
        rival.say(wire.Register(rival.member))
        refused = rival.expect(wire.Refused)
        assert refused.code == "duplicate_instance"
        assert a.member.peer_address in refused.text
        assert "10.0.0.9:1" in refused.text

    def test_connection_made_anew_is_noticed(self, make_node, context, controller):
        """A heartbeat over another connection than the one registered is told to register again."""
        a = make_node()
        a.register()
        a.dealer.close()
        a.dealer = a.heart = Node._connect(context, zmq.DEALER, controller.ports["reply"])
        assert not a.beat().known
        a.register()
        assert a.beat().known

    def test_member_that_stops_reading_costs_nobody_else(self, make_node, context, controller):
        """Its queue fills up, the others go on; when it reads again it gets a snapshot and is right."""
        a, b, slow = make_node(), make_node(), make_node()
        slow.dealer.close()
        slow.dealer = context.socket(zmq.DEALER)
        slow.dealer.setsockopt(zmq.RCVHWM, 1)
        slow.dealer.setsockopt(zmq.RCVBUF, 4096)
        secure(slow.dealer)
        slow.dealer.connect(f"tcp://127.0.0.1:{controller.ports['reply']}")
        for node in (a, b, slow):
            node.register()
        bulk = make_keys(15_000)
        for round_ in range(40):  # 40 x 2 x 600 kB: more than the window, were it counted, and than the kernel keeps
            a.change(added=bulk if round_ % 2 == 0 else [], removed=bulk if round_ % 2 else [])
            slow.send_beat()
            b.live()
        a.change(added=make_keys(1, "last"))
        wait_for(lambda: b.live() or b.replica.holders(make_keys(1, "last")[0]))
        wait_for(lambda: slow.live() or slow.replica.holders(make_keys(1, "last")[0]))
        assert slow.replica.keys_of(a.who[0]) == b.replica.keys_of(a.who[0])

    def test_stopped_controller_drops_nobody_when_it_goes_on(self, context):
        """SIGSTOP for longer than the time-out, with heartbeats waiting in its sockets."""
        with running_controller(*IMPATIENT) as controller:
            a = Node(context, controller.ports, make_member("a"))
            a.register()
            controller.process.send_signal(signal.SIGSTOP)
            until_s = time.monotonic() + 1.5
            while time.monotonic() < until_s:
                a.send_beat()
                a.drain(100)
            controller.process.send_signal(signal.SIGCONT)
            assert a.expect(wire.HeartbeatAck).known


def _found(node: Node, kind: type[wire.Message], instance_id: str):
    return next((one for one in node.notices if isinstance(one, kind) and one.instance_id == instance_id), None)


def _resynced(node: Node) -> bool:
    node.drain(20)
    return any(isinstance(notice, wire.Resync) for notice in node.notices)


class TestGarbage:
    """Whatever arrives costs its sender one logged error, and nobody else anything."""

    FRAMES = (
        b"",
        b"hello",
        b"\xc1",
        b"\xff" * 1000,
        b"\x93" * 100_000,
        b"\x91\xdd\xff\xff\xff\xff",
        b"\x91\xa4\xff\xff\xff\xff",
        msgspec.msgpack.encode(None),
        msgspec.msgpack.encode([]),
        msgspec.msgpack.encode({"Register": 1}),
        msgspec.msgpack.encode(["Nothing", 1, 2]),
        msgspec.msgpack.encode(["Register", 7]),
        msgspec.msgpack.encode(["Leave", "a", "not an incarnation"]),
        msgspec.msgpack.encode(["Leave", "a", "0" * 16 + "\n"]),
        msgspec.msgpack.encode(["Changes", "a", "0" * 16, -1, [], []]),
        msgspec.msgpack.encode(["Changes", "a", "0" * 16, 1, [b"short"], []]),
        msgspec.msgpack.encode(["Snapshot", "a", "0" * 16, 1, [b"k" * 36] * 20_001, True, True]),
        msgspec.msgpack.encode(["FetchReport", "a", "0" * 16, "r", [], "tcp", 1, 1, 1, float("inf"), {}]),
        msgspec.msgpack.encode(["FetchReport", "a", "0" * 16, "r", [], "tcp", 1, 1, 2**64 - 1, 0.1, {}]),
        msgspec.msgpack.encode(["HeartbeatAck", "0" * 16, True]),
    )

    @pytest.mark.parametrize("name", ["reply", "heartbeat", "pull"])
    def test_malformed_messages(self, name, controller, context, make_node):
        """All of them are counted and logged without drowning the log; a node beside them notices nothing."""
        a, b = make_node(), make_node()
        a.register()
        b.register()
        before = _malformed(controller, name)
        kind = zmq.PUSH if name == "pull" else zmq.DEALER
        limit = wire.MAX_EVENT_BYTES if name == "pull" else wire.MAX_REQUEST_BYTES
        frames = [frame for frame in self.FRAMES if len(frame) <= limit]
        for frame in frames:
            rude = Node._connect(context, kind, controller.ports[name])
            rude.setsockopt(zmq.LINGER, 1000)
            rude.send(frame)
            rude.send_multipart([b"", frame])
            rude.send_multipart([frame] * 5)
            rude.close()
        wait_for(lambda: _malformed(controller, name) - before == 3 * len(frames))
        a.change(added=make_keys(2, name))
        b.expect_holders(make_keys(2, name)[1], a.who[0])
        assert a.beat().known
        lines = [line for line in controller.log if f"malformed_message socket={name}" in line]
        assert 1 <= len(lines) < 20
        assert "peer=127.0.0.1" in lines[0]
        assert controller.http.get("/healthz").status_code == 200

    def test_frames_over_the_limit_end_their_connection(self, controller, context, make_node):
        """A frame that is too long is not even read."""
        a = make_node()
        a.register()
        for name, size in (("reply", wire.MAX_REQUEST_BYTES + 1), ("pull", wire.MAX_EVENT_BYTES + 1)):
            kind = zmq.PUSH if name == "pull" else zmq.DEALER
            rude = context.socket(kind)
            monitor = rude.get_monitor_socket(zmq.EVENT_DISCONNECTED)
            rude.setsockopt(zmq.LINGER, 0)
            secure(rude)
            rude.connect(f"tcp://127.0.0.1:{controller.ports[name]}")
            rude.send(b"x" * size)
            assert monitor.poll(10_000), "the connection is still there"
            rude.disable_monitor()
            rude.close()
        assert a.beat().known

    def test_other_protocols(self, controller, make_node):
        """HTTP, noise and half-open connections on the ZMQ ports, ZMQ on the HTTP port."""
        a = make_node()
        a.register()
        for name in ("reply", "heartbeat", "pull", "http"):
            for noise in (b"GET / HTTP/1.1\r\n\r\n", secrets.token_bytes(5000), b"\xff\0\0\0\0\0\0\0\x01\x7f", b""):
                with socket.create_connection(("127.0.0.1", controller.ports[name])) as rude:
                    rude.sendall(noise)
        assert a.beat().known
        assert controller.http.get("/healthz").json()["status"] == "ok"


def _malformed(controller: ControllerProcess, name: str) -> int:
    found = re.search(
        rf'kvmesh_controller_malformed_messages_total{{socket="{name}"}} (\d+)', controller.http.get("/metrics").text
    )
    return int(found.group(1)) if found else 0


class TestLife:
    def test_killed_and_restarted_controller_learns_everything_again(self, context):
        """After kill -9, with a new process on the same ports, nodes register again and all inventories come back."""
        first = ControllerProcess().wait_started()
        ports = {name: port for name, port in first.ports.items() if name != "http"}
        nodes = [Node(context, ports, make_member(f"n{index}", peer_port=7000 + index)) for index in range(3)]
        try:
            for index, node in enumerate(nodes):
                node.inventory = make_keys(10, f"{index}-")
                node.register()
            first.stop(signal.SIGKILL)
            nodes[0].change(added=make_keys(1, "meanwhile"))
            with running_controller(ports=ports) as second:

                def healed() -> bool:
                    """Everybody knows exactly what everybody else holds."""
                    for node in nodes:
                        node.live()
                    return all(
                        node.replica.keys_of(other.who[0]) == set(other.inventory)
                        for node in nodes
                        for other in nodes
                        if other is not node
                    )

                wait_for(healed)
                assert nodes[1].replica.holders(make_keys(1, "meanwhile")[0]) == ("n0",)
                assert ids(second) == {"n0", "n1", "n2"}
        finally:
            first.stop(signal.SIGKILL)

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_signals_end_it_cleanly(self, number, context):
        """Status 0, with members registered and a browser's connection open."""
        with running_controller() as controller:
            node = Node(context, controller.ports, make_member("a"))
            node.register()
            with socket.create_connection(("127.0.0.1", controller.ports["http"])) as idle:
                idle.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
                idle.recv(100)
                assert controller.stop(number) == 0
            assert "event=stopped" in controller.log[-2]
            assert not [line for line in controller.log if "level=error" in line or "Traceback" in line]

    @pytest.mark.parametrize(
        ("name", "flag"),
        [("http", "--port"), ("pull", '--monitor-ports "pull"'), ("reply", '"reply"'), ("heartbeat", '"heartbeat"')],
    )
    def test_busy_port_is_named(self, name, flag):
        """One sentence with port and flag, status 1, at once."""
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            ports = {"pull": 0, "reply": 0, "heartbeat": 0}
            if name != "http":
                ports[name] = port
            controller = ControllerProcess(ports=ports, http_port=port if name == "http" else 0)
            assert controller.process.wait(30) == 1
            line = controller.wait_for_line("error: ").string
            assert str(port) in line
            assert flag in line
            assert "in use" in line
            controller.stop()

    def test_bad_flag_is_named(self):
        done = subprocess.run(
            [sys.executable, "-m", "kvmesh.controller", "--monitor-ports", '{"pul": 1}'],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
        assert done.returncode == 2
        assert "pul" in done.stderr
        assert "Traceback" not in done.stderr

    def test_works_without_a_heartbeat_port(self, context):
        """Heartbeats then come over the reply socket."""
        with running_controller(*FAST, ports={"pull": 0, "reply": 0}) as controller:
            node = Node(context, controller.ports, make_member("a"))
            node.register()
            assert node.beat().known

    def test_memory_stays_within_its_limit(self, controller, make_node):
        """150 MB with the page loaded and a few members."""
        for _ in range(3):
            node = make_node()
            node.inventory = make_keys(1000)
            node.register()
        assert controller.http.get("/").status_code == 200
        with open(f"/proc/{controller.process.pid}/status") as status:  # noqa: PTH123
            resident = re.search(r"VmRSS:\s+(\d+) kB", status.read())
        assert resident is not None
        assert int(resident.group(1)) < 150_000


class TestHttp:
    def test_page_and_everything_it_loads_comes_from_here(self, controller):
        """No address of another host in the page, and every asset that it names is served."""
        page = controller.http.get("/")
        assert page.status_code == 200
        assert page.headers["content-type"].startswith("text/html")
        assert "kvmesh" in page.text
        assets = set(re.findall(r'(?:src|href)="([^"]+)"', page.text)) | set(
            re.findall(r'"(/_nicegui/[^"]+\.(?:js|mjs|css))"', page.text)
        )
        assert len(assets) > 5
        base = f"http://127.0.0.1:{controller.ports['http']}"
        assert not [asset for asset in assets if "//" in asset and not asset.startswith((base, "data:"))]
        for asset in (asset for asset in assets if not asset.startswith("data:")):
            assert controller.http.get(asset).status_code == 200, asset

    def test_instances(self, controller, make_node):
        a = make_node()
        a.inventory = make_keys(10)
        a.statistics = wire.NodeStatistics(fetched_bytes=123, misses={"evicted": 4})
        a.register()
        a.beat()
        seen = wait_for(lambda: (one := controller.get(f"/api/v1/instances/{a.who[0]}"))["chunks"] and one)
        assert seen["incarnation"] == a.who[1]
        assert seen["state"] == "up"
        assert seen["pool_use"] == pytest.approx(0.01)
        assert seen["statistics"]["misses"] == {"evicted": 4}
        assert seen["admin_address"] == "127.0.0.1:8500"
        assert seen["format"]["fields"]["chunk_tokens"] == 256
        assert a.who[0] in ids(controller)

    def test_lookup(self, controller, make_node):
        """Holders of each key, and the longest prefix together and by instance."""
        model = make_format(model_name="lookup-test")
        a, b = make_node(format=model), make_node(format=model)
        keys = make_keys(4, "lookup")
        a.inventory, b.inventory = keys[:2], keys[:3]
        for node in (a, b):
            node.register()
        path = "/api/v1/lookup?keys=" + ",".join(key.hex() for key in keys) + f"&format_id={model.format_id()}"
        found = wait_for(
            lambda: (
                (one := controller.get(path)["formats"][0])["longest_prefix"]["chunks"] == 3
                and len(one["chunks"][0]["holders"]) == 2
                and one
            )
        )
        assert found["longest_prefix"] == {"chunks": 3, "tokens": 768, "by_instance": {a.who[0]: 2, b.who[0]: 3}}
        assert [len(chunk["holders"]) for chunk in found["chunks"]] == [2, 2, 1, 0]
        body = {"keys": [key.hex() for key in keys], "format_id": model.format_id()}
        assert controller.http.post("/api/v1/lookup", json=body).json()["formats"] == [found]

    def test_fetches_and_totals(self, controller, make_node):
        a = make_node()
        a.register()
        report = wire.FetchReport(
            instance_id=a.who[0],
            incarnation=a.who[1],
            request_id="cmpl-1",
            holders=("b",),
            transport="tcp",
            chunks_asked=4,
            chunks_fetched=3,
            fetched_bytes=3_000_000,
            seconds=0.5,
            misses={"evicted": 1},
        )
        a.tell(report)
        (seen,) = wait_for(
            lambda: [fetch for fetch in controller.get("/api/v1/fetches") if fetch["instance_id"] == a.who[0]]
        )
        assert seen["bytes_per_second"] == pytest.approx(6_000_000)
        assert seen["misses"] == {"evicted": 1}
        assert controller.get("/api/v1/totals")["fetched_bytes"] >= 3_000_000

    @pytest.mark.parametrize(
        ("method", "path", "status", "words"),
        [
            ("GET", "/api/v1/instances/nobody", 404, ["nobody", "/api/v1/instances"]),
            ("GET", "/api/v1/lookup", 422, ["keys", "openapi"]),
            ("GET", "/api/v1/lookup?keys=xyz", 422, ["xyz", "hexadecimal"]),
            ("GET", "/api/v1/lookup?keys=00", 422, ["8 to 40"]),
            ("GET", f"/api/v1/lookup?keys={'00' * 8}&format_id=nope", 404, ["nope", "known formats"]),
            ("GET", "/api/v2/anything", 404, ["/api/v2/anything", "/api/v1/lookup"]),
            ("GET", "/nothere", 404, ["/nothere", "/api/v1/lookup"]),
            ("DELETE", "/api/v1/instances", 404, ["DELETE", "GET /api/v1/instances"]),
            ("POST", "/api/v1/lookup", 422, ["body"]),
        ],
    )
    def test_errors_are_json_and_say_what_to_do(self, controller, method, path, status, words):
        answer = controller.http.request(method, path)
        assert answer.status_code == status
        error = answer.json()["error"]
        assert set(error) == {"code", "message", "hint"}
        for word in words:
            assert word in error["message"] + error["hint"]

    def test_openapi_describes_every_call(self, controller):
        paths = controller.get("/openapi.json")["paths"]
        assert {"/healthz", "/metrics", "/api/v1/instances", "/api/v1/lookup", "/api/v1/fetches"} <= set(paths)

    def test_metrics(self, controller, make_node):
        a = make_node()
        a.register()
        text = controller.http.get("/metrics").text
        for name in ("instances{state=", "entries ", "fetched_bytes_total ", "messages_received_total{"):
            assert f"kvmesh_controller_{name}" in text

    def test_health(self, controller):
        health = controller.get("/healthz")
        assert health["status"] == "ok"
        assert health["problems"] == []

    def test_nothing_is_written_to_disk(self, tmp_path):
        """A controller leaves its working directory as it was."""
        before = os.getcwd()  # noqa: PTH109
        os.chdir(tmp_path)
        try:
            with running_controller() as controller:
                httpx.get(f"http://127.0.0.1:{controller.ports['http']}/", trust_env=False)
        finally:
            os.chdir(before)
        assert list(tmp_path.iterdir()) == []
