"""Fetch jobs: plan whom to ask, run the transports in threads, report one outcome per chunk.

A job ends exactly once, when nothing can write into its slots any more: every transport that was given one of them has
returned. The job's deadline bounds all of it. When a holder fails, what it still owed is planned again with the
others, as long as time is left.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from kvmesh.core.keys import ChunkKey, group_of
from kvmesh.core.plan import FetchItem, HolderIndex, Plan, Run, plan_fetch
from kvmesh.core.reasons import PEER_FAULTS, MissReason
from kvmesh.node.peers import CORRUPT_LIMIT, Peer, Peers
from kvmesh.transfer.base import ChunkOutcome, Deadline, PeerTransport

log = logging.getLogger("kvmesh.fetch")

MAX_THREADS = 16
ROUNDS = 3
"""Plans per job: the first, and at most two more for what failed."""
FAIR_TIME_S = 0.5
"""A peer that delivers nothing until a deadline is at fault only if it had so much time."""


class JobResult(NamedTuple):
    """A finished job. `outcomes` are in the order of the items."""

    outcomes: list[ChunkOutcome]
    holders: list[str]
    """Instances that supplied chunks, in order of first use."""
    seconds: float
    corrupt: dict[str, int]
    """Chunks that arrived with wrong bytes, by the instance that delivered them."""
    asked: dict[int, str] = {}  # noqa: RUF012  (never changed)
    """Whom a slot's chunk was last asked of."""

    def fetched(self) -> list[ChunkOutcome]:
        return [outcome for outcome in self.outcomes if outcome.reason is None]

    def misses(self) -> dict[MissReason, int]:
        counts: dict[MissReason, int] = {}
        for outcome in self.outcomes:
            if outcome.reason is not None:
                counts[outcome.reason] = counts.get(outcome.reason, 0) + 1
        return counts


class Fetcher:
    """Runs fetch jobs for one pool. Lives on the node's event loop; transports run in its threads."""

    def __init__(
        self,
        replica: HolderIndex,
        peers: Peers,
        *,
        chunk_bytes: int,
        stall_s: float,
        abort: Callable[[], None],
        quarantine: Callable[[str, str, ChunkKey], None],
    ) -> None:
        """
        Args:
            replica: says who holds what.
            peers: whom we may ask, and how.
            chunk_bytes: size of a chunk.
            stall_s: longest time without a byte from a peer.
            abort: ends the process at once; called when a transport can no longer be trusted with slots.
            quarantine: (instance id, incarnation, key) is not to be asked again; called on the loop.
        """
        self._replica = replica
        self._peers = peers
        self._chunk_bytes = chunk_bytes
        self._stall_s = stall_s
        self._abort = abort
        self._quarantine = quarantine
        self._threads = ThreadPoolExecutor(MAX_THREADS, thread_name_prefix="fetch")
        self._active: set[Peer] = set()
        self._giving_up = False

    async def fetch(self, items: Sequence[FetchItem], timeout_s: float) -> JobResult:
        """Pull `items` into their slots. Never raises; whatever goes wrong is a reason in the outcomes."""
        started_s = time.monotonic()
        deadline = Deadline(started_s + timeout_s, self._stall_s)
        decided: dict[int, ChunkOutcome] = {}
        holders: dict[str, None] = {}
        excluded: set[str] = set()
        corrupt: dict[str, int] = {}
        asked: dict[int, str] = {}
        wanted = list(items)
        for _ in range(ROUNDS):
            plan = self._plan(wanted, excluded)
            for item, reason in plan.refused:
                known = decided.get(item.slot)
                decided[item.slot] = known or ChunkOutcome(item, reason, None)
            if not plan.runs or time.monotonic() >= deadline.at_s or self._giving_up:
                for run in plan.runs:
                    _decide(decided, run.items, MissReason.DRAINING if self._giving_up else MissReason.DEADLINE)
                break
            results = await asyncio.gather(*(self._run(run, deadline) for run in plan.runs))
            for run, outcomes in zip(plan.runs, results, strict=True):
                for outcome in outcomes:
                    decided[outcome.item.slot] = outcome
                    if outcome.reason is not MissReason.TRUNCATED:
                        asked[outcome.item.slot] = run.holder
                    if outcome.reason is None:
                        holders[run.holder] = None
                    elif outcome.reason is not MissReason.TRUNCATED:
                        excluded.add(run.holder)
                    if outcome.reason is MissReason.CORRUPT:
                        corrupt[run.holder] = corrupt.get(run.holder, 0) + 1
            wanted = [item for item in items if decided[item.slot].reason is not None]
            if not wanted:
                break
        outcomes = [decided[item.slot] for item in items]
        return JobResult(outcomes, list(holders), time.monotonic() - started_s, corrupt, asked)

    def give_up(self) -> None:
        """End all running jobs at once by giving their peers new transports and closing the old ones."""
        self._giving_up = True
        for peer in list(self._active):
            self._peers.renew(peer)

    def resume(self) -> None:
        """Accept work again after `give_up`."""
        self._giving_up = False

    def close(self) -> None:
        self._giving_up = True
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _plan(self, items: Sequence[FetchItem], excluded: set[str]) -> Plan:
        """One plan per KV cache group: groups are separate prefixes."""

        def usable(holder: str) -> MissReason | None:
            return MissReason.RECENTLY_FAILED if holder in excluded else self._peers.usable(holder)

        groups: dict[bytes, list[FetchItem]] = {}
        for item in items:
            groups.setdefault(group_of(item.key), []).append(item)
        runs: list[Run] = []
        refused: list[tuple[FetchItem, MissReason]] = []
        for group in groups.values():
            plan = plan_fetch(group, self._replica, usable=usable, load_bytes=self._peers.load_bytes)
            runs.extend(plan.runs)
            refused.extend(plan.refused)
        return Plan(tuple(runs), tuple(refused))

    async def _run(self, run: Run, deadline: Deadline) -> list[ChunkOutcome]:
        peer = self._peers.get(run.holder)
        if peer is None:
            return [ChunkOutcome(item, MissReason.PEER_UNREACHABLE, None) for item in run.items]
        size = len(run.items) * self._chunk_bytes
        peer.add_load(size)
        peer.breaker.begin()
        self._active.add(peer)
        try:
            loop = asyncio.get_running_loop()
            outcomes, seconds = await loop.run_in_executor(self._threads, _fetch, peer.transport, run.items, deadline)
        except Exception:
            # A transport that raises has broken its promise, so its slots may still be written into. Ending the
            # process is the
            # one way left to be sure; the engine starts a new node.
            log.exception("transport broke its contract peer=%s transport=%s", run.holder, peer.transport.name)
            self._abort()
            raise
        finally:
            peer.add_load(-size)
            self._active.discard(peer)
        self._judge(peer, outcomes, seconds)
        return outcomes

    def _judge(self, peer: Peer, outcomes: Sequence[ChunkOutcome], seconds: float) -> None:
        """Learn from a run: what is not to be asked for again, and whether the peer is to be left alone."""
        if self._giving_up:
            peer.breaker.undecided()
            return
        for item, reason, _ in outcomes:
            if peer.note(item.key, reason):
                self._quarantine(peer.member.instance_id, peer.member.incarnation, item.key)
        reasons = {outcome.reason for outcome in outcomes}
        faults = {reason.value for reason in reasons if reason is not None and reason in PEER_FAULTS}
        if not faults and MissReason.DEADLINE in reasons and None not in reasons:
            # Not a byte of use in all that time. Without it, a peer whose stall time is longer than our deadlines
            # would cost every request its deadline.
            if seconds < FAIR_TIME_S:
                peer.breaker.undecided()
                return
            faults.add(MissReason.DEADLINE.value)
        if not faults:
            peer.breaker.succeeded()
            return
        peer.breaker.failed(time.monotonic(), again=peer.corrupt_chunks >= CORRUPT_LIMIT and "corrupt" in faults)
        log.warning(
            "peer failed instance=%s address=%s reasons=%s; leaving it alone for a moment",
            peer.member.instance_id,
            peer.member.peer_address,
            ",".join(sorted(faults)),
        )


def _fetch(
    transport: PeerTransport, items: Sequence[FetchItem], deadline: Deadline
) -> tuple[list[ChunkOutcome], float]:
    """In a thread: the outcomes, and the seconds that the peer had (without the wait for the thread)."""
    started_s = time.monotonic()
    return transport.fetch(items, deadline), time.monotonic() - started_s


def make_items(keys: Sequence[bytes], slots: Sequence[int]) -> list[FetchItem]:
    """Pair keys with the slots they are to be fetched into."""
    return [FetchItem(ChunkKey(key), slot) for key, slot in zip(keys, slots, strict=True)]


def _decide(decided: dict[int, ChunkOutcome], items: Iterable[FetchItem], reason: MissReason) -> None:
    for item in items:
        decided.setdefault(item.slot, ChunkOutcome(item, reason, None))
