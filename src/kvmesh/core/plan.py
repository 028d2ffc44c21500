"""The fetch planner: from whom to pull which chunk of a prefix. Pure; the caller brings the replica, loads and
breakers.

A fetch wants a run of chunks in prefix order. A chunk is of use only when all before it arrive too, so the plan stops
at the first chunk that nobody usable holds. What comes before is cut into pieces of a few MiB, and each piece goes to
the holder that would be done with it first, given what is under way from it already: that spreads a long prefix over
all its holders, and everybody's prefixes over the cluster. Each holder then sends its pieces in prefix order, so that
what has arrived at the deadline is nearly a prefix, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from kvmesh.core.keys import ChunkKey
from kvmesh.core.reasons import MissReason

PIECE_BYTES = 4 << 20
MAX_HOLDERS = 8
"""That one fetch is spread over: each costs a thread and connections."""


class FetchItem(NamedTuple):
    """One chunk wanted: its key and our slot to put it into."""

    key: ChunkKey
    slot: int


class Run(NamedTuple):
    """Consecutive chunks from one holder."""

    holder: str
    items: tuple[FetchItem, ...]


class Load(NamedTuple):
    """What is known of a holder's link."""

    under_way_bytes: int
    byte_s: float | None
    """Seconds per byte; None when it has not been measured."""


class Plan(NamedTuple):
    """Runs in prefix order, and the chunks that are not fetched, each with its reason."""

    runs: tuple[Run, ...]
    refused: tuple[tuple[FetchItem, MissReason], ...]

    def by_holder(self) -> list[Run]:
        """All that each holder is asked for, in prefix order, as one request; those with the first chunks first."""
        items: dict[str, list[FetchItem]] = {}
        for run in self.runs:
            items.setdefault(run.holder, []).extend(run.items)
        return [Run(holder, tuple(found)) for holder, found in items.items()]


class HolderIndex(Protocol):
    """Says who holds what: a replica, or what a directory has answered."""

    def holders(self, key: bytes) -> tuple[str, ...]:
        """Instance ids; empty when nobody is known to hold it."""


def plan_fetch(
    items: Sequence[FetchItem],
    replica: HolderIndex,
    *,
    usable: Callable[[str], MissReason | None],
    load: Callable[[str], Load],
    chunk_bytes: int,
    chance: Callable[[], float] = lambda: 0.0,
) -> Plan:
    """Assign each item a holder.

    Args:
        items: what is wanted, in prefix order.
        replica: says who holds it.
        usable: None when the instance may be asked now, otherwise the reason why not (breaker open, unreachable).
        load: what is under way from the instance, and how fast it is. Called once for each.
        chunk_bytes: size of a chunk.
        chance: a random number to choose by between holders that are equally good, so that not all choose the same.
    """
    loads = _Loads(load, chance, chunk_bytes)
    piece = max(1, PIECE_BYTES // chunk_bytes)
    runs: list[Run] = []
    holder, run = "", list[FetchItem]()

    def close_run() -> None:
        if run:
            loads.assign(holder, len(run))
            if runs and runs[-1].holder == holder:
                runs[-1] = Run(holder, (*runs[-1].items, *run))
            else:
                runs.append(Run(holder, tuple(run)))
            run.clear()

    for index, item in enumerate(items):
        holders = replica.holders(item.key)
        candidates = [each for each in holders if usable(each) is None]
        if not candidates:
            close_run()
            reason = next((why for each in holders if (why := usable(each))), MissReason.NOT_PUBLISHED)
            rest = ((other, MissReason.TRUNCATED) for other in items[index + 1 :])
            return Plan(tuple(runs), ((item, reason), *rest))
        if len(run) >= piece or holder not in candidates:
            close_run()
            holder = loads.best(candidates, min(piece, len(items) - index))
        run.append(item)
    close_run()
    return Plan(tuple(runs), ())


class _Loads:
    """When each holder would be done with one more piece."""

    def __init__(self, load: Callable[[str], Load], chance: Callable[[], float], chunk_bytes: int) -> None:
        self._load = load
        self._chance = chance
        self._chunk_bytes = chunk_bytes
        self._known: dict[str, tuple[Load, float]] = {}
        self._assigned: dict[str, int] = {}

    def best(self, candidates: Sequence[str], chunks: int) -> str:
        """The one that would be done first with so many chunks more."""
        if len(self._assigned) >= MAX_HOLDERS:
            candidates = [each for each in candidates if each in self._assigned] or candidates
        if len(candidates) == 1:
            return candidates[0]
        for each in candidates:
            if each not in self._known:
                self._known[each] = (self._load(each), self._chance())
        speeds = sorted(known.byte_s for known, _ in self._known.values() if known.byte_s is not None)
        usual = speeds[len(speeds) // 2] if speeds else 1.0  # who has not been measured is taken to be like the others
        size = chunks * self._chunk_bytes

        def done(each: str) -> tuple[float, float]:
            known, chance = self._known[each]
            byte_s = usual if known.byte_s is None else known.byte_s
            return (known.under_way_bytes + self._assigned.get(each, 0) + size) * byte_s, chance

        return min(candidates, key=done)

    def assign(self, holder: str, chunks: int) -> None:
        self._assigned[holder] = self._assigned.get(holder, 0) + chunks * self._chunk_bytes
