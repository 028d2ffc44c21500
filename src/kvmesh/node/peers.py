"""The peers of a node: one transport, one breaker and one load figure per member with our format.

Runs on the node's event loop; only `TransferLoad` is touched by fetching threads.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor

from kvmesh.core.breaker import Breaker
from kvmesh.core.format import Format, differences
from kvmesh.core.reasons import MissReason
from kvmesh.transfer.base import Deadline, PeerTransport
from kvmesh.wire.directory import Member

log = logging.getLogger("kvmesh.peers")

WARM_UP_S = 5.0

TransportFactory = Callable[[Member], PeerTransport]


class Peer:
    """A member we may fetch from."""

    def __init__(self, member: Member, transport: PeerTransport) -> None:
        self.member = member
        self.transport = transport
        self.breaker = Breaker()
        self.bytes_under_way = 0
        self._lock = threading.Lock()

    def add_load(self, count_bytes: int) -> None:
        """Count bytes asked for (or, negative, no longer awaited). Any thread."""
        with self._lock:
            self.bytes_under_way += count_bytes


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
        """Give a peer a fresh transport and close the old one, which ends the fetches that run over it."""
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

    def load_bytes(self, instance_id: str) -> int:
        peer = self._peers.get(instance_id)
        return 0 if peer is None else peer.bytes_under_way

    def _warm_up(self, peer: Peer) -> None:
        """Connect in the background, so that the first fetch does not have to. A failure shows again in time."""
        transport = peer.transport
        self._background.submit(lambda: transport.warm_up(Deadline(time.monotonic() + WARM_UP_S, WARM_UP_S)))

    def __len__(self) -> int:
        return len(self._peers)

    def __iter__(self) -> Iterator[Peer]:
        return iter(self._peers.values())
