"""Backends: the engines' HTTP addresses, who they are, what is known of each. Pure state, owned by the event loop."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from kvmesh.router.load import Load


class Backend(NamedTuple):
    """Where an engine answers. `id` names one life of it, so that a pod replaced on the same address is another one."""

    id: str
    name: str
    """The engine's instance id in the directory; for pods the pod's name. Empty: not known."""
    host: str
    port: int

    @property
    def address(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def label(self) -> str:
        """What people call it, in logs and metrics."""
        return self.name or self.address


class ServedModel(NamedTuple):
    """A model that a backend serves, as its `/v1/models` says."""

    id: str
    root: str = ""
    """Path of the weights; for a LoRA adapter, of the adapter."""
    parent: str = ""
    """The base model of a LoRA adapter."""


class BackendState:
    """What is known of one backend."""

    __slots__ = ("backend", "draining", "failures", "healthy", "load", "models", "problem")

    def __init__(self, backend: Backend, load: Load) -> None:
        self.backend = backend
        self.load = load
        self.healthy = False
        """Whether the last health checks went well; False until the first one has."""
        self.failures = 0
        """Failed checks in a row."""
        self.problem = "not checked yet"
        """Why it is not healthy."""
        self.models: Mapping[str, ServedModel] | None = None
        """By model id; None while that is not known."""
        self.draining = False
        """Gone from discovery; requests under way may end."""

    @property
    def id(self) -> str:
        return self.backend.id


class Fleet:
    """All backends by id. The one place that says who may get a request."""

    def __init__(self, *, recent_half_life_s: float, max_requests_per_backend: int = 0) -> None:
        self._half_life_s = recent_half_life_s
        self._max_requests = max_requests_per_backend
        self._states: dict[str, BackendState] = {}

    def __iter__(self) -> Iterator[BackendState]:
        return iter(self._states.values())

    def __len__(self) -> int:
        return len(self._states)

    def get(self, backend_id: str) -> BackendState | None:
        return self._states.get(backend_id)

    def replace(self, backends: Iterable[Backend]) -> tuple[list[BackendState], list[BackendState]]:
        """Take over what discovery says now. Returns who is new and who has gone.

        A known id keeps its state. One whose address or name has changed is another backend.
        """
        wanted = {backend.id: backend for backend in backends}
        gone = [state for id_, state in self._states.items() if wanted.get(id_) != state.backend]
        for state in gone:
            state.draining = True
            del self._states[state.id]
        new = []
        for id_, backend in wanted.items():
            if id_ not in self._states:
                state = self._states[id_] = BackendState(backend, Load(self._half_life_s))
                new.append(state)
        return new, gone

    def candidates(self, model: str | None = None, without: Iterable[str] = ()) -> list[BackendState]:
        """Healthy backends with room that serve the model, in a stable order.

        When nobody is known to serve it, all healthy ones: the engine's own answer says best what is wrong, and an
        adapter may have been loaded a moment ago.
        """
        excluded = frozenset(without)
        able = [state for state in self._states.values() if state.healthy and state.id not in excluded]
        if self._max_requests:
            able = [state for state in able if state.load.inflight < self._max_requests]
        if model is None:
            return able
        serving = [state for state in able if state.models is None or model in state.models]
        return serving or able

    def healthy(self) -> int:
        """How many backends answer their health checks."""
        return sum(1 for state in self._states.values() if state.healthy)
