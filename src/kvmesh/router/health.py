"""Health checks: which backends answer, and which models they serve. One task per backend, on the event loop."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable

from kvmesh.router.backends import BackendState, Fleet
from kvmesh.router.models import ModelsRefusedError, ask_models, fetch, served
from kvmesh.router.upstream import Upstream, UpstreamError

log = logging.getLogger("kvmesh.router")

MAX_HEALTH_BYTES = 64 * 1024
MODELS_EVERY = 4
"""Models are asked for at every so many checks, and when a backend comes up."""
FIRST_RETRY_S = 0.25
"""A backend that is down is asked again soon, then ever more slowly up to the interval."""


class HealthChecks:
    """Keeps `healthy`, `problem` and `models` of all backends up to date."""

    def __init__(
        self,
        fleet: Fleet,
        upstream: Upstream,
        *,
        interval_s: float,
        timeout_s: float,
        failures: int,
        path: str,
        api_key: str = "",
        rng: random.Random | None = None,
        on_up: Callable[[BackendState], None] = lambda _: None,
    ) -> None:
        """`failures` in a row take a backend out; `api_key` is shown when models are asked for."""
        self._fleet = fleet
        self._upstream = upstream
        self._interval_s = interval_s
        self._timeout_s = timeout_s
        self._failures = failures
        self._path = path
        self._headers = f"Authorization: Bearer {api_key}\r\n".encode() if api_key else b""
        self._rng = rng or random.Random()
        self._on_up = on_up
        self._tasks: dict[BackendState, asyncio.Task[None]] = {}
        self._soon: dict[BackendState, asyncio.Event] = {}

    def follow(self, new: list[BackendState], gone: list[BackendState]) -> None:
        """Backends have come and gone."""
        for state in gone:
            self._soon.pop(state, None)
            task = self._tasks.pop(state, None)
            if task is not None:
                task.cancel()
        for state in new:
            self._soon[state] = asyncio.Event()
            self._tasks[state] = asyncio.create_task(self._watch(state), name=f"health {state.backend.label}")

    def failed(self, state: BackendState, problem: str, *, is_away: bool) -> None:
        """A request could not be served: the backend is checked at once. One that is away (no connection came about)
        gets no requests until a check has gone well.
        """
        if is_away:
            if state.healthy:
                log.warning("backend out backend=%s: %s", state.backend.label, problem)
            state.healthy, state.problem = False, problem
            state.failures = max(state.failures, self._failures)
        soon = self._soon.get(state)
        if soon is not None:
            soon.set()

    async def close(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _watch(self, state: BackendState) -> None:
        checks, retry_s = 0, FIRST_RETRY_S
        soon = self._soon[state]
        while True:
            soon.clear()
            try:
                await self._check(state, with_models=checks % MODELS_EVERY == 0 or not state.healthy)
            except Exception:
                log.exception("health check failed by an error of the router backend=%s", state.backend.label)
            checks += 1
            if state.healthy:
                pause_s, retry_s = self._interval_s, FIRST_RETRY_S
            else:
                pause_s, retry_s = retry_s, min(self._interval_s, 2 * retry_s)
            try:
                # Checks of many backends and routers must not march in step.
                await asyncio.wait_for(soon.wait(), pause_s * self._rng.uniform(0.9, 1.1))
            except asyncio.TimeoutError:
                continue
            await asyncio.sleep(FIRST_RETRY_S / 5)  # many requests may fail at once

    async def _check(self, state: BackendState, *, with_models: bool) -> None:
        try:
            status, _ = await fetch(
                self._upstream,
                state,
                "GET",
                self._path,
                timeout_s=self._timeout_s,
                limit_bytes=MAX_HEALTH_BYTES,
            )
            problem = "" if status == 200 else f"{self._path} answered {status}"
        except UpstreamError as error:
            problem = str(error)
        if problem:
            self._take_out(state, problem)
            return
        if with_models:
            await self._learn_models(state)
        if not state.healthy:
            log.info("backend up backend=%s address=%s", state.backend.label, state.backend.address)
        state.healthy, state.problem, state.failures = True, "", 0
        self._on_up(state)

    def _take_out(self, state: BackendState, problem: str) -> None:
        state.failures += 1
        state.problem = problem
        if state.healthy and state.failures >= self._failures:
            log.warning("backend out backend=%s: %s", state.backend.label, problem)
            state.healthy = False

    async def _learn_models(self, state: BackendState) -> None:
        """Not to know them is no fault: the engine may ask for an API key that the router has not been given."""
        try:
            state.models = served(await ask_models(self._upstream, state, self._headers, self._timeout_s))
        except (UpstreamError, ModelsRefusedError) as error:
            if state.models is None:
                log.info("models not known backend=%s: %s", state.backend.label, error)
