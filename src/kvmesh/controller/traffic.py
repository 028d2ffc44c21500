"""Who fetches from whom, how much and how fast. Pure; bounded memory."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

from kvmesh.controller.decaying import Rate
from kvmesh.wire.directory import FetchReport

MAX_ROUTES = 20_000
"""Pairs of receiver and holder. Beyond it the one that was used least recently is forgotten."""


class Route(NamedTuple):
    """One receiver and one holder, as they are now."""

    receiver: str
    holder: str
    fetches: int
    chunks: float
    bytes: float
    bytes_per_second: float
    last_at_s: float


class _Route:
    __slots__ = ("bytes", "chunks", "fetches", "last_at_s", "rate")

    def __init__(self) -> None:
        self.fetches = 0
        self.chunks = self.bytes = self.last_at_s = 0.0
        self.rate = Rate()


class Traffic:
    """Routes by receiver and holder, from fetch reports."""

    def __init__(self, max_routes: int = MAX_ROUTES) -> None:
        self._max_routes = max_routes
        self._routes: OrderedDict[tuple[str, str], _Route] = OrderedDict()
        """Least recently used first."""

    def __len__(self) -> int:
        return len(self._routes)

    def add(self, report: FetchReport, now_s: float) -> None:
        """Take a finished fetch. A report that does not say what each holder gave is split evenly between them."""
        if not report.holders or not report.chunks_fetched:
            return
        part = 1 / len(report.holders)
        for holder in report.holders:
            route = self._route(report.instance_id, holder)
            route.fetches += 1
            route.chunks += report.chunks_fetched * part
            route.bytes += report.fetched_bytes * part
            route.rate.add(report.fetched_bytes * part, now_s)
            route.last_at_s = now_s

    def routes(self, now_s: float) -> list[Route]:
        """All of them: those that are busy now first, then those that have moved most."""
        found = [
            Route(receiver, holder, one.fetches, one.chunks, one.bytes, one.rate.per_second(now_s), one.last_at_s)
            for (receiver, holder), one in self._routes.items()
        ]
        found.sort(key=lambda route: (route.bytes_per_second, route.bytes), reverse=True)
        return found

    def _route(self, receiver: str, holder: str) -> _Route:
        key = receiver, holder
        known = self._routes.get(key)
        if known is None:
            known = self._routes[key] = _Route()
            if len(self._routes) > self._max_routes:
                self._routes.popitem(last=False)
        else:
            self._routes.move_to_end(key)
        return known
