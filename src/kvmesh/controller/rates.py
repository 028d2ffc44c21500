"""How fast an instance fetches and serves now, from the counters in its heartbeats. Pure: callers bring the time."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from kvmesh.wire.directory import NodeStatistics

WINDOW_S = 20.0
"""Rates are means over about so long."""
SPACING_S = 1.0
"""Counters are kept at most so often: 20 readings per instance."""


class Rates(NamedTuple):
    """Means over the last `over_s` seconds."""

    fetched_bytes_per_s: float
    served_bytes_per_s: float
    fetches_per_s: float
    over_s: float


class _Reading(NamedTuple):
    at_s: float
    fetched_bytes: int
    served_bytes: int
    fetches: int


class RateMeter:
    """One instance's last readings."""

    __slots__ = ("_readings",)

    def __init__(self) -> None:
        self._readings: deque[_Reading] = deque()

    def note(self, statistics: NodeStatistics, now_s: float) -> None:
        """Take what a heartbeat reports. Counters that went down (a lie, or an overflow) start anew."""
        reading = _Reading(now_s, statistics.fetched_bytes, statistics.served_bytes, statistics.fetches)
        last = self._readings[-1] if self._readings else None
        if last is not None and any(new < old for new, old in zip(reading[1:], last[1:], strict=True)):
            self._readings.clear()
        elif len(self._readings) > 1 and now_s - self._readings[-2].at_s < SPACING_S:
            self._readings.pop()
        self._readings.append(reading)
        while len(self._readings) > 2 and now_s - self._readings[1].at_s >= WINDOW_S:
            self._readings.popleft()

    def rates(self) -> Rates | None:
        """None before there are two readings."""
        if len(self._readings) < 2:
            return None
        first, last = self._readings[0], self._readings[-1]
        over_s = last.at_s - first.at_s
        if over_s <= 0:
            return None
        return Rates(
            (last.fetched_bytes - first.fetched_bytes) / over_s,
            (last.served_bytes - first.served_bytes) / over_s,
            (last.fetches - first.fetches) / over_s,
            over_s,
        )
