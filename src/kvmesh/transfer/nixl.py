"""Chunks by NIXL READs: the fetching side pulls them out of the holder's memory, straight into the slots.

Where the chunks lie, and whether the slots still held them when the bytes had arrived, is asked over the peer channel
(Resolve and Validate in `kvmesh.wire.peer`); so is NIXL's metadata, never over NIXL's own listener. A READ that is
given up would still be written later, so on any failure the agent is destroyed before `fetch` returns; each connection
has an agent of its own, so that nobody else's fetch suffers.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from typing import NamedTuple

import xxhash

from kvmesh.core.reasons import MissReason
from kvmesh.errors import (
    KVMeshError,
    NixlError,
    PeerCancelledError,
    PeerClosedError,
    PeerProtocolError,
    PeerReadError,
    PeerStalledError,
    PeerTimeoutError,
    PeerWriteError,
)
from kvmesh.transfer.base import ChunkOutcome, Deadline, FetchItem, Progress, TransportStatistics
from kvmesh.transfer.leases import FetchBook, Lease, Leases
from kvmesh.transfer.link import PeerLink, PeerTarget
from kvmesh.transfer.nixl_agent import Agent, Read, Region
from kvmesh.transfer.pool import HostPool
from kvmesh.transfer.security import OPEN, PeerSecurity
from kvmesh.transfer.stream import reason_of
from kvmesh.wire.peer import (
    MAX_KEYS,
    Hello,
    NixlAttach,
    NixlMetadata,
    Place,
    Resolve,
    Resolved,
    SlotGeneration,
    Validate,
    Validated,
)

log = logging.getLogger(__name__)

RUN_BYTES = 8 << 20
"""Chunks of one READ and of one Validate."""
RUNS_AHEAD = 2
LANES_KEPT, MAX_LANES = 2, 4
"""Connections to one peer, each with an agent: for as many fetches at a time."""
LONGEST_DIAL_S = 120.0
"""For a connection and its agent: with RDMA it pins the pool, seconds for 100 GB, whatever the deadline of a fetch."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 50e-6, 1e-3
"""There is nothing to wait on, so we look, less and less often."""


class NixlLane:
    """A peer link with an agent that can read from that peer. For one thread at a time (`shut_down`: any thread)."""

    def __init__(self, link: PeerLink, agent: Agent) -> None:
        self.link = link
        self.agent = agent
        self.remote = ""
        self.serving = -1
        self._scratch = mmap.mmap(-1, mmap.PAGESIZE)

    @classmethod
    def dial(
        cls,
        target: PeerTarget,
        ours: Hello,
        pool: HostPool,
        backends: Sequence[str],
        deadline: Deadline,
        security: PeerSecurity = OPEN,
    ) -> NixlLane:
        """Connect, make an agent and have it read a few bytes, which opens NIXL's connection. Raises KVMeshError."""
        link = PeerLink.dial(target, ours, deadline, security)
        try:
            metadata = link.request(NixlAttach(), NixlMetadata, deadline)
            lane = cls(link, Agent("fetcher", backends=backends, progress_thread=False))
        except BaseException:
            link.close()
            raise
        try:
            lane._attach(metadata, pool, deadline)
        except BaseException:
            lane.close()
            raise
        return lane

    def _attach(self, metadata: NixlMetadata, pool: HostPool, deadline: Deadline) -> None:
        scratch = ctypes.addressof(ctypes.c_char.from_buffer(self._scratch))
        self.agent.register([*pool.regions(), (scratch, mmap.PAGESIZE)])
        self.remote = self.agent.add_peer(metadata.metadata)
        self.serving = metadata.serving
        probe = metadata.probe_bytes
        self.wait(self.read([(scratch, probe)], [(metadata.probe_address, probe)]), deadline)

    def read(self, local: Sequence[Region], remote: Sequence[Region]) -> Read:
        """Start a READ. Raises NixlError."""
        return self.agent.read(local, remote, self.remote)

    def wait(self, read: Read, deadline: Deadline) -> None:
        """Return when the READ is done.

        NIXL does not tell a slow peer from a stopped one. A ping over the peer channel does: a process that has not
        answered for the stall time is given up (PeerStalledError); one that answers may take until the deadline
        (PeerTimeoutError). Raises NixlError and what the link raises when the peer is lost.
        """
        pause_s = _FIRST_PAUSE_S
        heard_s = time.monotonic()
        is_asked = False
        while not self.agent.is_done(read):
            now_s = time.monotonic()
            if now_s >= deadline.at_s:
                raise PeerTimeoutError(self.link.peer, expected="a READ done before the deadline")
            if self.link.stream.wait_readable(0):  # a pong, or the end of the connection
                self.link.receive_pong(deadline)
                heard_s, is_asked = now_s, False
            elif now_s - heard_s >= deadline.stall_s:
                raise PeerStalledError(self.link.peer, expected="a pong within the stall time")
            elif not is_asked and now_s - heard_s >= deadline.stall_s / 2:
                self.link.send_ping(deadline)
                is_asked = True
            time.sleep(max(0.0, min(pause_s, deadline.at_s - now_s)))
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        if is_asked:
            self.link.receive_pong(deadline)
        self.agent.release(read)

    def is_quiet(self) -> bool:
        """True while the lane may be used again."""
        return self.link.is_quiet()

    def shut_down(self) -> None:
        """Make the call that another thread is in fail soon."""
        self.link.shut_down()

    def close(self) -> None:
        """Destroy the agent, then close the link. When this returns, nothing writes into our slots any more. Never
        raises.
        """
        self.agent.destroy()
        self.link.close()


class NixlTransport:
    """One peer over NIXL (see `PeerTransport`). All methods may be called from any thread."""

    name = "nixl"

    def __init__(
        self,
        target: PeerTarget,
        ours: Hello,
        pool: HostPool,
        *,
        backends: Sequence[str] = ("UCX",),
        max_lanes: int = MAX_LANES,
        verify: bool = True,
        security: PeerSecurity = OPEN,
    ) -> None:
        """Connects nowhere yet. `nixl_agent.prepare_environment` must have been called in this process.

        Args:
            target: the peer; an answer by another instance or incarnation is refused.
            ours: this node's Hello.
            pool: the pool whose slots are fetched into.
            backends: NIXL backends, in order of preference.
            max_lanes: fetches from this peer at a time; more wait.
            verify: hash what arrived and compare with the checksum it was published with.
            security: the cluster key and TLS of the peer channel, where there are any. NIXL's own knows neither.
        """
        self.target = target
        self._ours = ours
        self._security = security
        self._pool = pool
        self._backends = tuple(backends)
        self._hasher = ThreadPoolExecutor(max_lanes, f"kvmesh-nixl-{target.instance_id}") if verify else None
        self._run_chunks = max(1, min(MAX_KEYS, RUN_BYTES // pool.chunk_bytes))
        self._lanes = Leases(
            self._dial, peer=str(target), keep=LANES_KEPT, limit=max_lanes, longest_dial_s=LONGEST_DIAL_S
        )
        self._lock = threading.Lock()
        self._established = False
        self._fetched_chunks = 0
        self._last_error = ""

    def warm_up(self, deadline: Deadline) -> MissReason | None:
        """Connect now (see `PeerTransport`): the first agent of a process takes half a second."""
        try:
            lease = self._lanes.take(deadline, wait=False)
        except KVMeshError as error:
            return self._note(error)
        if lease is not None:
            self._lanes.give_back(lease.connection)
        return None

    def fetch(
        self, items: Sequence[FetchItem], deadline: Deadline, progress: Progress | None = None
    ) -> list[ChunkOutcome]:
        """Pull `items` into our slots (see `PeerTransport`)."""
        book = FetchBook(items, progress)
        if items:
            self._work(book, deadline)
        outcomes = book.close()
        with self._lock:
            self._fetched_chunks += sum(outcome.reason is None for outcome in outcomes)
        return outcomes

    def statistics(self) -> TransportStatistics:
        """Counters; from any thread."""
        chunks = self._fetched_chunks
        return TransportStatistics(
            connections=self._lanes.open,
            connects=self._lanes.connects,
            fetched_chunks=chunks,
            fetched_bytes=chunks * self._pool.chunk_bytes,
            last_error=self._last_error,
        )

    def close(self) -> None:
        """Drop connections (see `PeerTransport`)."""
        self._lanes.close()
        if self._hasher is not None:
            self._hasher.shutdown(wait=False)

    def _work(self, book: FetchBook, deadline: Deadline) -> None:
        for fresh in (False, True):
            try:
                lease = self._lanes.take(deadline, wait=True, fresh=fresh)
            except KVMeshError as error:
                book.end(self._note(error))
                return
            assert lease is not None
            if self._pull(book, lease, deadline):
                return

    def _pull(self, book: FetchBook, lease: Lease[NixlLane], deadline: Deadline) -> bool:
        """Work on one lane; False when it was an old one that had died while idle: a new one should be tried."""
        lane = lease.connection
        pull = _Pull(book, deadline, self._pool, lane, self._run_chunks, self._hasher)
        try:
            pull.run()
        except KVMeshError as error:
            self._lanes.discard(lane)  # destroys the agent
            died_idle = isinstance(error, (PeerClosedError, PeerReadError, PeerWriteError, _AgentReplacedError))
            if died_idle and not lease.is_fresh and not pull.has_resolved:
                return False
            pull.give_up(self._note(error))
            return True
        except BaseException:
            self._lanes.discard(lane)
            raise
        self._lanes.give_back(lane)
        return True

    def _dial(self, deadline: Deadline) -> NixlLane:
        lane = NixlLane.dial(self.target, self._ours, self._pool, self._backends, deadline, self._security)
        with self._lock:
            first, self._established = not self._established, True
        if first:
            log.info(
                "Established connection to peer %s:%d instance=%s incarnation=%s transport=nixl",
                self.target.host,
                self.target.port,
                self.target.instance_id,
                self.target.incarnation,
            )
        return lane

    def _note(self, error: KVMeshError) -> MissReason:
        reason = MissReason.PEER_LOST if isinstance(error, NixlError) else reason_of(error)
        with self._lock:
            is_news, self._last_error = self._last_error != str(error), str(error)
        log.log(logging.WARNING if is_news else logging.DEBUG, "peer failed reason=%s error=%s", reason.value, error)
        return reason


class _AgentReplacedError(PeerReadError):
    """The holder serves from another agent than the one this lane is attached to."""


class _Run(NamedTuple):
    read: Read
    items: range
    places: list[Place]


class _Arrived(NamedTuple):
    """A run whose bytes are here, and of which the holder has been asked whether they are what was wanted."""

    run: _Run
    digests: Future[list[bytes]] | None


class _Pull:
    """One fetch over one lane.

    While the holder says whether a run is valid, and a thread of ours hashes it, the next ones are being read.
    """

    def __init__(
        self,
        book: FetchBook,
        deadline: Deadline,
        pool: HostPool,
        lane: NixlLane,
        run_chunks: int,
        hasher: Executor | None,
    ) -> None:
        self._book = book
        self._deadline = deadline
        self._pool = pool
        self._lane = lane
        self._run_chunks = run_chunks
        self._hasher = hasher
        self._resolved: dict[int, Place] = {}
        self._runs: deque[_Run] = deque()
        self._arrived: _Arrived | None = None
        self.has_resolved = False
        """The peer has answered on this lane."""

    def run(self) -> None:
        """Pull until nothing is left. Raises KVMeshError, with the undecided items still on our list."""
        try:
            while self._read_ahead() or self._arrived is not None:
                self._decide()
                if self._runs:
                    self._lane.wait(self._runs[0].read, self._deadline)
                    self._arrive()
        finally:
            if self._arrived is not None and self._arrived.digests is not None:
                wait([self._arrived.digests])  # it reads our slots

    def give_up(self, reason: MissReason) -> None:
        """Decide what was being read, and have the rest not read."""
        undecided = [*self._runs] if self._arrived is None else [self._arrived.run, *self._runs]
        for run in undecided:
            for item in run.items:
                self._book.miss(item, reason)
        self._runs.clear()
        self._arrived = None
        self._book.end(reason)

    def _read_ahead(self) -> bool:
        """Keep READs under way; False when there is none any more."""
        while len(self._runs) < RUNS_AHEAD:
            items, places = self._next_run()
            if not items:
                break
            local = [(self._pool.address(self._book.items[item].slot), self._pool.chunk_bytes) for item in items]
            remote = [(place.address, place.length) for place in places]
            self._runs.append(_Run(self._lane.read(local, remote), items, places))
        return bool(self._runs)

    def _next_run(self) -> tuple[range, list[Place]]:
        """The next items and where they are; the run ends before the first chunk that the holder does not have."""
        start = self._book.taken
        if start not in self._resolved:
            self._decide()  # its answer comes before that to the next request
            self._resolve(start)
        items = self._book.take(self._run_chunks)
        places = []
        for item in items:
            place = self._resolved.get(item)
            if place is None:
                self._book.miss(item, MissReason.EVICTED)
                self._book.end(MissReason.TRUNCATED)
                for later in range(item + 1, items.stop):
                    self._book.miss(later, MissReason.TRUNCATED)
                break
            places.append(place)
        return items[: len(places)], places

    def _resolve(self, start: int) -> None:
        keys: list[bytes] = [item.key for item in self._book.items[start : start + MAX_KEYS]]
        if not keys:
            return
        answer = self._lane.link.request(Resolve(keys), Resolved, self._deadline)
        peer = self._lane.link.peer
        if len(answer.places) != len(keys):
            raise PeerProtocolError(peer, expected=f"{len(keys)} places", found=f"{len(answer.places)}")
        if answer.serving != self._lane.serving:
            raise _AgentReplacedError(peer, expected=f"agent {self._lane.serving}", found=f"agent {answer.serving}")
        for item, place in enumerate(answer.places, start):
            if place is None:
                continue
            if place.length != self._pool.chunk_bytes:
                raise PeerProtocolError(peer, expected=f"{self._pool.chunk_bytes} bytes", found=f"{place.length} bytes")
            self._resolved[item] = place
        self.has_resolved = True

    def _arrive(self) -> None:
        """The first run is here. Have it hashed, and ask whether the slots still hold what was resolved."""
        run = self._runs[0]
        rows = [self._pool.row(self._book.items[item].slot) for item in run.items]
        try:
            digests = None if self._hasher is None else self._hasher.submit(_hash, rows)
        except RuntimeError:
            raise PeerCancelledError(self._lane.link.peer, found="transport closed") from None
        self._arrived = _Arrived(self._runs.popleft(), digests)
        asked = [SlotGeneration(place.slot, place.generation) for place in run.places]
        self._lane.link.send(Validate(asked), self._deadline)

    def _decide(self) -> None:
        """Take in the answer for the run that has arrived, if there is one."""
        if self._arrived is None:
            return
        run, hashing = self._arrived
        answer = self._lane.link.receive(Validated, self._deadline)
        if len(answer.checksums) != len(run.items):
            expected = f"{len(run.items)} checksums"
            raise PeerProtocolError(self._lane.link.peer, expected=expected, found="another number")
        digests = answer.checksums if hashing is None else hashing.result()
        self._arrived = None
        for item, checksum, digest in zip(run.items, answer.checksums, digests, strict=True):
            if not checksum:
                self._book.miss(item, MissReason.STALE)
            elif digest != checksum:
                self._book.miss(item, MissReason.CORRUPT)
            else:
                self._book.hit(item, checksum)
                continue
            self._book.end(MissReason.TRUNCATED)
        self._book.report()


def _hash(rows: Sequence[memoryview]) -> list[bytes]:
    return [xxhash.xxh3_128_digest(row) for row in rows]
