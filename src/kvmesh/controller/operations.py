"""Operations: what people have asked to be done to the cluster, and how far it is. Kept in memory, bounded.

An operation has an id from the start and ends in one of `done`, `partly`, `failed`; then it never changes again. What
it does is in `kvmesh.controller.operation_runs`. Everything here runs on the controller's loop.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field

from kvmesh.controller.errors import ApiError
from kvmesh.controller.log import log
from kvmesh.controller.operation_bodies import AnyBody
from kvmesh.wire.control import ControlError
from kvmesh.wire.operations import Report, RunState

logger = logging.getLogger(__name__)

MAX_RUNNING = 64
MAX_KEPT = 500
GRACE_S = 5.0
"""So long after its time an operation may still hear how its parts have ended."""


@dataclass(slots=True, eq=False)
class Part:
    """What one instance does for an operation."""

    instance_id: str
    action: str
    report: Report = field(default_factory=lambda: Report(state=RunState.PENDING))
    error: ControlError | None = None

    def fail(self, error: ControlError) -> None:
        """End it; what was done before stays counted."""
        state = RunState.PARTLY if self.report.chunks_done else RunState.FAILED
        self.error = error
        self.end(state)

    def end(self, state: RunState, text: str = "") -> None:
        self.update(Report(state=state, text=text), keep_counts=True)

    def update(self, report: Report, *, keep_counts: bool = False) -> None:
        """Take a newer report."""
        if keep_counts:
            old = self.report
            report = Report(
                state=report.state,
                chunks_done=old.chunks_done,
                chunks_total=old.chunks_total,
                bytes_done=old.bytes_done,
                outcomes=old.outcomes,
                text=report.text,
            )
        self.report = report


@dataclass(slots=True, eq=False)
class Operation:
    """One operation. Times are the clock's, in seconds."""

    operation_id: str
    body: AnyBody
    """Without its keys, tokens and text once the operation has ended: they can be megabytes."""
    shown: dict[str, object]
    """The request as people may see it."""
    digest: bytes
    """Of the whole request, to know it again."""
    idempotency_key: str | None
    created_s: float
    parts: list[Part] = field(default_factory=list)
    error: ControlError | None = None
    state: RunState = RunState.PENDING
    finished_s: float | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None

    def part(self, instance_id: str, action: str) -> Part:
        """A new part of it."""
        made = Part(instance_id, action)
        self.parts.append(made)
        return made

    def forget_chunks(self) -> None:
        """Let go of what only carrying it out needs."""
        big = {"keys", "tokens", "text"} & type(self.body).model_fields.keys()
        self.body = self.body.model_copy(update=dict.fromkeys(big))

    def outcome(self) -> RunState:
        """Its state as its parts and its error say."""
        good = any(part.report.state is RunState.DONE or part.report.chunks_done for part in self.parts)
        if self.error is None and all(part.report.state is RunState.DONE for part in self.parts):
            return RunState.DONE
        return RunState.PARTLY if good else RunState.FAILED


def show(body: AnyBody) -> dict[str, object]:
    """A request with counts for long lists. Prompts are nobody else's business: only their lengths stay."""
    shown: dict[str, object] = {}
    for name, value in body.model_dump(by_alias=True, exclude_none=True).items():
        if name in ("keys", "tokens"):
            shown[name] = {"count": len(value)}
        elif name == "text":
            shown[name] = {"characters": len(value)}
        elif name != "cache_salt":
            shown[name] = value
    return shown


class Operations:
    """All operations that are remembered."""

    def __init__(self, run: Callable[[Operation], Awaitable[None]], clock: Callable[[], float]) -> None:
        """`run` does what an operation says; it may raise ControlError."""
        self._run_one = run
        self._clock = clock
        self._operations: OrderedDict[str, Operation] = OrderedDict()
        self._by_key: dict[str, Operation] = {}

    def start(self, body: AnyBody, idempotency_key: str | None = None) -> tuple[Operation, bool]:
        """Start an operation, or find the one that this request has started already; True for a new one.

        Raises ApiError: too many are running, or the idempotency key was used for something else.
        """
        digest = hashlib.sha256(body.model_dump_json().encode()).digest()
        known = self._find(digest, idempotency_key)
        if known is not None:
            return known, False
        running = sum(not operation.state.is_final for operation in self)
        if running >= MAX_RUNNING:
            hint = "wait for one to end, or DELETE one"
            raise ApiError(429, "too_many_operations", f"{running} operations are running", hint)
        self._make_room()
        operation = Operation(secrets.token_hex(8), body, show(body), digest, idempotency_key, self._clock())
        self._operations[operation.operation_id] = operation
        if idempotency_key is not None:
            self._by_key[idempotency_key] = operation
        log(logger, logging.INFO, "operation_started", id=operation.operation_id, kind=body.kind)
        operation.task = asyncio.get_running_loop().create_task(self._run(operation))
        return operation, True

    def get(self, operation_id: str) -> Operation:
        """Raises ApiError when it is not (or no longer) known."""
        found = self._operations.get(operation_id)
        if found is None:
            hint = f"the last {MAX_KEPT} are kept, until the controller stops: GET /api/v1/operations lists them"
            raise ApiError(404, "unknown_operation", f"there is no operation {operation_id[:100]!r}", hint)
        return found

    def cancel(self, operation_id: str) -> Operation:
        """Give up what has not been handed to an engine yet. Raises ApiError when it is not known."""
        operation = self.get(operation_id)
        if operation.task is not None and not operation.state.is_final:
            operation.task.cancel()
        return operation

    def __iter__(self) -> Iterator[Operation]:
        """Newest first."""
        return reversed(self._operations.values())

    # -- inside --------------------------------------------------------------------------------------------------------

    def _find(self, digest: bytes, key: str | None) -> Operation | None:
        if key is None:
            same = (operation for operation in self if not operation.state.is_final and operation.digest == digest)
            return next(same, None)
        known = self._by_key.get(key)
        if known is None or known.digest == digest:
            return known
        hint = f"that was operation {known.operation_id}; send another Idempotency-Key"
        raise ApiError(409, "idempotency_conflict", "this Idempotency-Key was used for another request", hint)

    def _make_room(self) -> None:
        while len(self._operations) >= MAX_KEPT:
            oldest = next(operation for operation in self._operations.values() if operation.state.is_final)
            del self._operations[oldest.operation_id]
            if oldest.idempotency_key is not None:
                del self._by_key[oldest.idempotency_key]

    async def _run(self, operation: Operation) -> None:
        operation.state = RunState.RUNNING
        try:
            await asyncio.wait_for(self._run_one(operation), operation.body.timeout_s + GRACE_S)
        except ControlError as error:
            operation.error = error
        except asyncio.TimeoutError:
            operation.error = ControlError("deadline", f"not done within {operation.body.timeout_s:g} s")
        except asyncio.CancelledError:
            operation.error = ControlError("cancelled", "given up; an engine finishes what it was handed already")
        except Exception as error:  # a bug of ours costs this operation
            logger.critical("traceback", exc_info=error)
            operation.error = ControlError("failed", repr(error))
        self._finish(operation)

    def _finish(self, operation: Operation) -> None:
        for part in operation.parts:
            if not part.report.state.is_final:
                part.fail(operation.error or ControlError("failed", "it did not come to its end"))
        operation.state = operation.outcome()
        operation.finished_s = self._clock()
        operation.forget_chunks()
        operation.ended.set()
        error = operation.error
        log(
            logger,
            logging.INFO if operation.state is RunState.DONE else logging.WARNING,
            "operation_ended",
            id=operation.operation_id,
            kind=operation.body.kind,
            state=operation.state.value,
            chunks=sum(part.report.chunks_done for part in operation.parts),
            seconds=round(operation.finished_s - operation.created_s, 3),
            error=None if error is None else f"{error.code}: {error.text}",
        )
