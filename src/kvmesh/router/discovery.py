"""Discovery: which backends there are. A source calls back with the whole list whenever it has changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from kvmesh.router.backends import Backend

OnBackends = Callable[[Sequence[Backend]], None]


class Discovery(Protocol):
    """Where backends come from. Lives on the event loop."""

    async def run(self, on_backends: OnBackends) -> None:
        """Tell of backends until cancelled. Handles its own failures: what was known stays."""


class StaticDiscovery:
    """A list that somebody has written down."""

    def __init__(self, backends: Sequence[Backend]) -> None:
        self._backends = tuple(backends)

    async def run(self, on_backends: OnBackends) -> None:
        on_backends(self._backends)
