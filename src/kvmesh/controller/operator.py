"""The parts that operations need, put together."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

from kvmesh.controller.asks import Asks
from kvmesh.controller.carry_out import Commander
from kvmesh.controller.errors import ApiError
from kvmesh.controller.operation_bodies import AnyBody, DrainBody, MoveBody, PinBody, WarmBody
from kvmesh.controller.operation_runs import Runs
from kvmesh.controller.operation_views import OperationView, operation_view
from kvmesh.controller.operations import MAX_KEPT, Operation, Operations
from kvmesh.controller.registry import Registry
from kvmesh.controller.selection import Selection, find_instance, is_sharing


class Operator:
    """Starts operations and shows them. Used by the API and the page, on the controller's loop."""

    def __init__(self, registry: Registry, asks: Asks, clock: Callable[[], float]) -> None:
        self._registry = registry
        self._clock = clock
        commander = Commander(asks, clock)
        self.asks = asks
        self.selection = Selection(registry, asks, commander)
        self.operations = Operations(Runs(registry, commander, self.selection, clock).run, clock)

    def start(self, body: AnyBody, idempotency_key: str | None = None) -> tuple[Operation, bool]:
        """See `Operations.start`. Raises ApiError for what can be seen not to work from here."""
        self._check(body)
        return self.operations.start(body, idempotency_key)

    def view(self, operation_id: str) -> OperationView:
        """Raises ApiError when it is not known."""
        return operation_view(self.operations.get(operation_id), self._clock())

    def views(self, *, state: str | None = None, kind: str | None = None, limit: int = MAX_KEPT) -> list[OperationView]:
        """Newest first; only those of a state or a kind, if one is given."""
        found = (
            operation
            for operation in self.operations
            if state in (None, operation.state.value) and kind in (None, operation.body.kind)
        )
        return [operation_view(operation, self._clock()) for operation in islice(found, limit)]

    def _check(self, body: AnyBody) -> None:
        if isinstance(body, MoveBody):
            source, target = find_instance(self._registry, body.source), find_instance(self._registry, body.to)
            if source.group is not target.group:
                hint = "GET /api/v1/incompatibilities says in what they differ"
                text = f"{body.source} and {body.to} have different formats: they cannot use each other's chunks"
                raise ApiError(409, "format_mismatch", text, hint)
            self._check_sharing(body.source)
            self._check_sharing(body.to)
            return
        if body.instance is not None:
            find_instance(self._registry, body.instance)
        if isinstance(body, WarmBody):
            for name in (body.instance, *(body.sources or ())):
                find_instance(self._registry, name)
            self._check_sharing(body.instance)
        elif isinstance(body, DrainBody | PinBody) and body.instance is not None:
            self._check_sharing(body.instance)

    def _check_sharing(self, instance_id: str) -> None:
        instance = find_instance(self._registry, instance_id)
        if not is_sharing(instance):
            text = f"instance {instance_id} is {instance.statistics.sharing}"
            raise ApiError(409, "draining", text, 'resume it first: {"kind": "resume"}, or start its engine anew')
