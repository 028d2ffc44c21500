"""One fetch per key at a time: who asks for a chunk that is on its way already waits for it and gets a copy.

The chunk is copied out of the slot of the job that fetches it, which therefore is not over before the copy is made:
only then may its engine do with the slot what it likes. Runs on the node's event loop; copies run in a thread.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Sequence

from kvmesh.core.keys import ChunkKey
from kvmesh.core.plan import FetchItem
from kvmesh.core.reasons import MissReason
from kvmesh.transfer.base import ChunkOutcome
from kvmesh.transfer.pool import HostPool

log = logging.getLogger("kvmesh.fetch")


class Joiner:
    """A chunk that one job waits for and another one fetches."""

    def __init__(self, item: FetchItem) -> None:
        self.item = item
        self.outcome: asyncio.Future[ChunkOutcome] = asyncio.get_running_loop().create_future()
        self.is_served = False
        """Its slot may be written into from now on until `outcome` is there."""


class UnderWay:
    """The chunks that jobs are fetching now, and who waits for them."""

    def __init__(self, pool: HostPool) -> None:
        self._pool = pool
        self._waiting: dict[ChunkKey, list[Joiner]] = {}
        """By every key that is being fetched."""
        self.joined_chunks = 0
        """Copied from another job's slot instead of being fetched."""

    def claim(self, items: Iterable[FetchItem]) -> tuple[list[FetchItem], list[Joiner]]:
        """What the caller is to fetch, and has to `settle`; and what others are fetching, each of which it has to
        `wait` for, or to `leave` at once.
        """
        own, others = list[FetchItem](), list[Joiner]()
        for item in items:
            waiting = self._waiting.get(item.key)
            if waiting is None:
                own.append(item)
                self._waiting[item.key] = []
                continue
            others.append(Joiner(item))
            waiting.append(others[-1])
        return own, others

    async def wait(self, joiner: Joiner, until_s: float) -> ChunkOutcome:
        """The outcome of a chunk that somebody else fetches, with its bytes in our slot where it is a hit. DEADLINE at
        time.monotonic() `until_s`; then nobody writes into the slot any more.
        """
        await asyncio.wait((joiner.outcome,), timeout=max(0.0, until_s - time.monotonic()))
        if joiner.outcome.done() or joiner.is_served:
            return await joiner.outcome
        self.leave(joiner)
        return ChunkOutcome(joiner.item, MissReason.DEADLINE, None)

    def leave(self, joiner: Joiner) -> None:
        """Wait no longer. Only for who is not being served yet: its slot is its own again."""
        self._waiting[joiner.item.key].remove(joiner)

    async def settle(self, outcomes: Sequence[ChunkOutcome]) -> None:
        """The caller's chunks are decided. Returns when all who waited have got them, so that it may give its slots
        back. What was settled before is passed over.
        """
        for outcome in outcomes:
            waiting = self._waiting.pop(outcome.item.key, None)
            if not waiting:
                continue
            for joiner in waiting:
                joiner.is_served = True
            served = outcome if outcome.reason is not None else await self._copied(outcome, waiting)
            for joiner in waiting:
                joiner.outcome.set_result(served._replace(item=joiner.item))

    async def _copied(self, outcome: ChunkOutcome, waiting: Sequence[Joiner]) -> ChunkOutcome:
        """The outcome for those who wait: a miss where the copy failed, so that they ask themselves."""
        slots = [joiner.item.slot for joiner in waiting]
        try:
            await asyncio.get_running_loop().run_in_executor(None, self._copy, outcome.item.slot, slots)
        except Exception:  # whoever waits must hear of it; our own chunk is none the worse
            log.exception("chunk could not be copied for %d other jobs slot=%d", len(slots), outcome.item.slot)
            return outcome._replace(reason=MissReason.PEER_LOST, checksum=None)
        self.joined_chunks += len(slots)
        return outcome

    def _copy(self, source: int, slots: Sequence[int]) -> None:
        for slot in slots:
            self._pool.row(slot)[:] = self._pool.row(source)
