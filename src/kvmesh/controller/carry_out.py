"""Having one instance carry out a command: hand it over, ask how far it is, until it has ended."""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import msgspec

from kvmesh.controller.asks import Asks
from kvmesh.controller.operations import Part
from kvmesh.wire import control
from kvmesh.wire.control import ControlError
from kvmesh.wire.directory import MAX_KEYS_PER_MESSAGE
from kvmesh.wire.operations import AnyCommand, ListHot, Report, RunState, Sharing

ASK_TIMEOUT_S = 10.0
TELL_WAIT_S = 1.0
"""A node answers when a command has ended, or after so long, so that progress shows."""
LATE_S = 3.0
"""So long after its time a node may still say how a command has ended."""
RETRY_S = 0.2
_AGAIN = frozenset({"deadline", "unreachable", "too_many_questions", "busy"})
"""A node that was silent or crowded for a moment. When it is gone for good, the registry says so (`lost`)."""

MakeCommand = Callable[[list[bytes]], AnyCommand]


class Commander:
    """Speaks with nodes about commands."""

    def __init__(self, asks: Asks, clock: Callable[[], float]) -> None:
        self._asks = asks
        self._clock = clock

    async def run(self, part: Part, command: AnyCommand, until_s: float) -> None:
        """Carry out one command and keep `part` up to date. Raises nothing but cancellation: the part says it all."""
        try:
            part.update(await self._finish(part.instance_id, command, until_s, part.update))
            if part.report.state is RunState.FAILED and part.report.text:
                part.error = ControlError("engine", part.report.text)
        except ControlError as error:
            part.fail(error)

    async def run_with(self, part: Part, make: MakeCommand, keys: Sequence[bytes], until_s: float) -> None:
        """As `run`, for any number of keys: in pieces that fit into one message each, and counted together."""
        done, total, size, outcomes = 0, len(keys), 0, Counter[str]()

        def sum_up(report: Report) -> Report:
            return msgspec.structs.replace(
                report,
                chunks_done=done + report.chunks_done,
                chunks_total=total,
                bytes_done=size + report.bytes_done,
                outcomes=dict(outcomes + Counter(report.outcomes)),
            )

        part.update(sum_up(Report(state=RunState.RUNNING)))
        try:
            for piece in _pieces(keys):
                report = await self._finish(
                    part.instance_id, make(piece), until_s, lambda report: part.update(_running(sum_up(report)))
                )
                part.update(_running(sum_up(report)))
                done, size = done + report.chunks_done, size + report.bytes_done
                outcomes.update(report.outcomes)
                if report.state is RunState.FAILED and report.text:
                    part.fail(ControlError("engine", report.text))
                    return
        except ControlError as error:
            part.fail(error)
            return
        part.end(RunState.DONE if done == total else RunState.PARTLY if done else RunState.FAILED)

    async def hottest(self, instance_id: str, limit: int, until_s: float) -> list[bytes]:
        """The chunks that an instance used last. Raises ControlError."""
        report = await self._finish(instance_id, ListHot(limit=limit), until_s, lambda _: None)
        if report.state is not RunState.DONE:
            raise ControlError("engine", f"instance {instance_id}: {report.text or 'its engine did not say'}")
        return report.keys

    async def change_sharing(self, instance_id: str, sharing: Sharing, until_s: float) -> None:
        """Have an instance take part in less, or in everything again. Raises ControlError."""
        question = control.ChangeSharing(sharing=sharing)
        await self._patiently(control.SharingIs, instance_id, question, until_s)

    async def _finish(
        self, instance_id: str, command: AnyCommand, until_s: float, told: Callable[[Report], None]
    ) -> Report:
        operation_id = secrets.token_hex(8)
        left_s = max(1.0, until_s - self._clock())
        start = control.StartOperation(operation_id=operation_id, command=command, timeout_s=left_s)
        report = (await self._patiently(control.Told, instance_id, start, until_s)).report
        tell = control.TellOperation(operation_id=operation_id, wait_s=TELL_WAIT_S)
        while not report.state.is_final:
            told(report)
            report = (await self._patiently(control.Told, instance_id, tell, until_s)).report
        return report

    async def _patiently(
        self, expected: type[control.R], instance_id: str, question: control.Question, until_s: float
    ) -> control.R:
        """Ask until there is an answer or the time is up. All questions here may be asked twice without harm."""
        while True:
            try:
                left_s = until_s + LATE_S - self._clock()
                return await self._asks.ask_for(expected, instance_id, question, min(ASK_TIMEOUT_S, max(0.5, left_s)))
            except ControlError as error:
                if error.code not in _AGAIN or self._clock() + RETRY_S >= until_s + LATE_S:
                    raise
            await asyncio.sleep(RETRY_S)


def _running(report: Report) -> Report:
    return msgspec.structs.replace(report, state=RunState.RUNNING) if report.state.is_final else report


def _pieces(keys: Sequence[bytes]) -> Iterator[list[bytes]]:
    for start in range(0, len(keys), MAX_KEYS_PER_MESSAGE):
        yield list(keys[start : start + MAX_KEYS_PER_MESSAGE])
