"""The node's answers: exactly one to each question, whatever it is and whatever becomes of it."""

from __future__ import annotations

import asyncio
import threading

import msgspec

from kvmesh.node.bridge import Bridge
from kvmesh.node.control import Control
from kvmesh.wire import control, peer
from kvmesh.wire import explain as told
from kvmesh.wire.control import ChangeSharing, ControlError, Ping, Pong, SharingIs
from kvmesh.wire.directory import Answer, Ask, AskError
from kvmesh.wire.operations import Sharing


def make_control() -> Control:
    return Control(Bridge(), trusts_peers=True)


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
    made = Control(bridge, trusts_peers=True)
    ask = peer.Ask(control.encode_question(Ping()), 5.0)
    refused = made.answer(ask)
    assert refused.error is not None
    assert (refused.error.code, refused.error.text) == ("unreachable", "this node is starting")
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
    for trusted in (False, True):
        bridge = Bridge()
        bridge.start()
        made = Control(bridge, trusts_peers=trusted)
        made.add(ChangeSharing, change)
        answered = await asyncio.to_thread(made.answer, ask)
        assert (answered.error.code if answered.error else "") == ("" if trusted else "unauthorized")
    assert changed == [Sharing.DRAINED]


async def test_who_is_not_authenticated_is_not_told_probes() -> None:
    """They help to tell what a prompt was."""
    found = control.ExplainedRequest(
        explanation=told.Explanation(
            request_id="r",
            instance_id="a",
            incarnation="0" * 16,
            age_s=0,
            wait_s=0,
            prompt_tokens=1,
            chunk_tokens=1,
            chunks=0,
            tail_tokens=1,
            found=told.Found(),
            summary="",
            spans=[],
            causes=[],
        ),
        probe=control.Probe(tokens_hash=b"hash"),
    )

    async def explain(_: control.ExplainRequest) -> control.Explained:
        return control.Explained(found=[found])

    for trusted in (False, True):
        bridge = Bridge()
        bridge.start()
        made = Control(bridge, trusts_peers=trusted)
        made.add(control.ExplainRequest, explain)
        ask = peer.Ask(control.encode_question(control.ExplainRequest(request="r")), 5.0)
        reply = control.decode_reply((await asyncio.to_thread(made.answer, ask)).reply)
        assert isinstance(reply, control.Explained)
        assert reply.found[0].probe.tokens_hash == (b"hash" if trusted else b"")


async def test_the_end_of_the_node_does_not_wait_for_answers() -> None:
    """The loop waits for the threads of its peer server, so it lets go of those that wait for it."""
    bridge = Bridge()
    bridge.start()
    made = Control(bridge, trusts_peers=True)
    asked = asyncio.Event()

    async def sleep(_: Ping) -> Pong:
        asked.set()
        await asyncio.sleep(60)
        raise AssertionError

    made.add(Ping, sleep)
    answers: list[peer.Answered] = []
    ask = peer.Ask(control.encode_question(Ping()), 60.0)
    thread = threading.Thread(target=lambda: answers.append(made.answer(ask)))
    thread.start()
    await asked.wait()
    bridge.close()
    thread.join(10)  # on the loop, as the node does
    assert answers == [peer.Answered(b"", AskError("unreachable", "this node is ending"))]
    assert made.answer(ask).error is not None
