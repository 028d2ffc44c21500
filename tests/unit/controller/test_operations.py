"""Operations at the controller: what each kind asks of whom, in which order, and how it ends. The nodes are made up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import asynccontextmanager

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from kvmesh.controller.api import Context, create_app
from kvmesh.controller.asks import Asks
from kvmesh.controller.instances import Peer
from kvmesh.controller.operation_bodies import OperationBody
from kvmesh.controller.operation_runs import share_out
from kvmesh.controller.operations import MAX_KEPT, MAX_RUNNING, Operation, Operations
from kvmesh.controller.peer_asks import PeerAsks
from kvmesh.controller.rates import RateMeter
from kvmesh.controller.registry import Registry
from kvmesh.wire import control
from kvmesh.wire import directory as wire
from kvmesh.wire.control import ControlError
from kvmesh.wire.operations import AnyCommand, ClearChunks, ListHot, PinChunks, Report, RunState, Sharing, WarmChunks
from unit.controller.makers import make_format, make_keys, make_member

KEYS = make_keys(10)
HEX = [key.hex() for key in KEYS]
BODIES: TypeAdapter[object] = TypeAdapter(OperationBody)


class World:
    """A registry whose members answer questions as nodes do, out of sets of keys."""

    def __init__(self) -> None:
        self.registry = Registry(incarnation="c" * 16, heartbeat_interval_s=1.0, instance_timeout_s=60.0)
        self.asks = Asks(self.registry, self._send, PeerAsks())
        self.held: dict[str, dict[bytes, None]] = {}
        self.sequences: dict[str, int] = {}
        self.told: list[tuple[str, str]] = []
        """(instance id, what it was told), in order."""
        self.reports: dict[str, Report] = {}
        self.refusals: dict[tuple[str, str], ControlError] = {}
        """By instance and what is asked."""
        self.waiting: set[str] = set()
        """Instances whose engines take no step."""
        self.token: str | None = None
        self.context = Context(self.registry, self, lambda: asyncio.get_running_loop().time(), 0.0)  # type: ignore[arg-type]

    def add(self, name: str, keys: list[bytes], *, slots: int = 100, **changed: object) -> None:
        member = make_member(name, slots=slots, **changed)
        self.registry.on_request(wire.Register(member), Peer("reply", name.encode()), 0.0)
        self.held[name] = dict.fromkeys(keys)
        self._announce(name)

    def _announce(self, name: str, *, shown: bool = True) -> None:
        member = self.registry.instances[name].member
        self.sequences[name] = self.sequences.get(name, 0) + 1
        keys = list(self.held[name]) if shown else []
        event = wire.Snapshot(name, member.incarnation, self.sequences[name], keys, first=True, last=True)
        self.registry.on_event(event, wire.encode(event), 0.0)

    def _send(self, peer: Peer, frame: bytes) -> None:
        ask = wire.notice_decoder.decode(frame)
        assert isinstance(ask, wire.Ask)
        asyncio.get_running_loop().call_soon(self._answer, ask)

    def _answer(self, ask: wire.Ask) -> None:
        name = ask.instance_id
        question = control.decode_question(ask.question, version="1")
        refusal = self.refusals.get((name, type(question).__name__))
        if refusal is not None:
            self.asks.on_answer(wire.Answer(name, ask.incarnation, ask.ask_id, b"", control.make_error(refusal)))
            return
        reply = control.encode_reply(self._reply(name, question))
        self.asks.on_answer(wire.Answer(name, ask.incarnation, ask.ask_id, reply))

    def _reply(self, name: str, question: control.AnyQuestion) -> control.Reply:
        match question:
            case control.StartOperation():
                self.told.append((name, type(question.command).__name__))
                done = self._carry_out(name, question.command)
                self.reports[question.operation_id] = done
                return control.Told(report=Report(state=RunState.PENDING) if name in self.waiting else done)
            case control.TellOperation():
                pending = Report(state=RunState.PENDING, text="waiting")
                return control.Told(report=pending if name in self.waiting else self.reports[question.operation_id])
            case control.ChangeSharing():
                self.told.append((name, question.sharing.value))
                if question.sharing is Sharing.LEFT:
                    incarnation = self.registry.instances[name].incarnation
                    leave = wire.Leave(name, incarnation)
                    asyncio.get_running_loop().call_soon(
                        self.registry.on_request, leave, Peer("reply", name.encode()), 0.0
                    )
                return control.SharingIs(sharing=question.sharing, published_chunks=0)
        raise AssertionError(question)

    def _carry_out(self, name: str, command: AnyCommand) -> Report:
        held = self.held[name]
        if isinstance(command, ListHot):
            return Report(state=RunState.DONE, keys=list(held)[: command.limit])
        keys = list(held) if getattr(command, "keys", None) is None else list(command.keys)  # type: ignore[union-attr]
        good = list(keys)
        if isinstance(command, WarmChunks):
            others = {key for other, theirs in self.held.items() if other != name for key in theirs}
            good = [key for key in keys if key in others]
            held.update(dict.fromkeys(good))
        elif isinstance(command, ClearChunks):
            self.held[name] = {key: None for key in held if key not in keys}
        elif isinstance(command, PinChunks):
            good = [key for key in keys if key in held]
        if name in self.registry.instances:
            self._announce(name)
        state = RunState.DONE if len(good) == len(keys) else RunState.PARTLY if good else RunState.FAILED
        return Report(state=state, chunks_done=len(good), chunks_total=len(keys), outcomes={"x": len(keys)})

    async def operate(self, **body: object) -> Operation:
        operation, is_new = self.context.operator.start(BODIES.validate_python(body))  # type: ignore[arg-type]
        assert is_new
        await asyncio.wait_for(operation.ended.wait(), 20)
        return operation


@pytest.fixture
def world() -> World:
    made = World()
    made.add("a", KEYS[:6])
    made.add("b", KEYS[4:8])
    return made


@asynccontextmanager
async def client(world: World, address: str = "127.0.0.1", host: str = "127.0.0.1:9000"):
    transport = httpx.ASGITransport(create_app(world.context), client=(address, 1))
    async with httpx.AsyncClient(transport=transport, base_url=f"http://{host}/api/v1") as made:
        yield made


def states(operation: Operation) -> dict[str, str]:
    return {f"{part.action} {part.instance_id}": part.report.state.value for part in operation.parts}


async def test_move_clears_only_what_has_arrived(world: World) -> None:
    """What the target could not take stays where it is."""
    world.add("c", [], slots=100)
    carry_out: Callable[[str, AnyCommand], Report] = world._carry_out

    def only_half(name: str, command: AnyCommand) -> Report:
        if isinstance(command, WarmChunks):
            carry_out(name, WarmChunks(keys=command.keys[:3]))
            return Report(state=RunState.PARTLY, chunks_done=3, chunks_total=6)
        return carry_out(name, command)

    world._carry_out = only_half  # type: ignore[method-assign]
    moved = await world.operate(kind="move", **{"from": "a", "to": "c"}, timeout_s=1)
    assert moved.state is RunState.PARTLY
    assert set(world.held["c"]) == set(KEYS[:3])
    assert set(world.held["a"]) == set(KEYS[3:6])


async def test_drain_hands_over_what_nobody_else_holds_and_leaves(world: World) -> None:
    drained = await world.operate(kind="drain", instance="a")
    assert drained.state is RunState.DONE, drained.error
    assert states(drained) == {"drain a": "done", "warm b": "done"}
    assert set(world.held["b"]) == set(KEYS[:8])
    assert "a" not in world.registry.instances
    assert [what for name, what in world.told if name == "a"] == ["draining", "ListHot", "left"]


async def test_a_drain_without_receivers_changes_nothing(world: World) -> None:
    """The instance takes part again, as before."""
    world.add("alone", KEYS[:2], format=make_format(model_name="another"))
    failed = await world.operate(kind="drain", instance="alone")
    assert failed.error is not None
    assert (failed.state, failed.error.code) == (RunState.FAILED, "no_receiver")
    assert [what for name, what in world.told if name == "alone"][-1] == "on"
    assert (await world.operate(kind="drain", instance="alone", hand_over=0)).state is RunState.DONE


async def test_a_drain_that_is_cancelled_is_undone(world: World) -> None:
    world.waiting.add("b")
    operation, _ = world.context.operator.start(BODIES.validate_python({"kind": "drain", "instance": "a"}))  # type: ignore[arg-type]
    while ("b", "WarmChunks") not in world.told:
        await asyncio.sleep(0)
    world.context.operator.operations.cancel(operation.operation_id)
    await operation.ended.wait()
    assert operation.error is not None
    assert operation.error.code == "cancelled"
    assert [what for name, what in world.told if name == "a"][-1] == "on"
    assert all(part.report.state.is_final for part in operation.parts)


async def test_warm_takes_the_hottest_of_all_others_in_turns(world: World) -> None:
    world.add("c", [])
    warmed = await world.operate(kind="warm", instance="c", hottest=4)
    assert warmed.state is RunState.DONE
    assert list(world.held["c"]) == [KEYS[0], KEYS[4], KEYS[1], KEYS[5]]
    none = await world.operate(kind="warm", instance="c", hottest=2, sources=["a"])
    assert none.parts[0].report.chunks_total == 2


async def test_pin_everywhere_means_where_it_is_held(world: World) -> None:
    pinned = await world.operate(kind="pin", keys=HEX[6:8], seconds=5)
    assert states(pinned) == {"pin b": "done"}
    nowhere = await world.operate(kind="pin", keys=HEX[9:], seconds=5)
    assert nowhere.error is not None
    assert nowhere.error.code == "not_held"


async def test_one_instance_that_fails_does_not_stop_the_others(world: World) -> None:
    world.refusals["a", "StartOperation"] = ControlError("no_engine", "nobody home")
    cleared = await world.operate(kind="clear")
    assert (cleared.state, states(cleared)) == (RunState.PARTLY, {"clear a": "failed", "clear b": "done"})
    assert not world.held["b"]


async def test_a_member_that_goes_meanwhile(world: World) -> None:
    world.waiting.add("a")
    operation, _ = world.context.operator.start(BODIES.validate_python({"kind": "clear", "instance": "a"}))  # type: ignore[arg-type]
    while not world.told:
        await asyncio.sleep(0)
    incarnation = world.registry.instances["a"].incarnation
    world.registry.on_request(wire.Leave("a", incarnation), Peer("reply", b"a"), 0.0)
    await operation.ended.wait()
    error = operation.parts[0].error
    assert error is not None
    assert error.code in ("lost", "unknown_instance")


async def test_asking_twice(world: World) -> None:
    """While one runs an equal request is the same one; with a key it stays the same one."""
    world.waiting |= {"a", "b"}
    body = {"kind": "clear", "instance": "a"}
    async with client(world) as http:
        first = await http.post("/operations", json=body)
        second = await http.post("/operations", json=body)
        assert (first.status_code, second.status_code) == (202, 200)
        assert first.json()["id"] == second.json()["id"]
        world.waiting.clear()
        ended = (await http.get(first.json()["url"].removeprefix("/api/v1"), params={"wait_s": 10})).json()
        assert ended["state"] == "done"
        assert (await http.post("/operations", json=body)).status_code == 202
        keyed = {"Idempotency-Key": "k"}
        once = await http.post("/operations", json={"kind": "unpin"}, headers=keyed)
        await http.get(f"/operations/{once.json()['id']}?wait_s=10")
        again = await http.post("/operations", json={"kind": "unpin"}, headers=keyed)
        assert (again.status_code, again.json()["id"]) == (200, once.json()["id"])
        other = await http.post("/operations", json={"kind": "clear"}, headers=keyed)
        assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_conflict")


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"kind": "explode"}, 422, "bad_request"),
        ({"kind": "warm", "instance": "a"}, 422, "bad_request"),
        ({"kind": "warm", "instance": "a", "keys": HEX, "hottest": 3}, 422, "bad_request"),
        ({"kind": "pin", "keys": HEX}, 422, "bad_request"),
        ({"kind": "pin", "keys": ["xyz"], "seconds": 3}, 422, "bad_request"),
        ({"kind": "pin", "keys": HEX, "tokens": [1], "seconds": 3}, 422, "bad_request"),
        ({"kind": "clear", "everything": True}, 422, "bad_request"),
        ({"kind": "move", "from": "a", "to": "a"}, 422, "bad_request"),
        ({"kind": "clear", "instance": "nobody"}, 404, "unknown_instance"),
        ({"kind": "warm", "instance": "a", "hottest": 3, "sources": ["nobody"]}, 404, "unknown_instance"),
    ],
)
async def test_what_is_refused(world: World, body: dict, status: int, code: str) -> None:
    async with client(world) as http:
        answer = await http.post("/operations", json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
        assert (await http.get("/operations")).json() == {"operations": []}


async def test_only_instances_of_one_format_move(world: World) -> None:
    world.add("other", [], format=make_format(model_name="another"))
    async with client(world) as http:
        answer = await http.post("/operations", json={"kind": "move", "from": "a", "to": "other"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "format_mismatch")


@pytest.mark.parametrize(
    ("address", "host", "origin", "allowed"),
    [
        ("127.0.0.1", "127.0.0.1:9000", None, True),
        ("::1", "localhost:9000", "http://localhost:9000", True),
        ("10.0.0.7", "10.0.0.1:9000", None, False),
        ("127.0.0.1", "127.0.0.1:9000", "http://evil.example", False),
        ("127.0.0.1", "evil.example:9000", "http://evil.example:9000", False),
        ("127.0.0.1", "evil.example:9000", None, False),
    ],
)
async def test_without_a_key_only_this_machine_may_write(
    world: World, address: str, host: str, origin: str | None, allowed: bool
) -> None:
    """And no other site's page, nor a page whose name was made to lead here."""
    async with client(world, address, host) as http:
        headers = {} if origin is None else {"Origin": origin}
        answer = await http.post("/operations", json={"kind": "unpin"}, headers=headers)
        assert answer.status_code == (202 if allowed else 403)
        assert (await http.get("/operations", headers=headers)).status_code == 200, "reading is free"


async def test_with_a_key_the_token_is_needed_from_anywhere(world: World) -> None:
    world.context = Context(world.registry, world, world.context.clock, 0.0, token="secret")  # type: ignore[arg-type]
    async with client(world) as http:
        assert (await http.post("/operations", json={"kind": "unpin"})).status_code == 401
        headers = {"Authorization": "Bearer secret", "Origin": "http://anywhere"}
        assert (await http.post("/operations", json={"kind": "unpin"}, headers=headers)).status_code == 202
        assert (await http.delete("/operations/0000")).status_code == 401


async def test_operations_are_bounded() -> None:
    """So many run, so many are kept; the oldest that have ended go."""
    opened = asyncio.Event()

    async def wait(_: Operation) -> None:
        await opened.wait()

    made = Operations(wait, lambda: 0.0)
    bodies = [BODIES.validate_python({"kind": "unpin", "instance": f"i{index}"}) for index in range(MAX_KEPT + 10)]
    first = [made.start(body)[0] for body in bodies[:MAX_RUNNING]]  # type: ignore[arg-type]
    with pytest.raises(Exception, match="operations are running"):
        made.start(bodies[-1])  # type: ignore[arg-type]
    opened.set()
    for operation in first:
        await operation.ended.wait()
    for body in bodies:
        operation, _ = made.start(body)  # type: ignore[arg-type]
        await operation.ended.wait()
    assert len(list(made)) == MAX_KEPT


async def test_a_bug_costs_the_operation(caplog: pytest.LogCaptureFixture) -> None:
    async def breaks(_: Operation) -> None:
        raise ZeroDivisionError

    made = Operations(breaks, lambda: 0.0)
    operation, _ = made.start(BODIES.validate_python({"kind": "unpin"}))  # type: ignore[arg-type]
    await operation.ended.wait()
    assert operation.state is RunState.FAILED
    assert "traceback" in caplog.text


def test_prompts_are_not_shown(world: World) -> None:
    """What people send to models is nobody else's business: operations show its length."""

    async def run() -> str:
        operation = await world.operate(kind="pin", text="my secret", cache_salt="tenant", seconds=3, timeout_s=1)
        return world.context.operator.view(operation.operation_id).model_dump_json()

    world.refusals |= {(name, "MakeKeys"): ControlError("no_tokenizer", "none") for name in ("a", "b")}
    shown = asyncio.run(run())
    assert "my secret" not in shown
    assert "tenant" not in shown
    assert '"characters":9' in shown


async def test_hand_over_goes_where_there_is_room(world: World) -> None:
    """Then evenly, up to half of a pool: hot chunks are worth more than cold ones."""
    keys = make_keys(40, "x")
    world.add("full", make_keys(20, "f"), slots=20)
    world.add("roomy", make_keys(10, "r"), slots=40)
    members = [world.registry.instances[name] for name in ("full", "roomy")]
    assert [(name, len(mine)) for name, mine in share_out(members, keys)] == [("full", 5), ("roomy", 30)]
    assert share_out(members, keys[:3]) == [("roomy", keys[:3])]


def test_rates_are_means_over_the_last_seconds() -> None:
    meter = RateMeter()
    for second in range(0, 100, 2):
        meter.note(wire.NodeStatistics(fetched_bytes=second * 10, served_bytes=second * 3, fetches=second // 2), second)
    rates = meter.rates()
    assert rates is not None
    assert (rates.fetched_bytes_per_s, rates.served_bytes_per_s, rates.fetches_per_s) == (10.0, 3.0, 0.5)
    assert 18 <= rates.over_s <= 24
    meter.note(wire.NodeStatistics(), 101.0)
    assert meter.rates() is None, "counters that start anew"
    for tenth in range(1, 100):
        meter.note(wire.NodeStatistics(fetched_bytes=tenth), 101.0 + tenth / 10)
    assert len(meter._readings) < 15


@given(
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["kind", "instance", "keys", "tokens", "text", "from", "to", "seconds", "hottest"]),
                inner,
            )
        ),
        max_leaves=8,
    ),
    kind=st.sampled_from(["clear", "pin", "unpin", "warm", "drain", "resume", "move"]),
)
@settings(max_examples=200, derandomize=True, database=None, deadline=None)
def test_any_body_is_taken_or_refused(value: object, kind: str) -> None:
    body = value | {"kind": kind} if isinstance(value, dict) else value
    try:
        BODIES.validate_python(body)
    except ValidationError:
        return
    assert isinstance(body, dict)
