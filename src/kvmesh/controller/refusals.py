"""Who was turned away a short while ago, and why, for people to see. Pure; bounded memory."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

MAX_REMEMBERED = 50
SHOWN_S = 300.0


class Refusal(NamedTuple):
    """One party that was turned away."""

    who: str
    """Instance id or address."""
    reason: str
    times: int
    at_s: float
    """The last time."""


class Refusals:
    """The last ones, by party and reason."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[str, str], Refusal] = OrderedDict()

    def add(self, who: str, reason: str, now_s: float) -> None:
        """Somebody was turned away."""
        before = self._known.pop((who, reason), None)
        self._known[who, reason] = Refusal(who, reason, 1 if before is None else before.times + 1, now_s)
        while len(self._known) > MAX_REMEMBERED:
            self._known.popitem(last=False)

    def recent(self, now_s: float) -> list[Refusal]:
        """Newest first."""
        return [one for one in reversed(self._known.values()) if now_s - one.at_s < SHOWN_S]
