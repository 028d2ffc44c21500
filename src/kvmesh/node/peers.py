"""The peers of a node: one transport, one breaker and one load figure per member with our format.

Runs on the node's event loop; only `TransferLoad` is touched by fetching threads.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from itertools import islice

from kvmesh.core.breaker import Breaker
from kvmesh.core.format import Format, differences
from kvmesh.core.gate import RateMeter
from kvmesh.core.keys import ChunkKey
from kvmesh.core.plan import Load
from kvmesh.core.reasons import MissReason
from kvmesh.core.replica import Replica
from kvmesh.transfer.base import Deadline, PeerTransport
from kvmesh.wire.directory import Member
from kvmesh.wire.link import MAX_RATES, PeerRate, Rates

log = logging.getLogger("kvmesh.peers")

WARM_UP_S = 5.0
PRIOR_FIXED_S = 0.001
"""Of a fetch's time, what is not the bytes', as long as all fetches were of one size."""
MAX_WARM_PEERS = 128
"""With more peers than this, connections are opened by the first fetch: a descriptor here and a thread there for each
would cost more than they save.
"""
UNDELIVERED_LIMIT = 3
"""An announced chunk that is stale or gone so often in a row is not asked for again. A retraction on its way explains
one or two.
"""
MAX_UNDELIVERED = 10_000
MAX_REFUSED_KEYS = 64
"""What a probe needs at most, unless chunks are very small."""
CORRUPT_LIMIT = 3
"""A peer with so many corrupt chunks gets the breaker's longest pause for each further one."""

TransportFactory = Callable[[Member], PeerTransport]


class Peer:
    """A member we may fetch from."""

    def __init__(self, member: Member, transport: PeerTransport) -> None:
        self.member = member
        self.transport = transport
        self.breaker = Breaker()
        self.bytes_under_way = 0
        self.rate = RateMeter(PRIOR_FIXED_S)
        """Seconds that a fetch from it takes, against its bytes."""
        self.pulls = 0
        """Fetches from it under way."""
        self.measured_at_s: float | None = None
        """time.monotonic() of the last fetch or probe that told how fast it is."""
        self.wants_probe = False
        """The gate has refused it since then: nothing but a probe will tell whether it has become faster."""
        self.refused_keys: tuple[ChunkKey, ...] = ()
        """Some of what was refused: a probe may ask for these where nobody knows what else the peer holds."""
        self.corrupt_chunks = 0
        """Chunks that did not arrive with the bytes they were published with, in this life of the peer."""
        self._undelivered: dict[ChunkKey, int] = {}
        """How often in a row a key that the peer announces did not come: it was stale or gone."""
        self._lock = threading.Lock()

    def add_load(self, count_bytes: int) -> None:
        """Count bytes asked for (or, negative, no longer awaited). Any thread."""
        with self._lock:
            self.bytes_under_way += count_bytes

    def measured(self, count_bytes: int, seconds: float, others: float) -> None:
        """A fetch has brought so many bytes, while so many others (an average) were under way from this peer."""
        self.rate.observe(count_bytes * (1 + others), seconds)
        self.measured_at_s = time.monotonic()
        self.wants_probe = False

    def probed(self, runs: Sequence[tuple[int, float]], others: float) -> None:
        """Probes have brought (bytes, seconds), while so many others were under way. They are measured with care and
        beside the requests, so they replace what was known: a peer that a bad moment made look slow gets its chance.
        """
        self.rate.start_over([(count_bytes * (1 + others), seconds) for count_bytes, seconds in runs])
        self.measured_at_s = time.monotonic()
        self.wants_probe = False

    def refused(self, keys: Iterable[ChunkKey]) -> None:
        """The gate has left these to be computed, which the peer holds."""
        self.wants_probe = True
        self.refused_keys = tuple(islice(keys, MAX_REFUSED_KEYS))

    def note(self, key: ChunkKey, reason: MissReason | None) -> bool:
        """Take note of what became of one chunk asked of this peer. True when it is not to be asked for it again."""
        if reason is MissReason.CORRUPT:
            self.corrupt_chunks += 1
            return True
        if reason not in {MissReason.STALE, MissReason.EVICTED}:
            if reason is None:
                self._undelivered.pop(key, None)
            return False
        count = self._undelivered.pop(key, 0) + 1
        if count >= UNDELIVERED_LIMIT:
            return True
        self._undelivered[key] = count
        if len(self._undelivered) > MAX_UNDELIVERED:
            del self._undelivered[next(iter(self._undelivered))]
        return False


class Peers:
    """Members by instance id, as far as their KV is interchangeable with ours."""

    def __init__(self, ours: Format, factory: TransportFactory, background: Executor) -> None:
        self._ours = ours
        self._factory = factory
        self._background = background
        self._peers: dict[str, Peer] = {}

    def add(self, member: Member) -> bool:
        """Take a member in when its format is ours; otherwise say which fields differ. Returns whether it is a peer
        now.
        """
        known = self._peers.get(member.instance_id)
        if known is not None and known.member.incarnation == member.incarnation:
            return True
        self.remove(member.instance_id)
        different = differences(self._ours, member.format)
        if different:
            same_model = member.format.model_name == self._ours.model_name
            log.log(
                logging.WARNING if same_model else logging.INFO,
                "cannot share with instance=%s address=%s: formats differ in %s",
                member.instance_id,
                member.peer_address,
                "; ".join(map(str, different)),
            )
            return False
        peer = Peer(member, self._factory(member))
        self._peers[member.instance_id] = peer
        self._warm_up(peer)
        return True

    def renew(self, peer: Peer) -> None:
        """Give a peer a fresh transport and close the old one, which ends the fetches that run over it.

        One that has left gets none: nobody would close it.
        """
        if self._peers.get(peer.member.instance_id) is not peer:
            peer.transport.close()
            return
        old, peer.transport = peer.transport, self._factory(peer.member)
        old.close()
        self._warm_up(peer)

    def remove(self, instance_id: str) -> None:
        """Drop a peer and its connections; fetches that are running end with PEER_LOST."""
        peer = self._peers.pop(instance_id, None)
        if peer is not None:
            self._background.submit(peer.transport.close)

    def get(self, instance_id: str) -> Peer | None:
        return self._peers.get(instance_id)

    def usable(self, instance_id: str) -> MissReason | None:
        """None when the peer may be asked now, otherwise why not."""
        peer = self._peers.get(instance_id)
        if peer is None:
            return MissReason.PEER_UNREACHABLE
        return None if peer.breaker.allows(time.monotonic()) else MissReason.BREAKER_OPEN

    def load(self, instance_id: str) -> Load:
        """What is under way from the peer, for the planner."""
        peer = self._peers.get(instance_id)
        if peer is None:
            return Load(0, None)
        return Load(peer.bytes_under_way, None if peer.rate.rate is None else peer.rate.rate.unit_s)

    def rates(self, replica: Replica) -> Rates:
        """How fast those are that hold chunks, for the engine: the fastest first."""
        holders = [peer for peer in self if replica.keys_of(peer.member.instance_id)]
        found = [
            PeerRate(peer.member.instance_id, peer.rate.rate.fixed_s, peer.rate.rate.unit_s, peer.pulls)
            for peer in holders
            if peer.rate.rate is not None
        ]
        found.sort(key=lambda rate: rate.byte_s)
        return Rates(found[:MAX_RATES], unmeasured=len(holders) - len(found))

    def _warm_up(self, peer: Peer) -> None:
        """Connect in the background, so that the first fetch does not have to. A failure shows again in time."""
        if len(self._peers) > MAX_WARM_PEERS:
            return
        transport = peer.transport
        self._background.submit(lambda: transport.warm_up(Deadline(time.monotonic() + WARM_UP_S, WARM_UP_S)))

    def __len__(self) -> int:
        return len(self._peers)

    def __iter__(self) -> Iterator[Peer]:
        return iter(self._peers.values())
