"""Questions to nodes: every one ends, with the reply of the very node that was asked or with a reason."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from kvmesh.controller.asks import MAX_PER_INSTANCE, Asks
from kvmesh.controller.instances import Peer
from kvmesh.controller.peer_asks import PeerAsks
from kvmesh.controller.registry import Registry, SendFailure
from kvmesh.wire import control
from kvmesh.wire import directory as wire
from kvmesh.wire.control import ControlError, Ping, Pong
from unit.controller.makers import make_member

PEER = Peer("reply", b"1")
PONG = control.encode_reply(Pong(version="1.0"))


class World:
    """A registry with one member, and what it is sent."""

    def __init__(self) -> None:
        self.registry = Registry(incarnation="c" * 16, heartbeat_interval_s=1.0, instance_timeout_s=3.0)
        self.sent: list[wire.Ask] = []
        self.failure: SendFailure | None = None
        self.asks = Asks(self.registry, self._send, PeerAsks())
        self.member = make_member("a")
        self.registry.on_request(wire.Register(self.member), PEER, 0.0)

    def _send(self, peer: Peer, frame: bytes) -> SendFailure | None:
        assert peer == PEER
        if self.failure is None:
            self.sent.append(wire.notice_decoder.decode(frame))
        return self.failure

    def answer(self, ask: wire.Ask, reply: bytes = PONG, **changed: object) -> bool:
        plain = wire.Answer(ask.instance_id, ask.incarnation, ask.ask_id, reply)
        return self.asks.on_answer(msgspec.structs.replace(plain, **changed))

    def start(self, timeout_s: float = 10.0) -> asyncio.Task:
        return asyncio.create_task(self.asks.ask("a", Ping(), timeout_s))


@pytest.fixture
def world() -> World:
    return World()


async def asked(world: World, number: int = 1) -> None:
    while len(world.sent) < number:
        await asyncio.sleep(0)


async def code_of(task: asyncio.Task) -> str:
    with pytest.raises(ControlError) as caught:
        await task
    return caught.value.code


async def test_a_reply(world: World) -> None:
    task = world.start()
    await asked(world)
    ask = world.sent[0]
    assert (ask.instance_id, ask.incarnation, ask.timeout_s) == ("a", world.member.incarnation, 10.0)
    assert control.decode_question(ask.question, version="0") == Ping()
    assert world.answer(ask)
    assert await task == Pong(version="1.0")
    assert world.asks.outstanding() == 0
    assert not world.answer(ask), "a second answer is nobody's"


async def test_an_answer_counts_only_from_whom_was_asked(world: World) -> None:
    """Another incarnation, another instance, another question: none of them ends the wait."""
    task = world.start()
    await asked(world)
    ask = world.sent[0]
    assert not world.answer(ask, incarnation="f" * 16)
    assert not world.answer(ask, instance_id="b")
    assert not world.answer(ask, ask_id="f" * 16)
    assert not task.done()
    assert world.answer(ask)
    await task


async def test_a_node_that_is_lost_ends_its_questions(world: World) -> None:
    task = world.start()
    await asked(world)
    for now_s in (0.0, 1.5, 3.0, 4.5):
        world.registry.tick(now_s)
    assert await code_of(task) == "lost"
    assert world.asks.outstanding() == 0


async def test_a_node_that_was_started_anew_ends_the_questions_to_its_old_life(world: World) -> None:
    task = world.start()
    await asked(world)
    reborn = msgspec.structs.replace(world.member, incarnation="e" * 16)
    world.registry.on_request(wire.Register(reborn), Peer("reply", b"2"), 0.1)
    assert await code_of(task) == "lost"


async def test_the_deadline(world: World) -> None:
    with pytest.raises(ControlError, match=r"did not answer a Ping within 0.01 s.*0\.1\.0"):
        await world.asks.ask("a", Ping(), 0.01)
    assert world.asks.asked["deadline"] == 1


async def test_errors_of_the_node_are_told_with_its_name(world: World) -> None:
    task = world.start()
    await asked(world)
    world.answer(world.sent[0], b"", error=wire.AskError("unknown_question", "never heard of it"))
    with pytest.raises(ControlError, match="instance a: never heard of it"):
        await task


async def test_what_is_no_reply(world: World) -> None:
    task = world.start()
    await asked(world)
    world.answer(world.sent[0], b"\xc1")
    assert await code_of(task) == "bad_reply"


@pytest.mark.parametrize(
    ("failure", "text"), [(SendFailure.FULL, "does not read"), (SendFailure.GONE, "no connection")]
)
async def test_what_cannot_be_sent(world: World, failure: SendFailure, text: str) -> None:
    world.failure = failure
    with pytest.raises(ControlError, match=text):
        await world.asks.ask("a", Ping(), 1.0)


async def test_strangers_and_crowds(world: World) -> None:
    """Nobody is asked who is no member, nor more than a few things at a time."""
    with pytest.raises(ControlError, match="no member has the id 'nobody'"):
        await world.asks.ask("nobody", Ping(), 1.0)
    tasks = [world.start() for _ in range(MAX_PER_INSTANCE)]
    await asked(world, MAX_PER_INSTANCE)
    with pytest.raises(ControlError, match="try again"):
        await world.asks.ask("a", Ping(), 1.0)
    world.asks.stop()
    assert {await code_of(task) for task in tasks} == {"stopping"}
    with pytest.raises(ControlError, match="stopping"):
        await world.asks.ask("a", Ping(), 1.0)
