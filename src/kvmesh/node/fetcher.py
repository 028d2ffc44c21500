"""Fetch jobs: plan whom to ask, run the transports in threads, report one outcome per chunk.

A job ends exactly once, when nothing can write into its slots any more: every transport that was given one of them has
returned. The job's deadline bounds all of it. A long prefix is pulled from several holders at the same time; when one
of them fails, what it still owed is planned again with the others at once, as long as time is left. What another job
is fetching already is waited for instead (`joins.py`), and what does not pay is not fetched (`kvmesh.core.gate`).
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from kvmesh.core.gate import NO_GATE, GateDecision, Policy, Saved, Source, Verdict, deadline_s, decide
from kvmesh.core.keys import ChunkKey, group_of
from kvmesh.core.plan import FetchItem, HolderIndex, Plan, Run, plan_fetch
from kvmesh.core.reasons import PEER_FAULTS, MissReason
from kvmesh.node.joins import UnderWay
from kvmesh.node.peers import CORRUPT_LIMIT, Peer, Peers
from kvmesh.transfer.base import ChunkOutcome, Deadline, PeerTransport
from kvmesh.transfer.pool import HostPool

log = logging.getLogger("kvmesh.fetch")

MAX_THREADS = 16
MAX_PLANS = 9
"""Per job: the first, and so many more for what failed."""
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
    gate: GateDecision | None = None
    """What the gate said; None when there was nothing to decide."""
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


class _Job:
    """The books of one job."""

    def __init__(self, items: Sequence[FetchItem], deadline: Deadline) -> None:
        self.items = items
        self.deadline = deadline
        self.decided: dict[int, ChunkOutcome] = {}
        """By slot."""
        self.holders: dict[str, None] = {}
        self.excluded: set[str] = set()
        """Holders that have failed in this job."""
        self.corrupt: dict[str, int] = {}
        self.asked: dict[int, str] = {}
        """Holder by slot."""
        self.plans = 0
        self.gate: GateDecision | None = None

    def take(self, run: Run, outcomes: Iterable[ChunkOutcome]) -> list[FetchItem]:
        """Enter what has become of a run; returns what is missing."""
        missing = []
        for outcome in outcomes:
            self.decided[outcome.item.slot] = outcome
            if outcome.reason is not MissReason.TRUNCATED:
                self.asked[outcome.item.slot] = run.holder
            if outcome.reason is None:
                self.holders[run.holder] = None
                continue
            missing.append(outcome.item)
            if outcome.reason is not MissReason.TRUNCATED:
                self.excluded.add(run.holder)
            if outcome.reason is MissReason.CORRUPT:
                self.corrupt[run.holder] = self.corrupt.get(run.holder, 0) + 1
        return missing

    def miss(self, items: Iterable[FetchItem], reason: MissReason) -> None:
        """These are not fetched. The first reason that was found counts."""
        for item in items:
            self.decided.setdefault(item.slot, ChunkOutcome(item, reason, None))

    def outcomes(self, items: Iterable[FetchItem]) -> list[ChunkOutcome]:
        """In order; what nobody has decided on is missed."""
        self.miss(items, MissReason.PEER_LOST)
        return [self.decided[item.slot] for item in items]


class Fetcher:
    """Runs fetch jobs for one pool. Lives on the node's event loop; transports run in its threads."""

    def __init__(
        self,
        replica: HolderIndex,
        peers: Peers,
        pool: HostPool,
        *,
        stall_s: float,
        abort: Callable[[], None],
        quarantine: Callable[[str, str, ChunkKey], None],
        policy: Policy = NO_GATE,
    ) -> None:
        """
        Args:
            replica: says who holds what.
            peers: whom we may ask, and how.
            pool: whose slots are fetched into.
            stall_s: longest time without a byte from a peer.
            abort: ends the process at once; called when a transport can no longer be trusted with slots.
            quarantine: (instance id, incarnation, key) is not to be asked again; called on the loop.
            policy: when to leave a chunk to be computed.
        """
        self._replica = replica
        self._peers = peers
        self._chunk_bytes = pool.chunk_bytes
        self._stall_s = stall_s
        self._abort = abort
        self._quarantine = quarantine
        self._policy = policy
        self._threads = ThreadPoolExecutor(MAX_THREADS, thread_name_prefix="fetch")
        self._active: set[Peer] = set()
        self._giving_up = False
        self.under_way = UnderWay(pool)

    async def fetch(self, items: Sequence[FetchItem], timeout_s: float, saved: Saved | None = None) -> JobResult:
        """Pull `items` into their slots. Never raises; whatever goes wrong is a reason in the outcomes.

        Args:
            items: chunks in prefix order, each with its slot.
            timeout_s: for all of it.
            saved: what computing them would take; None where that is not known, or does not matter.
        """
        started_s = time.monotonic()
        job = _Job(items, Deadline(started_s + timeout_s, self._stall_s))
        own, others = self.under_way.claim(items)
        until_s = job.deadline.at_s  # the gate cuts only what we pull ourselves
        await self._pull_and_settle(job, own, saved)
        if others:
            waits = [self.under_way.wait(joiner, until_s) for joiner in others]
            await self._take_joined(job, await asyncio.gather(*waits))
        outcomes = job.outcomes(items)
        seconds = time.monotonic() - started_s
        return JobResult(outcomes, list(job.holders), seconds, job.corrupt, job.gate, job.asked)

    async def _take_joined(self, job: _Job, outcomes: Sequence[ChunkOutcome]) -> None:
        """What others have fetched for us; what they have not got we try ourselves."""
        for outcome in outcomes:
            if outcome.reason is None or job.deadline.remaining_s() <= 0:
                job.decided[outcome.item.slot] = outcome
        own, others = self.under_way.claim(out.item for out in outcomes if out.item.slot not in job.decided)
        for joiner in others:
            self.under_way.leave(joiner)
            job.miss([joiner.item], MissReason.TRUNCATED)
        if own:
            await self._pull_and_settle(job, own, None)

    async def _pull_and_settle(self, job: _Job, own: Sequence[FetchItem], saved: Saved | None) -> None:
        try:
            await self._pull(job, own, saved)
        finally:
            await self.under_way.settle(job.outcomes(own))

    async def _pull(self, job: _Job, wanted: Sequence[FetchItem], saved: Saved | None) -> None:
        """Plan and run until nothing is missing, nobody is left to ask, or time is up."""
        plan = self._gate(job, self._plan(wanted, job.excluded), saved)
        running = self._start(job, plan)
        while running:
            done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            missing: list[FetchItem] = []
            for task in done:
                run, outcomes = task.result()
                missing += job.take(run, outcomes)
                await self.under_way.settle([outcome for outcome in outcomes if outcome.reason is None])
            if missing and job.plans < MAX_PLANS:
                running |= self._start(job, self._plan(missing, job.excluded))

    def _start(self, job: _Job, plan: Plan) -> set[asyncio.Task[tuple[Run, list[ChunkOutcome]]]]:
        job.plans += 1
        for item, reason in plan.refused:
            job.miss([item], reason)
        runs = plan.by_holder()
        if job.deadline.remaining_s() <= 0 or self._giving_up:
            for run in runs:
                job.miss(run.items, MissReason.DRAINING if self._giving_up else MissReason.DEADLINE)
            return set()
        return {asyncio.create_task(self._run(run, job.deadline)) for run in runs}

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
            plan = plan_fetch(
                group,
                self._replica,
                usable=usable,
                load=self._peers.load,
                chunk_bytes=self._chunk_bytes,
                chance=random.random,
            )
            runs.extend(plan.runs)
            refused.extend(plan.refused)
        return Plan(tuple(runs), tuple(refused))

    def _gate(self, job: _Job, plan: Plan, saved: Saved | None) -> Plan:
        """The part of the plan that pays. Sets the job's deadline to what computing that part would take."""
        if saved is None or not plan.runs or not self._policy.is_on:
            return plan
        peers = {run.holder: self._peers.get(run.holder) for run in plan.runs}
        sources = [
            Source(run.holder, len(run.items), peer.rate.rate if peer else None, peer.pulls if peer else 0)
            for run in plan.runs
            for peer in (peers[run.holder],)
        ]
        timeout_s = job.deadline.remaining_s()
        decision = decide(self._policy, sources, saved, chunk_bytes=self._chunk_bytes, timeout_s=timeout_s)
        job.gate = decision
        job.deadline = job.deadline._replace(at_s=time.monotonic() + deadline_s(self._policy, decision, timeout_s))
        if not decision.refused:
            return plan
        for run in plan.runs:
            refused_by = peers[run.holder]
            if refused_by is not None:
                refused_by.refused(item.key for item in run.items)
        keep = decision.chunks
        if keep and len({group_of(item.key) for run in plan.runs for item in run.items}) > 1:
            return plan  # a part of the chunks of several groups is no prefix
        runs, left_out = [], list[FetchItem]()
        for run in plan.runs:
            if keep:
                runs.append(Run(run.holder, run.items[:keep]))
            left_out += run.items[keep:]
            keep = max(0, keep - len(run.items))
        verdict = "computing is faster" if decision.verdict is Verdict.SLOWER else "only a part pays"
        log.info("gate: %s; %s", verdict, decision)
        return Plan(tuple(runs), (*((item, MissReason.GATE_REFUSED) for item in left_out), *plan.refused))

    async def _run(self, run: Run, deadline: Deadline) -> tuple[Run, list[ChunkOutcome]]:
        peer = self._peers.get(run.holder)
        if peer is None:
            return run, [ChunkOutcome(item, MissReason.PEER_UNREACHABLE, None) for item in run.items]
        size = len(run.items) * self._chunk_bytes
        others_before = peer.pulls
        peer.add_load(size)
        peer.pulls += 1
        peer.breaker.begin()
        self._active.add(peer)
        try:
            fetched = await self._in_a_thread(peer.transport, run.items, deadline)
        except Exception:
            # A transport that raises has broken its promise, so its slots may still be written into. Ending the
            # process is the one way left to be sure; the engine starts a new node.
            log.exception("transport broke its contract peer=%s transport=%s", run.holder, peer.transport.name)
            self._abort()
            raise
        finally:
            peer.add_load(-size)
            peer.pulls -= 1
            if not peer.pulls:
                self._active.discard(peer)
        if fetched is None:
            peer.breaker.undecided()
            return run, [ChunkOutcome(item, MissReason.DEADLINE, None) for item in run.items]
        outcomes, seconds = fetched
        self._judge(peer, outcomes, seconds)
        self._measure(peer, outcomes, seconds, (others_before + peer.pulls) / 2)
        return run, outcomes

    async def _in_a_thread(
        self, transport: PeerTransport, items: Sequence[FetchItem], deadline: Deadline
    ) -> tuple[list[ChunkOutcome], float] | None:
        """As `_fetch`. None when no thread has begun with it before its deadline; then none ever does."""
        fetching = self._threads.submit(_fetch, transport, items, deadline)
        fetched = asyncio.wrap_future(fetching)
        await asyncio.wait((fetched,), timeout=max(0.0, deadline.remaining_s()))
        return None if fetching.cancel() else await fetched

    def _measure(self, peer: Peer, outcomes: Sequence[ChunkOutcome], seconds: float, others: float) -> None:
        """How fast the peer was, where that can be told: not when it failed, which is its breaker's business."""
        reasons = {outcome.reason for outcome in outcomes}
        if self._giving_up or not PEER_FAULTS.isdisjoint(reasons):
            return
        chunks = sum(outcome.reason is None for outcome in outcomes)
        if not chunks and MissReason.DEADLINE in reasons:
            known = peer.rate.rate
            if known is not None and known.predict(self._chunk_bytes * (1 + others)) >= seconds:
                return
            chunks = 1  # not even one has come: it is slower than that
        if chunks:
            peer.measured(chunks * self._chunk_bytes, seconds, others)

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
