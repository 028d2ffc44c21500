"""Answers the controller's questions to this node (`kvmesh.wire.control`). Lives on the node's event loop, but for
`answer`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

import kvmesh
from kvmesh.node.bridge import Bridge, NotAnsweredError
from kvmesh.wire import control, peer
from kvmesh.wire.control import ControlError, Question, Reply
from kvmesh.wire.directory import Answer, Ask, AskError

log = logging.getLogger("kvmesh.control")

SPARE_S = 1.0
"""So much later than a question's time is up its answer may still come."""
Q = TypeVar("Q", bound=Question)
_Handler = Callable[[Question], Awaitable[Reply]]


class Control:
    """The questions that this node can answer, and those that it is answering."""

    def __init__(self, bridge: Bridge, *, peers_may_change: bool) -> None:
        """`peers_may_change`: what comes over the peer port may also have something done."""
        self._bridge = bridge
        self._peers_may_change = peers_may_change
        self._handlers: dict[type[Question], _Handler] = {}
        self._running: set[asyncio.Task[None]] = set()
        self.add(control.Ping, _pong)

    def add(self, kind: type[Q], handler: Callable[[Q], Awaitable[Reply]]) -> None:
        """From now on `handler` answers questions of this kind. It may raise ControlError; it is cancelled when the
        question's time is up.
        """

        async def handle(question: Question) -> Reply:
            assert isinstance(question, kind)
            return await handler(question)

        self._handlers[kind] = handle

    def take(self, ask: Ask, answer: Callable[[Answer], None]) -> None:
        """Answer one question, later. Returns at once."""
        if len(self._running) >= control.MAX_RUNNING:
            error = ControlError("busy", f"{len(self._running)} questions are being answered: try again in a moment")
            answer(_refuse(ask, error))
            return
        task = asyncio.get_running_loop().create_task(self._answer(ask, answer))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    def answer(self, ask: peer.Ask) -> peer.Answered:
        """Answer a question that came over the peer port. Called by the peer server's threads."""
        try:
            return self._bridge.run(lambda: self._answer_peer(ask), ask.timeout_s + SPARE_S)
        except NotAnsweredError as error:
            return peer.Answered(b"", AskError("deadline", str(error)))

    async def _answer_peer(self, asked: peer.Ask) -> peer.Answered:
        ask = Ask("peer", "0" * 16, "0" * 16, asked.question, asked.timeout_s)
        if not self._peers_may_change and _changes(ask):
            text = "without a cluster key only nodes on loopback have something done that is asked over the peer port"
            return peer.Answered(b"", AskError("unauthorized", text))
        answered: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self.take(ask, lambda answer: None if answered.done() else answered.set_result(answer))
        answer = await answered
        return peer.Answered(answer.reply, answer.error)

    async def _answer(self, ask: Ask, answer: Callable[[Answer], None]) -> None:
        try:
            question = control.decode_question(ask, version=kvmesh.__version__)
            handler = self._handlers.get(type(question))
            if handler is None:
                raise ControlError("unsupported", f"this node has nobody to answer a {type(question).__name__}")
            timeout_s = min(ask.timeout_s, control.MAX_TIMEOUT_S)
            reply = control.encode_reply(await asyncio.wait_for(handler(question), timeout_s))
        except ControlError as error:
            answer(_refuse(ask, error))
        except asyncio.TimeoutError:
            answer(_refuse(ask, ControlError("deadline", f"no answer within {ask.timeout_s:g} s")))
        except Exception as error:  # whatever it is, it costs this question and not the node
            log.exception("question could not be answered bytes=%d", len(ask.question))
            answer(_refuse(ask, ControlError("failed", repr(error))))
        else:
            answer(Answer(ask.instance_id, ask.incarnation, ask.ask_id, reply))


def _changes(ask: Ask) -> bool:
    try:
        return isinstance(control.decode_question(ask, version=kvmesh.__version__), control.CHANGES)
    except ControlError:
        return False


def _refuse(ask: Ask, error: ControlError) -> Answer:
    return Answer(ask.instance_id, ask.incarnation, ask.ask_id, b"", control.make_error(error))


async def _pong(_: control.Ping) -> control.Pong:
    return control.Pong(version=kvmesh.__version__)
