"""What lookups gave, and what they could have given, over the last minutes and in all. Pure: time is passed in."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, fields

BUCKET_S = 60.0


@dataclass(slots=True)
class Usage:
    """Sums over some requests. Chunks are whole chunks of prompts, each counted once per request."""

    requests: int = 0
    chunks: int = 0
    device_chunks: int = 0
    """Found in the engines' own prefix caches, on the device."""
    own_chunks: int = 0
    """Found in the instance's own pool."""
    peer_chunks: int = 0
    """Fetched from other instances."""
    new_chunks: float = 0.0
    """Estimate of the chunks that nobody had asked for before (`kvmesh.core.sketch`): no cache could have had them."""
    new_variance: float = 0.0
    """Of that estimate."""
    new_alone: float = 0.0
    """Estimate of the chunks that this very instance had not been asked for before: without sharing, no pool of its own
    could have had them.
    """

    def add(self, other: Usage) -> None:
        for one in fields(self):
            setattr(self, one.name, getattr(self, one.name) + getattr(other, one.name))

    def note_new(self, weight: float) -> None:
        """Count one sampled new chunk, which stands for `weight` of them."""
        self.new_chunks += weight
        self.new_variance += weight * (weight - 1.0)

    @property
    def achieved(self) -> float | None:
        """Hit rate, 0 to 1; None without lookups."""
        if not self.chunks:
            return None
        return min(1.0, (self.device_chunks + self.own_chunks + self.peer_chunks) / self.chunks)

    @property
    def achievable(self) -> float | None:
        """Hit rate with unlimited pools and perfect sharing, 0 to 1; never below what was achieved."""
        achieved = self.achieved
        if achieved is None:
            return None
        return max(achieved, min(1.0, 1.0 - self.new_chunks / self.chunks))

    @property
    def achievable_alone(self) -> float | None:
        """Hit rate with unlimited pools and no sharing, 0 to 1."""
        return min(1.0, max(0.0, 1.0 - self.new_alone / self.chunks)) if self.chunks else None

    @property
    def achievable_error(self) -> float | None:
        """Two standard errors of `achievable`; 0 while every key is sampled."""
        return 2.0 * math.sqrt(max(0.0, self.new_variance)) / self.chunks if self.chunks else None


class UsageLog:
    """Usage minute by minute, for as many minutes as asked for, and in all."""

    def __init__(self, minutes: int = 60) -> None:
        self._buckets: deque[tuple[int, Usage]] = deque(maxlen=minutes)
        self.total = Usage()

    def now(self, now_s: float) -> Usage:
        """The bucket of this minute. Whoever adds to it adds to `total` too."""
        number = int(now_s // BUCKET_S)
        if not self._buckets or self._buckets[-1][0] != number:
            self._buckets.append((number, Usage()))
        return self._buckets[-1][1]

    def add(self, usage: Usage, now_s: float) -> None:
        self.now(now_s).add(usage)
        self.total.add(usage)

    def minutes(self, now_s: float) -> list[Usage]:
        """Minute by minute, the oldest first, this one included; shorter than asked for after a start."""
        known = dict(self._buckets)
        now = int(now_s // BUCKET_S)
        first = max(min(known, default=now), now + 1 - (self._buckets.maxlen or 60))
        return [known.get(number, Usage()) for number in range(first, now + 1)]

    def over(self, seconds: float, now_s: float) -> Usage:
        """The last `seconds`, to the minute."""
        first = int((now_s - seconds) // BUCKET_S) + 1
        found = Usage()
        for number, usage in self._buckets:
            if number >= first:
                found.add(usage)
        return found
