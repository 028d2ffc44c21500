"""Measures this engine's prefill from what vLLM tells a tier anyway: when a request is looked up, when it is scheduled
for the first time, and when its chunks have been stored. Scheduler thread only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvmesh.core.gate import Prefill

MAX_WATCHED = 4096
"""Requests; beyond it the oldest are no longer watched."""


@dataclass
class _Watched:
    looked_up_s: float
    prompt_tokens: int
    """Of the prompt's whole chunks."""
    scheduled_s: float | None = None
    is_fetched: bool = False
    first_token: int | None = None
    """Where what this engine computes begins."""


class PrefillWatch:
    """Feeds a `Prefill`."""

    def __init__(self, prefill: Prefill) -> None:
        self._prefill = prefill
        self._requests: dict[str, _Watched] = {}

    def looked_up(self, request_id: str, prompt_tokens: int, now_s: float) -> None:
        """The request has been looked up for the first time."""
        self._requests[request_id] = _Watched(now_s, prompt_tokens)
        if len(self._requests) > MAX_WATCHED:
            del self._requests[next(iter(self._requests))]

    def scheduled(self, request_ids: Iterable[str], now_s: float) -> None:
        """The engine computes these for the first time in the step that begins now."""
        for request_id in request_ids:
            watched = self._requests.get(request_id)
            if watched is not None and watched.scheduled_s is None:
                watched.scheduled_s = now_s
                if not watched.is_fetched:
                    self._prefill.queued(now_s - watched.looked_up_s)

    def stored(self, request_id: str, end_tokens: Sequence[int], chunk_tokens: int, now_s: float) -> None:
        """Chunks of the request are complete; `end_tokens` are their ends in the prompt, or later."""
        watched = self._requests.get(request_id)
        if watched is None or not end_tokens:
            return
        if watched.first_token is None:
            watched.first_token = max(0, min(end_tokens) - chunk_tokens)
        if max(end_tokens) < watched.prompt_tokens:
            return
        del self._requests[request_id]
        started_s = watched.scheduled_s if watched.scheduled_s is not None else watched.looked_up_s
        if max(end_tokens) == watched.prompt_tokens:  # later ones are answers, at another speed
            tokens = watched.prompt_tokens - watched.first_token
            self._prefill.computed(watched.first_token, tokens, now_s - started_s)

    def fetched(self, request_id: str) -> None:
        """A part of it is fetched: what it waits for is not the engine. What is computed of it counts."""
        watched = self._requests.get(request_id)
        if watched is not None:
            watched.is_fetched = True

    def forget(self, request_ids: Iterable[str]) -> None:
        """These were preempted: their times say nothing."""
        for request_id in request_ids:
            self._requests.pop(request_id, None)
