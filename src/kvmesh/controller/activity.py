"""What the members' fetches amount to: the last ones one by one, all of them in totals. Pure; bounded memory."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from typing import NamedTuple

from kvmesh.controller.history import History
from kvmesh.controller.traffic import Traffic
from kvmesh.core.reasons import MissReason
from kvmesh.wire.directory import FetchReport

RECENT_FETCHES = 200
_REASONS = frozenset(reason.value for reason in MissReason)
OTHER_REASON = "other"
"""Label of reasons that this version does not know."""


class FetchRecord(NamedTuple):
    """One finished fetch and when its report came."""

    number: int
    """Counts up from 1, so that pages and clients can tell what they have seen."""
    reported_at_s: float
    report: FetchReport


class Totals(NamedTuple):
    """Sums over all reports since the controller's start."""

    fetches: int = 0
    chunks_asked: int = 0
    chunks_fetched: int = 0
    fetched_bytes: int = 0
    fetch_seconds: float = 0.0


class Saved(NamedTuple):
    """Prefill that was not done again because others had done it."""

    tokens: int = 0
    """Of prompts' chunks that were fetched from other instances."""
    timed_tokens: int = 0
    """Those of them whose engine has told how fast it prefills."""
    seconds: float = 0.0
    """What their prefill would have taken."""


class Activity:
    """Fetch reports as they come in."""

    def __init__(self) -> None:
        self.recent: deque[FetchRecord] = deque(maxlen=RECENT_FETCHES)
        """Oldest first."""
        self.totals = Totals()
        self.misses: Counter[str] = Counter()
        """Chunks asked for and not fetched, by reason."""
        self.saved = Saved()
        self.traffic = Traffic()
        self.history = History(Totals._fields)
        """What the totals grew by in each step of the last hour."""

    def tick(self, now_s: float) -> None:
        """Time passes. To be called about once a second."""
        self.history.sample(now_s, *self.totals)

    def save(self, tokens: int, prefill_tokens_per_s: float) -> None:
        """An instance was spared the prefill of so many tokens; its rate is 0 when it is unknown."""
        timed = tokens if prefill_tokens_per_s > 0 else 0
        seconds = timed / prefill_tokens_per_s if timed else 0.0
        before = self.saved
        self.saved = Saved(before.tokens + tokens, before.timed_tokens + timed, before.seconds + seconds)

    def add(self, report: FetchReport, now_s: float) -> None:
        before = self.totals
        self.totals = Totals(
            before.fetches + 1,
            before.chunks_asked + report.chunks_asked,
            before.chunks_fetched + report.chunks_fetched,
            before.fetched_bytes + report.fetched_bytes,
            before.fetch_seconds + report.seconds,
        )
        self.recent.append(FetchRecord(self.totals.fetches, now_s, report))
        self.misses.update(known_reasons(report.misses))
        self.traffic.add(report, now_s)


def known_reasons(misses: Mapping[str, int]) -> dict[str, int]:
    """`misses` with unknown reasons summed up under `other`: what peers send must not invent metric labels."""
    known: dict[str, int] = {}
    for reason, chunks in misses.items():
        name = reason if reason in _REASONS else OTHER_REASON
        known[name] = known.get(name, 0) + chunks
    return known
