"""Questions to single nodes, and their answers (`kvmesh.wire.control`). Runs on the controller's loop.

Every question ends: with the node's reply, or with a ControlError that says why there is none (the node is gone, its
queue is full, its time is up, it refused). Nothing is asked twice by itself.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from kvmesh.controller.instances import DownReason, Instance, Peer
from kvmesh.controller.peer_asks import PeerAsks
from kvmesh.controller.registry import Registry, SendFailure
from kvmesh.wire import control
from kvmesh.wire import directory as wire
from kvmesh.wire.control import ControlError

MAX_OUTSTANDING = 512
"""Questions that wait for an answer, to all nodes together."""
MAX_PER_INSTANCE = 8
_GONE = {"left": "it has left", "timeout": "it has fallen silent", "replaced": "it was started anew"}


@dataclass(frozen=True, slots=True)
class _Waiting:
    instance_id: str
    incarnation: str
    answer: asyncio.Future[wire.Answer]


class Asks:
    """The questions that are out."""

    def __init__(self, registry: Registry, send: Callable[[Peer, bytes], SendFailure | None], peers: PeerAsks) -> None:
        """
        Args:
            registry: says who is a member; tells of those that go.
            send: hands one frame to one connection without waiting.
            peers: the way to those without a connection.
        """
        self._registry = registry
        self._send = send
        self._peers = peers
        self._waiting: dict[str, _Waiting] = {}
        self._stopped = False
        self.asked: Counter[str] = Counter()
        """Questions by how they ended: `answered`, or the error's code."""
        registry.on_removed.append(self._removed)

    async def ask(self, instance_id: str, question: control.Question, timeout_s: float) -> control.AnyReply:
        """Ask one instance and wait for its reply.

        Args:
            instance_id: a member; the question goes to the incarnation that is registered now.
            question: one of `control.AnyQuestion`.
            timeout_s: how long to wait, at most `control.MAX_TIMEOUT_S`.

        Raises:
            ControlError: there is no reply; code and text say why.
        """
        try:
            reply = await self._ask(instance_id, question, min(timeout_s, control.MAX_TIMEOUT_S))
        except ControlError as error:
            self.asked[error.code if error.code in _CODES else "refused"] += 1
            raise
        self.asked["answered"] += 1
        return reply

    async def ask_for(
        self, expected: type[control.R], instance_id: str, question: control.Question, timeout_s: float
    ) -> control.R:
        """As `ask`; a reply of another kind than `expected` is a ControlError (`bad_reply`) too."""
        reply = await self.ask(instance_id, question, timeout_s)
        if isinstance(reply, expected):
            return reply
        found = type(reply).__name__
        raise ControlError("bad_reply", f"instance {instance_id} replied {found} instead of {expected.__name__}")

    def on_answer(self, answer: wire.Answer) -> bool:
        """Take what came. False for an answer that nobody waits for (it came too late), or to another's question."""
        waiting = self._waiting.get(answer.ask_id)
        if waiting is None or (waiting.instance_id, waiting.incarnation) != (answer.instance_id, answer.incarnation):
            return False
        if not waiting.answer.done():
            waiting.answer.set_result(answer)
        return True

    def stop(self) -> None:
        """End all that are out, and take no more."""
        self._stopped = True
        for waiting in self._waiting.values():
            _fail(waiting, ControlError("stopping", "the controller is stopping"))
        self._peers.close()

    def outstanding(self) -> int:
        return len(self._waiting)

    # -- inside --------------------------------------------------------------------------------------------------------

    async def _ask(self, instance_id: str, question: control.Question, timeout_s: float) -> control.AnyReply:
        encoded = control.encode_question(question)
        instance = self._admit(instance_id)
        waiting = _Waiting(instance_id, instance.incarnation, asyncio.get_running_loop().create_future())
        ask_id = secrets.token_hex(8)
        ask = wire.Ask(instance_id, instance.incarnation, ask_id, encoded, timeout_s)
        self._waiting[ask_id] = waiting
        by_peer_port: asyncio.Task[None] | None = None
        try:
            if instance.peer.is_connected:
                failure = self._send(instance.peer, wire.encode(ask))
                if failure is not None:
                    raise ControlError("unreachable", _why_unsent(instance, failure))
            else:
                by_peer_port = asyncio.create_task(self._ask_peer(instance, ask, waiting))
            # Not `wait_for`, which before Python 3.12 forgets a cancellation that comes together with the answer.
            done, _ = await asyncio.wait((waiting.answer,), timeout=timeout_s)
            if not done:
                raise ControlError("deadline", _why_late(instance, question, timeout_s))
            answer = waiting.answer.result()
        finally:
            del self._waiting[ask_id]
            if by_peer_port is not None:
                by_peer_port.cancel()
        if answer.error is not None:
            raise ControlError(answer.error.code, f"instance {instance_id}: {answer.error.text}")
        return control.decode_reply(answer.reply)

    async def _ask_peer(self, instance: Instance, ask: wire.Ask, waiting: _Waiting) -> None:
        """Over the instance's peer port."""
        try:
            answered = await self._peers.ask(instance.member, ask.question, ask.timeout_s)
        except ControlError as error:
            _fail(waiting, error)
        except Exception as error:  # a bug of ours costs this question
            _fail(waiting, ControlError("unreachable", repr(error)))
        else:
            self.on_answer(wire.Answer(ask.instance_id, ask.incarnation, ask.ask_id, answered.reply, answered.error))

    def _admit(self, instance_id: str) -> Instance:
        if self._stopped:
            raise ControlError("stopping", "the controller is stopping")
        instance = self._registry.instances.get(instance_id)
        if instance is None:
            raise ControlError("unknown_instance", f"no member has the id {instance_id!r}")
        mine = sum(waiting.instance_id == instance_id for waiting in self._waiting.values())
        if mine >= MAX_PER_INSTANCE or len(self._waiting) >= MAX_OUTSTANDING:
            text = f"{mine} questions to instance {instance_id} and {len(self._waiting)} in all wait for answers"
            raise ControlError("too_many_questions", f"{text}: try again in a moment")
        return instance

    def _removed(self, instance: Instance, reason: DownReason) -> None:
        for waiting in self._waiting.values():
            if (waiting.instance_id, waiting.incarnation) == (instance.instance_id, instance.incarnation):
                text = f"instance {instance.instance_id} is no member any more: {_GONE[reason]}"
                _fail(waiting, ControlError("lost", text))


_CODES = frozenset(
    (
        *("unknown_instance", "question_too_large", "too_many_questions", "unreachable", "lost", "deadline"),
        *("bad_reply", "stopping", "unknown_question", "busy", "unauthorized"),
    )
)
"""Codes that are counted by name; a node can make up others."""


def _fail(waiting: _Waiting, error: ControlError) -> None:
    if not waiting.answer.done():
        waiting.answer.set_exception(error)


def _why_unsent(instance: Instance, failure: SendFailure) -> str:
    where = f"instance {instance.instance_id} at {instance.member.peer_address}"
    if failure is SendFailure.FULL:
        return f"{where} does not read what it is sent"
    return f"{where} has no connection to this controller now"


def _why_late(instance: Instance, question: control.Question, timeout_s: float) -> str:
    return (
        f"instance {instance.instance_id} did not answer a {type(question).__name__} within {timeout_s:g} s: it is "
        f"stopped or overloaded, or its kvmesh ({instance.member.version}) is too old to be asked"
    )
