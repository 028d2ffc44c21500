"""How fast counters grow, as a decaying mean: two numbers per rate, however often it is fed. Pure."""

from __future__ import annotations

import math

TIME_CONSTANT_S = 20.0
"""A rate forgets two thirds of the past in so long: calm enough to read, quick enough to follow."""
NEGLIGIBLE = 0.02
"""Share of the last amount that is left after so long that it counts as nothing: eighty seconds."""


class Rate:
    """Amount per second. `now_s` is any clock that does not go back."""

    __slots__ = ("_at_s", "_peak", "_value")

    def __init__(self) -> None:
        self._value = self._peak = 0.0
        self._at_s = 0.0

    def add(self, amount: float, now_s: float) -> None:
        """So much came just now."""
        if amount <= 0:
            return
        self._value = self._peak = self._decayed(now_s) + amount / TIME_CONSTANT_S
        self._at_s = now_s

    def per_second(self, now_s: float) -> float:
        """The mean of the last while; 0 when it was long ago."""
        value = self._decayed(now_s)
        return value if value > NEGLIGIBLE * self._peak else 0.0

    def _decayed(self, now_s: float) -> float:
        return self._value * math.exp(-max(0.0, now_s - self._at_s) / TIME_CONSTANT_S)
