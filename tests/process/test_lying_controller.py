"""A real node whose controller lies: it stays up, its memory stays bounded, and the truth is believed afterwards."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Iterator, Sequence

import msgspec
import psutil
import pytest
import zmq

from kvmesh.bench.stand_in import StandInEngine, make_key, stand_in_format
from kvmesh.wire import control, operations
from kvmesh.wire import directory as wire
from kvmesh.wire.curve import secure_controller
from support.keys import environment_curve
from support.stand_ins import CHUNK_BYTES, make_config, running_engine
from unit.controller.makers import make_member

pytestmark = [pytest.mark.process, pytest.mark.timeout(120)]

FORMAT = stand_in_format(CHUNK_BYTES)
NESTED = b"\x93\xacHeartbeatAck\xb0" + b"0" * 16 + b"\x91" * 100_000 + b"\x90"


class FakeController:
    """A controller's sockets; the test says what goes over them."""

    def __init__(self) -> None:
        self.context = zmq.Context()
        self.reply, self.pull = self.context.socket(zmq.ROUTER), self.context.socket(zmq.PULL)
        self.reply.sndhwm = 0
        curve = environment_curve()
        for socket in (self.reply, self.pull) if curve is not None else ():
            secure_controller(socket, curve)
        self.reply_port = self.reply.bind_to_random_port("tcp://127.0.0.1")
        self.pull_port = self.pull.bind_to_random_port("tcp://127.0.0.1")
        self.node = b""
        self.incarnation = secrets.token_hex(8)
        self.requests: list[wire.Request] = []

    def wait_for(self, kind: type[wire.Message], timeout_s: float = 20.0) -> wire.Message:
        """The next request of this kind; the node's connection is remembered."""
        until_s = time.monotonic() + timeout_s
        while time.monotonic() < until_s:
            if not self.reply.poll(100):
                continue
            frames = self.reply.recv_multipart()
            self.node = frames[0]
            request = wire.request_decoder.decode(frames[1])
            self.requests.append(request)
            if isinstance(request, kind):
                return request
        raise AssertionError(f"no {kind.__name__} came")

    def say(self, *frames: bytes) -> None:
        for frame in frames:
            self.reply.send_multipart([self.node, frame])

    def tell(self, *notices: wire.Notice) -> None:
        self.say(*(wire.encode(notice) for notice in notices))

    def welcome(self, members: Sequence[wire.Member] = (), interval_s: float = 0.1, timeout_s: float = 30.0) -> None:
        self.tell(wire.Registered(self.incarnation, interval_s, timeout_s, list(members), 1))

    def events(self) -> Iterator[wire.Event]:
        while self.pull.poll(0):
            yield wire.event_decoder.decode(self.pull.recv())

    def close(self) -> None:
        self.context.destroy(linger=0)


@pytest.fixture
def controller() -> Iterator[FakeController]:
    made = FakeController()
    yield made
    made.close()


@pytest.fixture
def engine(controller: FakeController) -> Iterator[StandInEngine]:
    with running_engine(make_config(controller, "lied-to")) as running:  # type: ignore[arg-type]
        controller.wait_for(wire.Register)
        yield running


def honest(controller: FakeController, engine: StandInEngine) -> None:
    """The node still does its work: it beats, and what it is told now reaches its engine."""
    member = make_member(f"honest-{secrets.token_hex(4)}", format=FORMAT)
    keys = [make_key(f"{member.instance_id}-{index}") for index in range(3)]
    controller.welcome([member])
    controller.tell(wire.Snapshot(member.instance_id, member.incarnation, 0, keys, first=True, last=True))
    assert engine.wait_visible(keys)
    controller.wait_for(wire.Heartbeat)
    assert engine.node.restarts == 0


def garbage() -> dict[str, bytes]:
    encode = msgspec.msgpack.encode
    return {
        "empty": b"",
        "no msgpack": b"\xc1" * 50,
        "nested too deep": NESTED,
        "lengths that lie": b"\x91\xdd\xff\xff\xff\xff",
        "wrong direction": wire.encode(wire.Leave("a", "0" * 16)),
        "unknown": encode(["Nothing", 1]),
        "wrong types": encode(["MemberUp", "everybody"]),
        "an interval that is no number": encode(["Registered", "0" * 16, float("nan"), 1.0, [], 1]),
        "negative sequence": encode(["Changes", "a", "0" * 16, -1, [], []]),
        "long key": encode(["Changes", "a", "0" * 16, 1, [b"x" * 41], []]),
        "too many keys": encode(["Changes", "a", "0" * 16, 1, [b"x" * 36] * 20_001, []]),
        "a question to another life": wire.encode(wire.Ask("lied-to", "0" * 16, "1" * 16, b"\xc1", 5.0)),
        "random": secrets.token_bytes(1000),
    }


def test_garbage(capfd: pytest.CaptureFixture[str], controller: FakeController, request: pytest.FixtureRequest) -> None:
    """What cannot be read costs one logged line now and then, not the node."""
    engine = request.getfixturevalue("engine")  # its node writes to where capfd looks
    for frame in garbage().values():
        controller.say(frame, *[frame] * 20)
        controller.reply.send_multipart([controller.node, b"", frame])
        controller.reply.send_multipart([controller.node, frame, b"\xff"])
    honest(controller, engine)
    lines = [line for line in capfd.readouterr().err.splitlines() if "malformed message" in line]
    assert 1 <= len(lines) <= 3


def test_questions_that_mean_nothing(controller: FakeController, engine: StandInEngine) -> None:
    """Each gets one answer that says so, a crowd of them is refused, and an engine that cannot obey says that too."""
    registered = controller.requests[0]
    assert isinstance(registered, wire.Register)
    who = ("lied-to", registered.member.incarnation)
    command = operations.ClearChunks()
    questions = {
        "bad_question": [b"", b"\xc1", NESTED, secrets.token_bytes(1000)],
        "unknown_question": [msgspec.msgpack.encode({"type": "Weather"})],
        "no_tokenizer": [control.encode_question(control.MakeKeys(text="x"))],
        "unknown_operation": [control.encode_question(control.TellOperation(operation_id="0" * 16))],
        "": [control.encode_question(control.StartOperation(operation_id="0" * 16, command=command, timeout_s=5.0))],
    }
    controller.welcome([])
    for code, asked in questions.items():
        for question in asked:
            controller.tell(wire.Ask(*who, secrets.token_hex(8), question, 5.0))
            answer = controller.wait_for(wire.Answer)
            assert isinstance(answer, wire.Answer)
            assert (answer.error.code if answer.error else "") == code
    told = control.encode_question(control.TellOperation(operation_id="0" * 16, wait_s=60.0))
    controller.tell(wire.Ask(*who, "f" * 16, told, 20.0))
    answer = controller.wait_for(wire.Answer)
    assert isinstance(answer, wire.Answer)
    report = control.decode_reply(answer.reply)
    assert isinstance(report, control.Told)
    assert report.report.state is operations.RunState.FAILED, "a stand-in that nobody taught to obey"
    controller.tell(*(wire.Ask(*who, secrets.token_hex(8), b"\xc1", 5.0) for _ in range(1000)))
    honest(controller, engine)


def test_members_that_cannot_be(controller: FakeController, engine: StandInEngine) -> None:
    """Names that forge log lines, addresses that lead nowhere, ourselves, and the same one again and again."""
    weird = [
        "",
        " ",
        "\n",
        "\0",
        "..",
        "ß." * 80,
        "xn--",
        "999.999.999.999",
        "::1",
        "%x",
        "a" * 256,
        "\ud7ff",
        "-",
        "localhost:1",
    ]
    members = [
        make_member(f"weird-{index}\nERROR forged", peer_host=host or "x", peer_port=index, format=FORMAT)
        for index, host in enumerate(weird)
    ]
    members += [make_member("lied-to", format=FORMAT), make_member("loop", peer_port=0, format=FORMAT)]
    members += [make_member("t", transports=("", "nixl", "shm")[1:], format=FORMAT)]
    members += [make_member("other-format", format=stand_in_format(1))]
    controller.welcome(members)
    for _ in range(50):
        for member in members:
            reborn = msgspec.structs.replace(member, incarnation=secrets.token_hex(8))
            controller.tell(wire.MemberUp(reborn), wire.MemberDown(member.instance_id, member.incarnation, "left"))
            controller.tell(wire.MemberDown(reborn.instance_id, reborn.incarnation, "\n"))
    keys = []
    for member in members:  # and it is tried to fetch from them
        keys.append(make_key(member.instance_id))
        controller.tell(
            wire.MemberUp(member), wire.Snapshot(member.instance_id, member.incarnation, 0, keys[-1:], True, True)
        )
    fetchable = [key for key in keys if key not in {make_key(name) for name in ("lied-to", "other-format")}]
    assert engine.wait_visible(fetchable)
    for key in fetchable:
        got = engine.get([key], timeout_s=2.0)
        assert got.fetched == 0
    assert engine.node.restarts == 0
    controller.tell(wire.MemberDown("nobody", "0" * 16, "left"), wire.Resync("nobody", "0" * 16))
    honest(controller, engine)


def test_more_members_than_there_can_be(controller: FakeController, engine: StandInEngine) -> None:
    """Two times as many as any controller admits, with our format: the others are not used, memory stays bounded."""
    node = psutil.Process(engine.node.pid)
    first = make_member("m", format=FORMAT, peer_port=1)
    for start in range(0, 40_000, 8_000):
        members = [msgspec.structs.replace(first, instance_id=f"m-{start + index}") for index in range(8_000)]
        controller.tell(*(wire.MemberUp(member) for member in members))
    wait_until(lambda: engine.node.state.peers >= 20_000, 60)
    assert engine.node.state.peers == 20_000
    honest(controller, engine)
    assert node.memory_info().rss < 1 << 30
    assert node.num_fds() < 1000


def test_inventories_without_end(controller: FakeController, engine: StandInEngine) -> None:
    """Snapshots that never end or have no beginning, changes of strangers, sequences that jump."""
    member = make_member("liar", format=FORMAT)
    controller.welcome([member])
    who = (member.instance_id, member.incarnation)
    for part in range(30):
        keys = [secrets.token_bytes(36) for _ in range(5000)]
        controller.tell(wire.Snapshot(*who, 7, keys, first=part == 0, last=False))
    stranger = ("stranger", "1" * 16)
    for turn in range(1000):
        key = [secrets.token_bytes(36)]
        controller.tell(wire.Changes(*stranger, turn, key, key), wire.Changes(*who, turn * 3, key, key))
        controller.tell(wire.Snapshot(*stranger, turn, key, first=False, last=True))
        controller.tell(wire.Snapshot(*who, 2**53 - 1 - turn, key, first=turn % 2 == 0, last=turn % 3 == 0))
    honest(controller, engine)
    assert not any(request.instance_id == "stranger" for request in snapshot_requests(controller))
    assert len(snapshot_requests(controller)) < 20


def test_a_controller_that_changes_its_mind(controller: FakeController, engine: StandInEngine) -> None:
    """New incarnations without end, heartbeats asked for at any rate, and refusals: no flood, no silence."""
    member = make_member("a", format=FORMAT)
    for turn in range(300):
        controller.incarnation = secrets.token_hex(8)
        controller.welcome(
            [member] if turn % 2 else [], interval_s=(1e-9, 1e9)[turn % 2], timeout_s=(0.0, 1e9)[turn % 2]
        )
        controller.tell(
            wire.Refused("duplicate_instance", "no\nERROR forged" * 100), wire.HeartbeatAck("0" * 16, False)
        )
    controller.welcome([member], interval_s=1e-9)
    wait_until(lambda: beats_in(controller, 1.0) < 60)  # after what it had to say to all that
    honest(controller, engine)


def beats_in(controller: FakeController, window_s: float) -> int:
    """Requests that come within so long."""
    until_s, count = time.monotonic() + window_s, 0
    while (rest_s := until_s - time.monotonic()) > 0:
        if controller.reply.poll(rest_s * 1000):
            controller.reply.recv_multipart()
            count += 1
    return count


def snapshot_requests(controller: FakeController) -> list[wire.SnapshotRequest]:
    with contextlib.suppress(AssertionError):
        controller.wait_for(wire.Leave, timeout_s=0.3)  # take what is there
    return [request for request in controller.requests if isinstance(request, wire.SnapshotRequest)]


def wait_until(check: Callable[[], bool], timeout_s: float = 20.0) -> None:
    until_s = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < until_s, "waited in vain"
        time.sleep(0.01)
