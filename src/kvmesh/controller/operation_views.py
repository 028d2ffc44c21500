"""Operations as the API and the page show them. The field names are the API: add freely, rename never."""

from __future__ import annotations

from pydantic import BaseModel, Field

from kvmesh.controller.errors import LISTS_INSTANCES
from kvmesh.controller.operations import Operation, Part
from kvmesh.wire.control import ControlError

HINTS = {
    "deadline": "look at the instance and its log; start the operation again with a longer timeout_s",
    "lost": "it is no member any more: kvmesh status, or GET /api/v1/instances, lists who is",
    "unknown_instance": LISTS_INSTANCES,
    "unreachable": "it has no connection to this controller now: look at its log",
    "unknown_question": "run the same kvmesh version on the controller and all instances",
    "unknown_operation": "the instance's node was started anew meanwhile: start the operation again",
    "no_engine": "a node without an engine has a pool that nobody can change",
    "no_receiver": "start another instance of its format, or drain with hand_over 0",
    "no_source": "start another instance of its format, or name the chunks",
    "not_held": "warm an instance with these chunks first",
    "no_tokenizer": "send tokens or keys instead of text",
    "cancelled": "start the operation again to do the rest",
}
_ELSE = "the instance's log says more"


class ProblemView(BaseModel):
    """What went wrong, and what to do about it."""

    code: str
    message: str
    hint: str

    @classmethod
    def of(cls, error: ControlError) -> ProblemView:
        return cls(code=error.code, message=error.text, hint=HINTS.get(error.code, _ELSE))


class PartView(BaseModel):
    """What one instance does for an operation."""

    instance_id: str
    action: str = Field(description="clear, pin, unpin, warm, drain or resume.")
    state: str = Field(description="pending, running, done, partly or failed.")
    chunks_done: int
    chunks_total: int
    bytes_done: int
    outcomes: dict[str, int] = Field(description="Chunks by what became of them.")
    note: str = Field(description="What it waits for, if anything.")
    error: ProblemView | None


class OperationView(BaseModel):
    """One operation. With a state of done, partly or failed it has ended and changes no more."""

    id: str
    kind: str
    state: str = Field(description="pending, running, done, partly or failed.")
    url: str
    created_age_s: float
    finished_age_s: float | None
    timeout_s: float
    request: dict[str, object] = Field(description="What was asked for; long lists are shown as their count.")
    chunks_done: int
    chunks_total: int
    bytes_done: int
    instances: list[PartView]
    error: ProblemView | None
    summary: str


class OperationsView(BaseModel):
    """Newest first."""

    operations: list[OperationView]


def operation_view(operation: Operation, now_s: float) -> OperationView:
    """One operation as it is at `now_s`."""
    parts = [_part_view(part) for part in operation.parts]
    done, total = sum(part.chunks_done for part in parts), sum(part.chunks_total for part in parts)
    return OperationView(
        id=operation.operation_id,
        kind=operation.body.kind,
        state=operation.state.value,
        url=f"/api/v1/operations/{operation.operation_id}",
        created_age_s=max(0.0, now_s - operation.created_s),
        finished_age_s=None if operation.finished_s is None else max(0.0, now_s - operation.finished_s),
        timeout_s=operation.body.timeout_s,
        request=operation.shown,
        chunks_done=done,
        chunks_total=total,
        bytes_done=sum(part.bytes_done for part in parts),
        instances=parts,
        error=None if operation.error is None else ProblemView.of(operation.error),
        summary=_summary(operation, done, total),
    )


def _part_view(part: Part) -> PartView:
    report = part.report
    return PartView(
        instance_id=part.instance_id,
        action=part.action,
        state=report.state.value,
        chunks_done=report.chunks_done,
        chunks_total=report.chunks_total,
        bytes_done=report.bytes_done,
        outcomes=dict(report.outcomes),
        note="" if part.error is not None else report.text,
        error=None if part.error is None else ProblemView.of(part.error),
    )


def _summary(operation: Operation, done: int, total: int) -> str:
    body = operation.body
    names = [getattr(body, name, None) for name in ("instance", "source", "to")]
    where = " to ".join(str(name) for name in names if name) or "everywhere"
    chunks = f": {done} of {total} chunks" if total else ""
    return f"{body.kind} {where}{chunks}"
