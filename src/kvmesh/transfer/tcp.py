"""Chunks over plain TCP, received straight into the slots.

A fetch is cut into runs of a few MiB in prefix order. One or more connections take the next run whenever they have room
for it, and keep two runs asked for, so that the holder never waits for us and whatever has arrived at the deadline is a
prefix.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import NamedTuple

import xxhash

from kvmesh.core.reasons import PEER_FAULTS, MissReason
from kvmesh.errors import (
    KVMeshError,
    PeerAuthenticationError,
    PeerClosedError,
    PeerProtocolError,
    PeerReadError,
    PeerWriteError,
)
from kvmesh.transfer.base import ChunkOutcome, Deadline, FetchItem, Progress, TransportStatistics
from kvmesh.transfer.coding import SAMPLE_BYTES, Coding, Decoder, PeerCoding
from kvmesh.transfer.leases import FetchBook, Lease, Leases
from kvmesh.transfer.link import PeerLink, PeerTarget
from kvmesh.transfer.pool import HostPool
from kvmesh.transfer.security import OPEN, PeerSecurity
from kvmesh.transfer.stream import reason_of
from kvmesh.wire.auth import AuthenticationError
from kvmesh.wire.peer import (
    HEADER_BYTES,
    MAX_KEYS,
    TRAILER_BYTES,
    ChunkHeader,
    ChunkStatus,
    ChunkTrailer,
    Get,
    Hello,
    MessageError,
    Verdict,
    parse_header,
    parse_trailer,
)

log = logging.getLogger(__name__)

RUN_BYTES = 4 << 20
"""Chunks asked for in one request. Two runs under way cover 8 MiB: 100 Gbit/s at 0.6 ms of round trip."""
RUNS_AHEAD = 2
PIECE_BYTES = 4 << 20
"""Received and hashed at a time. Larger pieces leave the cache before they are hashed, smaller ones cost wake-ups
(measured).
"""
CONNECTIONS_PER_FETCH = 2
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
            connections: connections that one fetch spreads over, when it is large enough.
            max_connections: connections to this peer over all fetches at a time; more fetches wait.
            verify: hash what arrives and compare with the checksum it was published with.
            security: the cluster key and TLS, where there are any.
            coding: the wire codec that `ours` offers; None for none.
        """
        self.target = target
        self._pool = pool
        self._verify = verify
        self._connections = connections
        self._run_chunks = max(1, min(MAX_KEYS, RUN_BYTES // pool.chunk_bytes))
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
        way = _Way(self._coding)
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

    def _learn(self, peer: PeerCoding, outcomes: Sequence[ChunkOutcome], way: _Way, seconds: float) -> None:
        """How long it took, coded or raw, where that says something of the link; `seconds` is this fetch's share."""
        reasons = {outcome.reason for outcome in outcomes}
        came = [outcome.item for outcome in outcomes if outcome.reason is None]
        if not came or not PEER_FAULTS.isdisjoint(reasons):
            return
        peer.came(len(came) * self._pool.chunk_bytes, way.wire_bytes, seconds)
        if not way.wire_bytes and way.is_offered and peer.coding.wants_sample():
            with contextlib.suppress(RuntimeError):  # closed meanwhile
                self._helpers.submit(peer.coding.sample, bytes(self._pool.row(came[0].slot)[:SAMPLE_BYTES]))

    def _fetch(self, book: FetchBook, deadline: Deadline, way: _Way) -> None:
        """Pull over our own connection, with helpers over further ones where the fetch is large enough."""
        try:
            lease = self._links.take(deadline, wait=True)  # before helpers can take the last one
        except KVMeshError as error:
            book.end(self._note(error))
            return
        runs = -(-len(book.items) // self._run_chunks)
        helpers = self._start_helpers(min(self._connections, runs) - 1, book, deadline, way)
        try:
            self._work(_Pull(book, deadline, self._pool, way, verify=self._verify, reports=True), lease, deadline)
        finally:
            # Whatever happens here, helpers write into our slots until they are done; the deadline bounds them.
            book.end(MissReason.TRUNCATED)
            running = [helper for helper in helpers if not helper.cancel()]
            wait(running)
        for helper in running:
            helper.result()

    def _start_helpers(self, count: int, book: FetchBook, deadline: Deadline, way: _Way) -> list[Future[None]]:
        try:
            return [self._helpers.submit(self._help, book, deadline, way) for _ in range(count)]
        except RuntimeError:  # closed meanwhile; the caller's own work finds out
            return []

    def _help(self, book: FetchBook, deadline: Deadline, way: _Way) -> None:
        """A helper's work. Without a connection it leaves all of it to the others."""
        try:
            lease = self._links.take(deadline, wait=False)
        except KVMeshError as error:
            self._note(error)
            return
        self._work(_Pull(book, deadline, self._pool, way, verify=self._verify, reports=False), lease, deadline)

    def _work(self, pull: _Pull, lease: Lease[PeerLink] | None, deadline: Deadline) -> None:
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

    def _pull(self, pull: _Pull, lease: Lease[PeerLink]) -> bool:
        """Work on one connection; False when it was an old one that had died while idle, so that a new one should be
        tried.
        """
        link = lease.connection
        try:
            pull.run(link)
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
        self._links.give_back(link)
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


class _Asked(NamedTuple):
    """A chunk on its way: which request asks for it, at which position, and which item of the fetch it is."""

    request: int
    position: int
    item: int


class _Way:
    """Coded or raw: the same for all of a fetch, so that it says how fast that is. Safe to use from any thread."""

    def __init__(self, peer: PeerCoding | None) -> None:
        self._coding = peer.coding if peer is not None else None
        self._is_coded = peer is not None and peer.wants_coded()
        self._lock = threading.Lock()
        self.is_offered = False
        """The peer knows our codec."""
        self.wire_bytes = 0
        """That have come coded."""

    def decoder(self, link: PeerLink) -> Decoder | None:
        """What to receive with on this connection; None for raw chunks. Raises PeerProtocolError."""
        if self._coding is None:
            return None
        if self._coding.name not in link.theirs.codecs:
            if self._coding.is_lossy:
                raise PeerProtocolError(link.peer, expected=f"codec {self._coding.name}", found="none in common")
            return None
        self.is_offered = True
        return self._coding.decoder() if self._is_coded else None

    @property
    def codec(self) -> str:
        """The codec's name, for a Get whose answer is read with `decoder`."""
        return "" if self._coding is None else self._coding.name

    def add(self, wire_bytes: int) -> None:
        """A chunk has come."""
        with self._lock:
            self.wire_bytes += wire_bytes


class _Pull:
    """One connection's part in a fetch."""

    def __init__(
        self, book: FetchBook, deadline: Deadline, pool: HostPool, way: _Way, *, verify: bool, reports: bool
    ) -> None:
        self._book = book
        self._deadline = deadline
        self._pool = pool
        self._way = way
        self._decoder: Decoder | None = None
        self._verify = verify
        self._reports = reports
        self._run_chunks = max(1, min(MAX_KEYS, RUN_BYTES // pool.chunk_bytes))
        self._asked: deque[_Asked] = deque()
        self._requests = 0
        self._header = memoryview(bytearray(HEADER_BYTES))
        self._trailer = memoryview(bytearray(TRAILER_BYTES))
        self._has_header = False
        """The header of the next chunk has been read."""
        self.has_heard = False
        """The peer has answered on this connection."""

    def run(self, link: PeerLink) -> None:
        """Pull until nothing is left. Raises what the link raises, with the undecided items still on our list."""
        self._decoder = self._way.decoder(link)
        self._ask_again(link)
        while self._ask_ahead(link):
            self._receive(link, self._asked[0])
            self._asked.popleft()
            if self._reports:
                self._book.report()

    def give_up(self, reason: MissReason) -> None:
        """Decide what was asked for here, and have the rest not asked for."""
        for asked in self._asked:
            self._book.miss(asked.item, reason)
        self._asked.clear()
        self._book.end(reason)

    def _ask_ahead(self, link: PeerLink) -> bool:
        """Keep runs asked for; False when nothing is on its way any more."""
        while len(self._asked) <= self._run_chunks * (RUNS_AHEAD - 1):
            run = self._book.take(self._run_chunks)
            if not run:
                break
            self._ask(link, run)
        return bool(self._asked)

    def _ask_again(self, link: PeerLink) -> None:
        """After an idle connection turned out dead: its requests, on the new one."""
        indices = [asked.item for asked in self._asked]
        self._asked.clear()
        self._has_header = False
        for start in range(0, len(indices), self._run_chunks):
            self._ask(link, indices[start : start + self._run_chunks])

    def _ask(self, link: PeerLink, indices: Sequence[int]) -> None:
        self._requests += 1
        self._asked.extend(_Asked(self._requests, position, index) for position, index in enumerate(indices))
        keys: list[bytes] = [self._book.items[index].key for index in indices]
        link.send(Get(self._requests, keys, self._way.codec if self._decoder is not None else ""), self._deadline)

    def _receive(self, link: PeerLink, asked: _Asked) -> None:
        """One chunk into its slot, and the next one's header where that comes with it."""
        stream, deadline, book = link.stream, self._deadline, self._book
        if not self._has_header:
            stream.receive_into(self._header, deadline)
        self.has_heard, self._has_header = True, False
        if self._parse_header(link, asked).status is ChunkStatus.GONE:
            book.miss(asked.item, MissReason.EVICTED)
            book.end(MissReason.TRUNCATED)
            return
        row = self._pool.row(book.items[asked.item].slot)
        digest = xxhash.xxh3_128() if self._verify else None
        if self._decoder is None:
            self._receive_raw(link, asked, row, digest)
        else:
            self._way.add(self._decoder.receive(stream, row, deadline, digest))
            stream.receive_into(self._trailer, deadline)
        trailer = self._parse_trailer(link, asked)
        if trailer.verdict is Verdict.STALE:
            book.miss(asked.item, MissReason.STALE)
        elif digest is not None and digest.digest() != trailer.checksum:
            book.miss(asked.item, MissReason.CORRUPT)
        else:
            book.hit(asked.item, trailer.checksum)
            return
        book.end(MissReason.TRUNCATED)

    def _receive_raw(self, link: PeerLink, asked: _Asked, row: memoryview, digest: xxhash.xxh3_128 | None) -> None:
        """Payload and trailer, and the next header where that comes with them."""
        stream, deadline = link.stream, self._deadline
        last = (len(row) - 1) // PIECE_BYTES * PIECE_BYTES
        for start in range(0, last, PIECE_BYTES):
            piece = row[start : start + PIECE_BYTES]
            stream.receive_into(piece, deadline)
            if digest is not None:
                digest.update(piece)
        # Within one Get the holder sends a trailer together with the next header, so waiting for both delays nothing.
        self._has_header = len(self._asked) > 1 and self._asked[1].request == asked.request
        tail = [self._trailer, self._header] if self._has_header else [self._trailer]
        stream.receive_parts([row[last:], *tail], deadline)
        if digest is not None:
            digest.update(row[last:])

    def _parse_header(self, link: PeerLink, asked: _Asked) -> ChunkHeader:
        try:
            header = parse_header(self._header, link.stream.receiving)
        except AuthenticationError as error:
            raise PeerAuthenticationError(link.peer, found=str(error)) from None
        except MessageError as error:
            raise PeerProtocolError(link.peer, found=str(error)) from None
        if header[1:3] != asked[:2]:
            raise PeerProtocolError(link.peer, expected=f"chunk {asked[:2]}", found=f"chunk {header[1:3]}")
        if header.status is ChunkStatus.HELD and header.length != self._pool.chunk_bytes:
            expected = f"chunk of {self._pool.chunk_bytes} bytes"
            raise PeerProtocolError(link.peer, expected=expected, found=f"{header.length} bytes")
        return header

    def _parse_trailer(self, link: PeerLink, asked: _Asked) -> ChunkTrailer:
        try:
            trailer = parse_trailer(self._trailer, link.stream.receiving)
        except AuthenticationError as error:
            raise PeerAuthenticationError(link.peer, found=str(error)) from None
        except MessageError as error:
            raise PeerProtocolError(link.peer, found=str(error)) from None
        if trailer[1:3] != asked[:2]:
            raise PeerProtocolError(link.peer, expected=f"trailer of chunk {asked[:2]}", found=f"of {trailer[1:3]}")
        return trailer
