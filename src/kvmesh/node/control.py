"""Answers the controller's questions to this node (`kvmesh.wire.control`). Lives on the node's event loop, but for
`answer`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import TypeVar

import msgspec

import kvmesh
from kvmesh.node.bridge import Bridge, NotAnsweredError
from kvmesh.wire import control, peer
from kvmesh.wire.control import ControlError, Question, Reply
from kvmesh.wire.directory import Answer, Ask, AskError

log = logging.getLogger("kvmesh.control")

SPARE_S = 1.0
"""So much later than a question's time is up its answer may still come."""
PEER_TIMEOUT_S = 65.0
"""Longest for a question over the peer port, which holds a thread."""
Q = TypeVar("Q", bound=Question)
_Handler = Callable[[Question], Awaitable[Reply]]


class Control:
    """The questions that this node can answer, and those that it is answering."""

    def __init__(self, bridge: Bridge, *, trusts_peers: bool) -> None:
        """`trusts_peers`: whoever asks over the peer port is a member of the cluster, or on this machine."""
        self._bridge = bridge
        self._trusts_peers = trusts_peers
        self._handlers: dict[type[Question], _Handler] = {}
        self._running: set[asyncio.Task[None]] = set()
        self._answering = 0
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

        async def reply() -> None:
            answered = await self._reply(ask.question, ask.timeout_s, is_trusted=True)
            answer(Answer(ask.instance_id, ask.incarnation, ask.ask_id, answered.reply, answered.error))

        task = asyncio.get_running_loop().create_task(reply())
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    def answer(self, ask: peer.Ask) -> peer.Answered:
        """Answer a question that came over the peer port. Called by the peer server's threads."""
        timeout_s = min(ask.timeout_s, PEER_TIMEOUT_S)

        def reply() -> Coroutine[None, None, peer.Answered]:
            return self._reply(ask.question, timeout_s, is_trusted=self._trusts_peers)

        try:
            return self._bridge.run(reply, timeout_s + SPARE_S)
        except NotAnsweredError as error:
            return peer.Answered(b"", AskError("unreachable", str(error)))

    async def _reply(self, encoded: bytes, timeout_s: float, *, is_trusted: bool) -> peer.Answered:
        if self._answering >= control.MAX_RUNNING:
            error = ControlError("busy", f"{self._answering} questions are being answered: try again in a moment")
            return peer.Answered(b"", control.make_error(error))
        self._answering += 1
        try:
            question = control.decode_question(encoded, version=kvmesh.__version__)
            if not is_trusted and not isinstance(question, control.OPEN_QUESTIONS):
                raise ControlError("unauthorized", "without a cluster key a node beyond loopback is not asked for this")
            handler = self._handlers.get(type(question))
            if handler is None:
                raise ControlError("unsupported", f"this node has nobody to answer a {type(question).__name__}")
            reply = await asyncio.wait_for(handler(question), min(timeout_s, control.MAX_TIMEOUT_S))
            if not is_trusted and isinstance(reply, control.Explained):
                reply = _without_probes(reply)
            return peer.Answered(control.encode_reply(reply))
        except ControlError as error:
            return peer.Answered(b"", control.make_error(error))
        except asyncio.TimeoutError:
            return peer.Answered(b"", AskError("deadline", f"no answer within {timeout_s:g} s"))
        except Exception as error:  # whatever it is, it costs this question and not the node
            log.exception("question could not be answered bytes=%d", len(encoded))
            return peer.Answered(b"", control.make_error(ControlError("failed", repr(error))))
        finally:
            self._answering -= 1


def _without_probes(explained: control.Explained) -> control.Explained:
    found = [msgspec.structs.replace(one, probe=control.Probe()) for one in explained.found]
    return control.Explained(found=found)


async def _pong(_: control.Ping) -> control.Pong:
    return control.Pong(version=kvmesh.__version__)
