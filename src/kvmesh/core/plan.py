"""The fetch planner: from whom to pull which chunk of a prefix. Pure; the caller brings the replica, loads and
breakers.

A fetch wants a run of chunks in prefix order. A chunk is of use only when all before it arrive too, so the plan stops
at the first chunk that nobody usable holds. Among holders the one with fewer bytes under way wins, and a run stays
with its holder while that holder has the next chunk: long runs cost fewer requests and arrive in order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from kvmesh.core.keys import ChunkKey
from kvmesh.core.reasons import MissReason


class FetchItem(NamedTuple):
    """One chunk wanted: its key and our slot to put it into."""

    key: ChunkKey
    slot: int


class Run(NamedTuple):
    """Consecutive chunks from one holder."""

    holder: str
    items: tuple[FetchItem, ...]


class Plan(NamedTuple):
    """Runs in prefix order, and the chunks that are not fetched, each with its reason."""

    runs: tuple[Run, ...]
    refused: tuple[tuple[FetchItem, MissReason], ...]


class HolderIndex(Protocol):
    """Says who holds what: a replica, or what a directory has answered."""

    def holders(self, key: bytes) -> tuple[str, ...]:
        """Instance ids; empty when nobody is known to hold it."""


def plan_fetch(
    items: Sequence[FetchItem],
    replica: HolderIndex,
    *,
    usable: Callable[[str], MissReason | None],
    load_bytes: Callable[[str], int],
) -> Plan:
    """Assign each item a holder.

    usable: None when the instance may be asked now, otherwise the reason why not (breaker open, unreachable).
    load_bytes: bytes under way from the instance now; the least loaded holder is preferred.
    """
    runs: list[Run] = []
    current: str | None = None
    run: list[FetchItem] = []
    for index, item in enumerate(items):
        holders = replica.holders(item.key)
        candidates = [holder for holder in holders if usable(holder) is None]
        if not candidates:
            if run and current is not None:
                runs.append(Run(current, tuple(run)))
            reason = next((why for holder in holders if (why := usable(holder))), MissReason.NOT_PUBLISHED)
            rest = ((other, MissReason.TRUNCATED) for other in items[index + 1 :])
            return Plan(tuple(runs), ((item, reason), *rest))
        if current not in candidates:
            if run and current is not None:
                runs.append(Run(current, tuple(run)))
            current, run = min(candidates, key=load_bytes), []
        run.append(item)
    if run and current is not None:
        runs.append(Run(current, tuple(run)))
    return Plan(tuple(runs), ())
