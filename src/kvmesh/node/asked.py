"""What an engine knows of chunks whose holders its node asks for instead of keeping a replica (`index_mode: query`).

Answers are believed for a moment only: a chunk that somebody holds rarely moves within seconds, one that nobody held a
second ago may have been computed since. The scheduler thread asks and reads, the link's reading thread brings answers;
every step is one operation on a dict.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable

HELD_S = 10.0
MISSING_S = 1.0
PENDING_S = 5.0
"""A question without an answer for so long is asked again."""
MAX_KEYS = 200_000
"""Of each kind; beyond it the oldest go."""


class AskedKeys:
    """Answers by key, until when they are believed."""

    def __init__(self) -> None:
        self._held: dict[bytes, float] = {}
        self._missing: dict[bytes, float] = {}
        self._pending: dict[bytes, float] = {}

    def is_held(self, key: bytes) -> bool:
        """Whether somebody was said to hold it, not long ago."""
        return self._held.get(key, 0.0) > time.monotonic()

    def is_known(self, key: bytes) -> bool:
        """Whether there is an answer, of either kind."""
        now_s = time.monotonic()
        return self._held.get(key, 0.0) > now_s or self._missing.get(key, 0.0) > now_s

    def to_ask(self, keys: Iterable[bytes]) -> list[bytes]:
        """Those about which nothing is known and nothing is being asked; they count as being asked from now on."""
        now_s = time.monotonic()
        wanted = [key for key in keys if not self.is_known(key) and self._pending.get(key, 0.0) <= now_s]
        self._pending.update(dict.fromkeys(wanted, now_s + PENDING_S))
        _trim(self._pending)
        return wanted

    def answered(self, held: Iterable[bytes], missing: Iterable[bytes]) -> None:
        """An answer has come."""
        now_s = time.monotonic()
        for keys, known, other, believed_s in (
            (held, self._held, self._missing, HELD_S),
            (missing, self._missing, self._held, MISSING_S),
        ):
            for key in keys:
                other.pop(key, None)
                known.pop(key, None)  # so that it counts as the newest
                known[key] = now_s + believed_s
                self._pending.pop(key, None)
            _trim(known)

    def clear(self) -> None:
        """Forget everything: the node that was asked is gone."""
        for known in (self._held, self._missing, self._pending):
            known.clear()

    def __len__(self) -> int:
        return len(self._held)


def _trim(known: dict[bytes, float]) -> None:
    while len(known) > MAX_KEYS:
        with contextlib.suppress(RuntimeError, StopIteration):  # the other thread has changed it meanwhile
            known.pop(next(iter(known)), None)
