"""Measures peers that nobody has fetched from, or that the gate has refused for a while, beside the requests.

A probe fetches a few MiB of what the peer holds into memory of its own, and throws them away. Without it, the first
request would have to find out how slow a link is, and a peer that was refused once would be refused for ever.

The first fetch of a probe also pays for fresh memory, a new thread and a cold connection, and any one may fall into a
moment at which an engine has all cores. Where it was quick, it is therefore repeated, with one chunk and with all, and
the quickest of each counts: two sizes tell the fixed part of a fetch from what its bytes take.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable
from itertools import islice

from kvmesh.core.keys import ChunkKey
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
UNPROBED_REPEAT_S = 60.0
"""A refused peer that cannot be probed (an agent of NIXL's for each probe would cost more than it tells) is forgotten
after this long: the next request measures it anew.
"""
QUICK_S = 0.1
"""A first fetch that took longer is believed; repeating it would take the link from others."""
ROUNDS = 3
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
            if peer is None:
                continue
            try:
                await self._probe(peer)
            except Exception:  # such as no descriptor to be had: whatever it is, requests do not need the probe
                log.exception("peer cannot be probed instance=%s", peer.member.instance_id)
                self._not_before_s[peer.member.incarnation] = time.monotonic() + UNPROBED_REPEAT_S

    def close(self) -> None:
        """End a probe that runs."""
        if self._running is not None:
            self._running.close()

    def refused(self, key: bytes, holders: Iterable[str]) -> None:
        """The engine has left a chunk to be computed that these hold, by the rates it had been told."""
        for holder in holders:
            peer = self._peers.get(holder)
            if peer is not None:
                peer.refused([ChunkKey(key)])

    def _next(self, now_s: float) -> Peer | None:
        """A peer that holds something, is idle, and is unknown or was refused."""
        known = {peer.member.incarnation for peer in self._peers}
        self._not_before_s = {who: when for who, when in self._not_before_s.items() if who in known}
        for peer in self._peers:
            is_due = peer.rate.rate is None or peer.wants_probe
            if not is_due or peer.pulls or now_s < self._not_before_s.get(peer.member.incarnation, 0.0):
                continue
            if peer.transport.name == "nixl":
                self._forget_some_time(peer, now_s)
            elif self._peers.usable(peer.member.instance_id) is None and self._keys(peer):
                return peer
        return None

    def _keys(self, peer: Peer) -> list[ChunkKey]:
        """What to ask of it. A node that asks the directory for each request has no list of what peers hold."""
        held = self._replica.keys_of(peer.member.instance_id) or peer.refused_keys
        return list(islice(held, max(1, PROBE_BYTES // self._chunk_bytes)))

    def _forget_some_time(self, peer: Peer, now_s: float) -> None:
        if not peer.wants_probe:
            return
        if peer.member.incarnation in self._not_before_s:
            del self._not_before_s[peer.member.incarnation]
            peer.rate.start_over([])
            peer.wants_probe = False
            self._measured()
            return
        self._not_before_s[peer.member.incarnation] = now_s + UNPROBED_REPEAT_S

    async def _probe(self, peer: Peer) -> None:
        items = [FetchItem(key, slot) for slot, key in enumerate(self._keys(peer))]
        with contextlib.closing(HostPool.create(len(items), self._chunk_bytes)) as pool:
            transport = self._running = self._make(peer.member, pool)
            try:
                runs = await asyncio.to_thread(_measure, transport, items)
            finally:
                self._running = None
                transport.close()
        self.probes += 1
        longest_s = max((seconds for _, seconds in runs), default=0.0)
        self._not_before_s[peer.member.incarnation] = time.monotonic() + max(REPEAT_S, REPEAT_SHARE * longest_s)
        if not any(chunks for chunks, _ in runs) and longest_s < PATIENCE_S:
            return
        peer.probed([(max(chunks, 1) * self._chunk_bytes, seconds) for chunks, seconds in runs], peer.pulls)
        rate = peer.rate.rate
        assert rate is not None
        log.info(
            "probed instance=%s bytes=%d fixed_ms=%.2f mb_per_s=%.1f",
            peer.member.instance_id,
            max(chunks for chunks, _ in runs) * self._chunk_bytes,
            rate.fixed_s * 1e3,
            1e-6 / rate.unit_s,
        )
        self._measured()


def _measure(transport: PeerTransport, items: list[FetchItem]) -> list[tuple[int, float]]:
    """In a thread: how many chunks came in how many seconds, connecting not counted; empty when nobody answers."""
    if transport.warm_up(Deadline(time.monotonic() + PATIENCE_S, PATIENCE_S)) is not None:
        return []
    first = _fetch(transport, items)
    if first[1] > QUICK_S or first[0] < len(items):
        return [first]
    quickest: dict[int, float] = {}
    for part in (items[:1], items) * ROUNDS:
        chunks, seconds = _fetch(transport, part)
        if chunks:
            quickest[chunks] = min(seconds, quickest.get(chunks, seconds))
    return list(quickest.items()) or [first]


def _fetch(transport: PeerTransport, items: list[FetchItem]) -> tuple[int, float]:
    """How many of them came in how many seconds."""
    started_s = time.monotonic()
    outcomes = transport.fetch(items, Deadline(started_s + PATIENCE_S, PATIENCE_S))
    return sum(outcome.reason is None for outcome in outcomes), time.monotonic() - started_s
