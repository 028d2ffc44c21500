"""Whether chunks are to come coded (`kvmesh.transfer.codec`) or raw: coded only while that is faster. Pure.

For one peer, in seconds per byte of a chunk:

    raw    = u                      measured by fetches that came raw
    coded  = max(2 e, 2 d, r * u)   as long as fewer than TRIES coded fetches have been measured at this speed
           = k + r * u              afterwards; k is what the best of the last TRIES took beyond the link's part
    coded is chosen while  coded < (1 - MARGIN) * raw

with e and d, the processor time that encoding and decoding take, and r, coded bytes per byte, measured on chunks of
this very format; twice (BUSY), because processors have other things to do. The first form says that the three overlap;
where it is wrong, that costs TRIES fetches in RETRY_S, and k knows better from then on.

Raw is what everything is compared with. So it takes two fetches that say that a link is slow (the first one, too, may
have met a hiccup), and one that says that it is fast. And it is measured anew every now and then while coded is chosen:
a link that has become fast must not stay coded for ever. That costs at most REFRESH_SHARE of the time of fetches.
"""

from __future__ import annotations

MARGIN = 0.1
NEW_WEIGHT = 0.5
"""Of a new measurement of a link."""
FACT_WEIGHT = 0.2
"""Of a new measurement of the codec, which comes with every chunk."""
MIN_BYTES = 256 << 10
"""A smaller fetch says more about the round trip than about the link."""
TRIES = 3
"""The first ones are often slow, for reasons that have nothing to do with coding: the link's queue, say."""
RETRY_S = 60.0
"""After so long a link on which coding did not pay is tried again: the processor may have been busy."""
REFRESH_S = 30.0
REFRESH_SHARE = 0.05
BUSY = 2.0
"""What coding takes at least, over its processor time, before it has been seen to take less."""
CHANGED = 1.5
"""A link so much faster or slower than when k was measured is another link."""


class CodecFacts:
    """What coding takes and brings for one format on this machine, as moving averages. Its owner sees to threads."""

    def __init__(self) -> None:
        self.encode_s: float | None = None
        """Seconds per byte of a chunk; None before the first measurement, as the others."""
        self.decode_s: float | None = None
        self.ratio: float | None = None
        """Coded bytes per byte of a chunk."""

    def encoded(self, raw_bytes: int, wire_bytes: int, seconds: float) -> None:
        """Take in that so many bytes became so many."""
        if raw_bytes > 0:
            self.encode_s = _blend(self.encode_s, seconds / raw_bytes, FACT_WEIGHT)
            self.ratio = _blend(self.ratio, wire_bytes / raw_bytes, FACT_WEIGHT)

    def decoded(self, raw_bytes: int, wire_bytes: int, seconds: float) -> None:
        """Take in that so many bytes were made of so many."""
        if raw_bytes > 0:
            self.decode_s = _blend(self.decode_s, seconds / raw_bytes, FACT_WEIGHT)
            self.ratio = _blend(self.ratio, wire_bytes / raw_bytes, FACT_WEIGHT)


class CodecChoice:
    """Raw or coded, for one peer. Its owner sees to threads."""

    def __init__(self, facts: CodecFacts) -> None:
        self._facts = facts
        self._raw_s: float | None = None
        """u of the module's docstring; None before two fetches."""
        self._slow_s: float | None = None
        """What the last fetch said, when it was the first to say that the link is slow."""
        self._raw_until_s = 0.0
        """time.monotonic() until which that is fresh."""
        self._extra_s: list[float] = []
        """Of the last coded fetches; k is the smallest."""
        self._extra_at_s = self._extra_link_s = 0.0
        """When the last one was, and u then."""

    def wants_coded(self, now_s: float) -> bool:
        """Whether the next fetch is to come coded."""
        raw_s, coded_s = self._raw_s, self.coded_s(now_s)
        if raw_s is None or coded_s is None or coded_s >= (1 - MARGIN) * raw_s:
            return False
        return now_s < self._raw_until_s

    def coded_s(self, now_s: float) -> float | None:
        """Predicted seconds per byte of a chunk that comes coded; None before everything has been measured."""
        raw_s, facts = self._raw_s, self._facts
        if raw_s is None or facts.ratio is None or facts.encode_s is None or facts.decode_s is None:
            return None
        link_s = facts.ratio * raw_s
        if len(self._extra_s) == TRIES and self._is_known(now_s, raw_s):
            return min(self._extra_s) + link_s
        return max(BUSY * facts.encode_s, BUSY * facts.decode_s, link_s)

    def came_raw(self, now_s: float, raw_bytes: int, seconds: float) -> None:
        """A fetch of so many bytes (those that others pulled meanwhile included) took so long."""
        if raw_bytes < MIN_BYTES or seconds <= 0:
            return
        self._raw_until_s = now_s + max(REFRESH_S, seconds / REFRESH_SHARE)
        before_s, slow_s, new_s = self._raw_s, self._slow_s, seconds / raw_bytes
        self._slow_s = None
        if before_s is not None and new_s <= before_s * CHANGED:
            self._raw_s = new_s if new_s < before_s / CHANGED else _blend(before_s, new_s, NEW_WEIGHT)
        elif slow_s is not None:
            self._raw_s = min(slow_s, new_s)
        else:
            self._slow_s = new_s

    def came_coded(self, now_s: float, raw_bytes: int, wire_bytes: int, seconds: float) -> None:
        """The same of a fetch that came coded; `raw_bytes` is the size of its chunks."""
        if raw_bytes < MIN_BYTES or seconds <= 0 or self._raw_s is None:
            return
        extra_s = max(0.0, (seconds - wire_bytes * self._raw_s) / raw_bytes)
        before = self._extra_s[1 - TRIES :] if self._is_known(now_s, self._raw_s) else []
        self._extra_s = [*before, extra_s]
        self._extra_at_s, self._extra_link_s = now_s, self._raw_s

    def _is_known(self, now_s: float, raw_s: float) -> bool:
        """Whether k still counts: it is fresh, and the link is as it was then."""
        is_same_link = self._extra_link_s / CHANGED < raw_s < self._extra_link_s * CHANGED
        return is_same_link and now_s - self._extra_at_s < RETRY_S


def _blend(old: float | None, new: float, weight: float) -> float:
    return new if old is None else old + weight * (new - old)
