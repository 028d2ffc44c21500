"""The last hour as equal steps: what each counter grew by in each. Pure; bounded memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

STEP_S = 15.0
STEPS = 240
"""An hour."""


class History:
    """Growth of named counters over the last steps. `now_s` is any clock that does not go back."""

    def __init__(self, names: Sequence[str], step_s: float = STEP_S, steps: int = STEPS) -> None:
        self.step_s = step_s
        self._names = tuple(names)
        self._grown: deque[tuple[float, ...]] = deque(maxlen=steps)
        self._last: tuple[float, ...] | None = None
        self._due_s = 0.0

    def sample(self, now_s: float, *totals: float) -> None:
        """Take the counters as they are now, in the order of the names. May be called as often as one likes."""
        if self._last is None:
            self._last, self._due_s = totals, now_s + self.step_s
            return
        if now_s < self._due_s:
            return
        missed = int((now_s - self._due_s) / self.step_s)
        self._due_s += (missed + 1) * self.step_s
        nothing = (0.0,) * len(self._names)
        grown = tuple(max(0.0, after - before) for after, before in zip(totals, self._last, strict=True))
        self._last = totals
        self._grown.append(grown)
        self._grown.extend([nothing] * min(missed, self._grown.maxlen or 0))

    def __len__(self) -> int:
        return len(self._grown)

    def growth(self, name: str) -> list[float]:
        """What the counter grew by in each step, oldest first; shorter than an hour after a start."""
        index = self._names.index(name)
        return [step[index] for step in self._grown]

    def shares(self, part: str, whole: str) -> list[float | None]:
        """Of each step's `whole` that which was `part`; None where there was none."""
        parts, wholes = self._names.index(part), self._names.index(whole)
        return [step[parts] / step[wholes] if step[wholes] else None for step in self._grown]
