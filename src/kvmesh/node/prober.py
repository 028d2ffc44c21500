"""Measures peers that nobody has fetched from, or that the gate has refused for a while, beside the requests.

A probe fetches a few MiB of what the peer holds into memory of its own, and throws them away. Without it, the first
request would have to find out how slow a link is, and a peer that was refused once would be refused for ever.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from itertools import islice

from kvmesh.core.plan import FetchItem
from kvmesh.core.replica import Replica
from kvmesh.node.peers import Peer, Peers
from kvmesh.transfer.base import Deadline, PeerTransport
from kvmesh.transfer.pool import HostPool
from kvmesh.wire.directory import Member

log = logging.getLogger("kvmesh.probe")

LOOK_S = 0.5
"""How often to look for somebody to probe; one at a time."""
PROBE_BYTES = 4 << 20
REPEAT_S = 10.0
"""A refused peer is probed again after this long, and after REPEAT_SHARE times what the last probe took: at most 5 % of
its link's time.
"""
REPEAT_SHARE = 20.0
PATIENCE_S = 10.0
"""Longest probe. A peer from which not a chunk comes in that time is measured as that slow."""


class Prober:
    """Probes the peers of one node. Lives on its event loop; the fetching runs in a thread."""

    def __init__(
        self,
        replica: Replica,
        peers: Peers,
        make: Callable[[Member, HostPool], PeerTransport],
        chunk_bytes: int,
        measured: Callable[[], None],
    ) -> None:
        """
        Args:
            replica: says what a peer holds.
            peers: whom to probe.
            make: a transport towards a member, into a given pool.
            chunk_bytes: size of a chunk.
            measured: called on the loop when a peer has been measured.
        """
        self._replica = replica
        self._peers = peers
        self._make = make
        self._chunk_bytes = chunk_bytes
        self._measured = measured
        self._not_before_s: dict[str, float] = {}
        """By incarnation; emptied with the peers."""
        self._running: PeerTransport | None = None
        self.probes = 0

    async def run(self) -> None:
        """Probe whoever needs it, until cancelled."""
        while True:
            await asyncio.sleep(LOOK_S)
            peer = self._next(time.monotonic())
            if peer is not None:
                await self._probe(peer)

    def close(self) -> None:
        """End a probe that runs."""
        if self._running is not None:
            self._running.close()

    def _next(self, now_s: float) -> Peer | None:
        """A peer that holds something, is idle, and is unknown or was refused."""
        known = {peer.member.incarnation for peer in self._peers}
        self._not_before_s = {who: when for who, when in self._not_before_s.items() if who in known}
        for peer in self._peers:
            is_due = peer.rate.rate is None or peer.wants_probe
            if is_due and not peer.pulls and now_s >= self._not_before_s.get(peer.member.incarnation, 0.0):
                may_ask = self._peers.usable(peer.member.instance_id) is None and peer.transport.name != "nixl"
                if may_ask and self._replica.keys_of(peer.member.instance_id):
                    return peer
        return None

    async def _probe(self, peer: Peer) -> None:
        keys = list(islice(self._replica.keys_of(peer.member.instance_id), max(1, PROBE_BYTES // self._chunk_bytes)))
        items = [FetchItem(key, slot) for slot, key in enumerate(keys)]
        pool = HostPool.create(len(items), self._chunk_bytes)
        transport = self._running = self._make(peer.member, pool)
        try:
            chunks, seconds = await asyncio.to_thread(_fetch, transport, items)
        finally:
            self._running = None
            transport.close()
            pool.close()
        self.probes += 1
        pause_s = max(REPEAT_S, REPEAT_SHARE * seconds)
        self._not_before_s[peer.member.incarnation] = time.monotonic() + pause_s
        if chunks or seconds >= PATIENCE_S:
            peer.measured(max(chunks, 1) * self._chunk_bytes, seconds, peer.pulls)
            log.info(
                "probed instance=%s bytes=%d seconds=%.3f mb_per_s=%.1f",
                peer.member.instance_id,
                chunks * self._chunk_bytes,
                seconds,
                chunks * self._chunk_bytes / max(seconds, 1e-9) / 1e6,
            )
            self._measured()


def _fetch(transport: PeerTransport, items: list[FetchItem]) -> tuple[int, float]:
    """In a thread: how many chunks came in how many seconds, connecting not counted."""
    if transport.warm_up(Deadline(time.monotonic() + PATIENCE_S, PATIENCE_S)) is not None:
        return 0, 0.0
    started_s = time.monotonic()
    outcomes = transport.fetch(items, Deadline(started_s + PATIENCE_S, PATIENCE_S))
    return sum(outcome.reason is None for outcome in outcomes), time.monotonic() - started_s
