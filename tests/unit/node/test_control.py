"""The node's answers: exactly one to each question, whatever it is and whatever becomes of it."""

from __future__ import annotations

import asyncio

import msgspec

from kvmesh.node.bridge import Bridge
from kvmesh.node.control import Control
from kvmesh.wire import control, peer
from kvmesh.wire.control import ChangeSharing, ControlError, Ping, Pong, SharingIs
from kvmesh.wire.directory import Answer, Ask
from kvmesh.wire.operations import Sharing


def make_control(*, peers_may_change: bool = True) -> Control:
    return Control(Bridge(), peers_may_change=peers_may_change)


WHO = ("a", "0" * 16, "1" * 16)


def make_ask(question: bytes, timeout_s: float = 5.0) -> Ask:
    return Ask(*WHO, question, timeout_s)


PING = make_ask(control.encode_question(Ping()))


async def put(made: Control, ask: Ask) -> Answer:
    answers: asyncio.Queue[Answer] = asyncio.Queue()
    made.take(ask, answers.put_nowait)
    answer = await answers.get()
    assert answers.empty()
    assert (answer.instance_id, answer.incarnation, answer.ask_id) == WHO
    assert (answer.error is None) == bool(answer.reply)
    return answer


def code(answer: Answer) -> str:
    assert answer.error is not None
    return answer.error.code


async def test_a_reply() -> None:
    answer = await put(make_control(), PING)
    assert isinstance(control.decode_reply(answer.reply), Pong)


async def test_questions_of_a_newer_controller_are_refused_by_name() -> None:
    answer = await put(make_control(), make_ask(msgspec.msgpack.encode({"type": "Weather", "where": "here"})))
    assert code(answer) == "unknown_question"
    assert "'Weather'" in answer.error.text


async def test_fields_that_were_added_later_do_no_harm() -> None:
    answer = await put(make_control(), make_ask(msgspec.msgpack.encode({"type": "Ping", "loud": True})))
    assert answer.error is None


async def test_what_is_no_question() -> None:
    for junk in (b"", b"\xc1", msgspec.msgpack.encode(["Ping"]), msgspec.msgpack.encode({"type": 3})):
        assert code(await put(make_control(), make_ask(junk))) == "bad_question"


async def test_whatever_a_handler_does_there_is_one_answer() -> None:
    """It may refuse, break, say too much or never end."""

    async def refuses(_: Ping) -> Pong:
        raise ControlError("too_hot", "not now")

    async def breaks(_: Ping) -> Pong:
        raise ZeroDivisionError

    async def talks(_: Ping) -> Pong:
        return Pong(version="x" * control.MAX_REPLY_BYTES)

    async def sleeps(_: Ping) -> Pong:
        await asyncio.Event().wait()
        raise AssertionError

    expected = {refuses: "too_hot", breaks: "failed", talks: "reply_too_large", sleeps: "deadline"}
    for handler, wanted in expected.items():
        made = make_control()
        made.add(Ping, handler)
        assert code(await put(made, msgspec.structs.replace(PING, timeout_s=0.01))) == wanted


async def test_only_so_many_at_a_time() -> None:
    made, opened, answers = make_control(), asyncio.Event(), []

    async def waits(_: Ping) -> Pong:
        await opened.wait()
        return Pong(version="1")

    made.add(Ping, waits)
    for _ in range(control.MAX_RUNNING):
        made.take(PING, answers.append)
    assert code(await put(made, PING)) == "busy"
    opened.set()
    while len(answers) < control.MAX_RUNNING:
        await asyncio.sleep(0)
    assert all(answer.error is None for answer in answers)


async def test_questions_over_the_peer_port() -> None:
    """Answered like the controller's, on the loop, for the thread of the connection."""
    bridge = Bridge()
    made = Control(bridge, peers_may_change=False)
    ask = peer.Ask(control.encode_question(Ping()), 5.0)
    refused = made.answer(ask)
    assert refused.error is not None
    assert (refused.error.code, refused.error.text) == ("deadline", "this node is starting")
    bridge.start()
    answered = await asyncio.to_thread(made.answer, ask)
    assert answered.error is None
    assert isinstance(control.decode_reply(answered.reply), Pong)
    junk = await asyncio.to_thread(made.answer, peer.Ask(b"junk", 5.0))
    assert junk.error is not None
    assert junk.error.code == "bad_question"


async def test_who_is_not_authenticated_has_nothing_done() -> None:
    """Not over the peer port of a node that others than this machine's programs reach."""
    changed: list[Sharing] = []

    async def change(question: ChangeSharing) -> SharingIs:
        changed.append(question.sharing)
        return SharingIs(sharing=question.sharing, published_chunks=0)

    ask = peer.Ask(control.encode_question(ChangeSharing(sharing=Sharing.DRAINED)), 5.0)
    for may_change in (False, True):
        bridge = Bridge()
        bridge.start()
        made = Control(bridge, peers_may_change=may_change)
        made.add(ChangeSharing, change)
        answered = await asyncio.to_thread(made.answer, ask)
        assert (answered.error.code if answered.error else "") == ("" if may_change else "unauthorized")
    assert changed == [Sharing.DRAINED]
