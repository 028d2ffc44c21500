"""Chunks over plain TCP, received straight into the slots.

A fetch is cut into runs of some MiB in prefix order. One or more connections take the next run before the last one has
come, so that the holder never waits for us; what has arrived at the deadline is a prefix.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

from kvmesh.core.reasons import PEER_FAULTS, MissReason
from kvmesh.errors import (
    KVMeshError,
    PeerClosedError,
    PeerReadError,
    PeerWriteError,
)
from kvmesh.transfer.base import ChunkOutcome, Deadline, FetchItem, Progress, TransportStatistics
from kvmesh.transfer.coding import SAMPLE_BYTES, Coding, PeerCoding
from kvmesh.transfer.leases import FetchBook, Lease, Leases
from kvmesh.transfer.link import PeerLink, PeerTarget
from kvmesh.transfer.pool import HostPool
from kvmesh.transfer.pull import Pull, Way
from kvmesh.transfer.security import OPEN, PeerSecurity
from kvmesh.transfer.stream import reason_of
from kvmesh.wire.peer import Hello

log = logging.getLogger(__name__)

CONNECTIONS_PER_FETCH = 2
BYTES_PER_CONNECTION = 128 << 20
"""A fetch of up to so many has one connection: on two cores that is about as fast, and takes a third less of the
fetcher's processor (measured).
"""
MAX_CONNECTIONS = 8


class TcpTransport:
    """One peer over TCP (see `PeerTransport`). All methods may be called from any thread."""

    name = "tcp"

    def __init__(
        self,
        target: PeerTarget,
        ours: Hello,
        pool: HostPool,
        *,
        connections: int = CONNECTIONS_PER_FETCH,
        max_connections: int = MAX_CONNECTIONS,
        verify: bool = True,
        security: PeerSecurity = OPEN,
        coding: Coding | None = None,
    ) -> None:
        """Connects nowhere yet.

        Args:
            target: the peer; an answer by another instance or incarnation is refused.
            ours: this node's Hello.
            pool: the pool whose slots are fetched into.
            connections: connections that one fetch spreads over at most (see BYTES_PER_CONNECTION).
            max_connections: connections to this peer over all fetches at a time; more fetches wait.
            verify: hash what arrives and compare with the checksum it was published with.
            security: the cluster key and TLS, where there are any.
            coding: the wire codec that `ours` offers; None for none.
        """
        self.target = target
        self._pool = pool
        self._verify = verify
        self._connections = connections
        self._ours = ours
        self._security = security
        self._coding = None if coding is None else coding.towards(target.incarnation)
        self._links = Leases(self._dial, peer=str(target), keep=max_connections, limit=max_connections)
        self._helpers = ThreadPoolExecutor(max_connections, thread_name_prefix=f"kvmesh-tcp-{target.instance_id}")
        self._lock = threading.Lock()
        self._established = False
        self._running = 0
        """Fetches under way."""
        self._fetched_chunks = 0
        self._last_error = ""

    def warm_up(self, deadline: Deadline) -> MissReason | None:
        """Connect now (see `PeerTransport`)."""
        try:
            lease = self._links.take(deadline, wait=False)
        except KVMeshError as error:
            return self._note(error)
        if lease is not None:
            self._links.give_back(lease.connection)
        return None

    def fetch(
        self, items: Sequence[FetchItem], deadline: Deadline, progress: Progress | None = None
    ) -> list[ChunkOutcome]:
        """Pull `items` into our slots (see `PeerTransport`)."""
        book = FetchBook(items, progress)
        way = Way(self._coding)
        if items:
            with self._lock:
                before, self._running = self._running, self._running + 1
            started_s = time.monotonic()
            self._fetch(book, deadline, way)
            seconds = time.monotonic() - started_s
            with self._lock:
                self._running -= 1
                others = (before + self._running) / 2
            outcomes = book.close()
            if self._coding is not None:
                self._learn(self._coding, outcomes, way, seconds / (1 + others))
        else:
            outcomes = []
        with self._lock:
            self._fetched_chunks += sum(outcome.reason is None for outcome in outcomes)
        return outcomes

    def statistics(self) -> TransportStatistics:
        """Counters; from any thread."""
        chunks = self._fetched_chunks
        return TransportStatistics(
            connections=self._links.open,
            connects=self._links.connects,
            fetched_chunks=chunks,
            fetched_bytes=chunks * self._pool.chunk_bytes,
            last_error=self._last_error,
        )

    def close(self) -> None:
        """Drop connections (see `PeerTransport`)."""
        self._links.close()
        self._helpers.shutdown(wait=False, cancel_futures=True)

    def _learn(self, peer: PeerCoding, outcomes: Sequence[ChunkOutcome], way: Way, seconds: float) -> None:
        """How long it took, coded or raw, where that says something of the link; `seconds` is this fetch's share."""
        reasons = {outcome.reason for outcome in outcomes}
        came = [outcome.item for outcome in outcomes if outcome.reason is None]
        if not came or not PEER_FAULTS.isdisjoint(reasons):
            return
        peer.came(len(came) * self._pool.chunk_bytes, way.wire_bytes, seconds)
        if not way.wire_bytes and way.is_offered and peer.coding.wants_sample():
            with contextlib.suppress(RuntimeError):  # closed meanwhile
                self._helpers.submit(peer.coding.sample, bytes(self._pool.row(came[0].slot)[:SAMPLE_BYTES]))

    def _fetch(self, book: FetchBook, deadline: Deadline, way: Way) -> None:
        """Pull over our own connection, with helpers over further ones where the fetch is large enough."""
        try:
            lease = self._links.take(deadline, wait=True)  # before helpers can take the last one
        except KVMeshError as error:
            book.end(self._note(error))
            return
        wanted = -(-len(book.items) * self._pool.chunk_bytes // BYTES_PER_CONNECTION)
        helpers = self._start_helpers(min(self._connections, wanted) - 1, book, deadline, way)
        try:
            self._work(Pull(book, deadline, self._pool, way, verify=self._verify, reports=True), lease, deadline)
        finally:
            # Whatever happens here, helpers write into our slots until they are done; the deadline bounds them.
            book.end(MissReason.TRUNCATED)
            running = [helper for helper in helpers if not helper.cancel()]
            wait(running)
        for helper in running:
            helper.result()

    def _start_helpers(self, count: int, book: FetchBook, deadline: Deadline, way: Way) -> list[Future[None]]:
        try:
            return [self._helpers.submit(self._help, book, deadline, way) for _ in range(count)]
        except RuntimeError:  # closed meanwhile; the caller's own work finds out
            return []

    def _help(self, book: FetchBook, deadline: Deadline, way: Way) -> None:
        """A helper's work. Without a connection it leaves all of it to the others."""
        try:
            lease = self._links.take(deadline, wait=False)
        except KVMeshError as error:
            self._note(error)
            return
        self._work(Pull(book, deadline, self._pool, way, verify=self._verify, reports=False), lease, deadline)

    def _work(self, pull: Pull, lease: Lease[PeerLink] | None, deadline: Deadline) -> None:
        """Pull runs until none is left, over a second connection when the first one turned out dead."""
        if lease is None or self._pull(pull, lease):
            return
        try:
            lease = self._links.take(deadline, wait=True, fresh=True)
        except KVMeshError as error:
            pull.give_up(self._note(error))
            return
        if lease is not None:
            self._pull(pull, lease)

    def _pull(self, pull: Pull, lease: Lease[PeerLink]) -> bool:
        """Work on one connection; False when it was an old one that had died while idle, so that a new one should be
        tried.
        """
        link = lease.connection
        try:
            is_clean = pull.run(link)
        except KVMeshError as error:
            self._links.discard(link)
            died_idle = isinstance(error, (PeerClosedError, PeerReadError, PeerWriteError)) and not pull.has_heard
            if died_idle and not lease.is_fresh:
                return False
            pull.give_up(self._note(error))
            return True
        except BaseException:
            self._links.discard(link)
            raise
        if is_clean:
            self._links.give_back(link)
        else:
            self._links.discard(link)
        return True

    def _dial(self, deadline: Deadline) -> PeerLink:
        link = PeerLink.dial(self.target, self._ours, deadline, self._security)
        with self._lock:
            first, self._established = not self._established, True
        if first:
            log.info(
                "Established connection to peer %s:%d instance=%s incarnation=%s transport=tcp",
                self.target.host,
                self.target.port,
                self.target.instance_id,
                self.target.incarnation,
            )
        return link

    def _note(self, error: KVMeshError) -> MissReason:
        reason = reason_of(error)
        with self._lock:
            is_news, self._last_error = self._last_error != str(error), str(error)
        log.log(logging.WARNING if is_news else logging.DEBUG, "peer failed reason=%s error=%s", reason.value, error)
        return reason
