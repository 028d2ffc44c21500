"""What the command line reads of operations: clear, pin, unpin, drain, resume, warm, move (`docs/api.md`)."""

from __future__ import annotations

import msgspec

ENDED = frozenset({"done", "partly", "failed"})
"""States that never change any more."""


class OperationError(msgspec.Struct, frozen=True):
    """What went wrong, and what to do about it."""

    code: str
    message: str
    hint: str = ""


class OperationPart(msgspec.Struct, frozen=True):
    """What an operation does on one instance."""

    instance_id: str
    action: str
    state: str
    chunks_done: int = 0
    chunks_total: int = 0
    bytes_done: int = 0
    outcomes: dict[str, int] = {}
    """Chunks by what became of them."""
    note: str = ""
    error: OperationError | None = None


class Operation(msgspec.Struct, frozen=True):
    """One operation as it stands."""

    id: str
    kind: str
    state: str
    """pending, running, done, partly or failed."""
    created_age_s: float = 0.0
    finished_age_s: float | None = None
    chunks_done: int = 0
    chunks_total: int = 0
    bytes_done: int = 0
    instances: list[OperationPart] = []
    error: OperationError | None = None
    summary: str = ""

    @property
    def has_ended(self) -> bool:
        """Nothing will change any more."""
        return self.state in ENDED


class Operations(msgspec.Struct, frozen=True):
    """`GET /api/v1/operations`."""

    operations: list[Operation]
