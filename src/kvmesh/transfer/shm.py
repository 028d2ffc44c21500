"""Chunks of a peer on this host, copied once from its pool into the slots.

The peer hands out read-only descriptors of its pool and of its slot ledger once per connection
(`kvmesh.transfer.shm_attachment`); after that its node has no part in a fetch. Where a chunk lies, and whether it was
still there when it had been copied, says the ledger: generation before and after, checksum of that generation. So a
stopped node is read from as long as the directory names it. A dead one is noticed by the end of the connection: its
memory is let go at once, or a pool would outlive its engine.

Our own threads do the copying, so when `fetch` has returned nothing writes into its slots.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

import xxhash

from kvmesh.core.reasons import MissReason
from kvmesh.errors import KVMeshError, PeerCancelledError, PeerClosedError, PeerConnectError, PeerTimeoutError
from kvmesh.transfer.base import ChunkOutcome, Deadline, FetchItem, Progress, TransportStatistics
from kvmesh.transfer.leases import FetchBook
from kvmesh.transfer.link import PeerTarget
from kvmesh.transfer.pool import HostPool
from kvmesh.transfer.security import OPEN, PeerSecurity
from kvmesh.transfer.shm_attachment import Attachment
from kvmesh.transfer.stream import reason_of
from kvmesh.wire.peer import Hello

log = logging.getLogger(__name__)

RUN_BYTES = 4 << 20
"""Taken by one thread at a time."""
PIECE_BYTES = 1 << 20
"""Copied and hashed at a time: larger pieces leave the cache before they are hashed."""
THREADS_PER_FETCH = 2
MAX_HELPERS = 8


class ShmTransport:
    """One peer on this host (see `PeerTransport`). All methods may be called from any thread."""

    name = "shm"

    def __init__(
        self,
        target: PeerTarget,
        ours: Hello,
        pool: HostPool,
        *,
        threads: int = THREADS_PER_FETCH,
        verify: bool = True,
        security: PeerSecurity = OPEN,
    ) -> None:
        """Connects nowhere yet.

        Args:
            target: the peer; an answer by another instance or incarnation is refused.
            ours: this node's Hello.
            pool: the pool whose slots are fetched into.
            threads: threads that one fetch spreads over, when it is large enough.
            verify: hash what was copied and compare with the checksum it was published with.
            security: the cluster key, where there is one. TLS has no use within one host.
        """
        self.target = target
        self._ours = ours
        self._pool = pool
        self._threads = threads
        self._verify = verify
        self._security = security
        self._run_chunks = max(1, RUN_BYTES // pool.chunk_bytes)
        self._helpers = ThreadPoolExecutor(MAX_HELPERS, thread_name_prefix=f"kvmesh-shm-{target.instance_id}")
        self._dialling = threading.Lock()
        self._lock = threading.Lock()
        """Guards what follows."""
        self._attachment: Attachment | None = None
        self._closed = threading.Event()
        self._connects = 0
        self._fetched_chunks = 0
        self._last_error = ""

    def warm_up(self, deadline: Deadline) -> MissReason | None:
        """Connect now (see `PeerTransport`)."""
        try:
            with self._attached(deadline):
                return None
        except KVMeshError as error:
            return self._note(error)

    def fetch(
        self, items: Sequence[FetchItem], deadline: Deadline, progress: Progress | None = None
    ) -> list[ChunkOutcome]:
        """Copy `items` into our slots (see `PeerTransport`)."""
        book = FetchBook(items, progress)
        if items:
            try:
                with self._attached(deadline) as attachment:
                    self._fetch(book, attachment, deadline)
            except KVMeshError as error:
                book.end(self._note(error))
        outcomes = book.close()
        with self._lock:
            self._fetched_chunks += sum(outcome.reason is None for outcome in outcomes)
        return outcomes

    def statistics(self) -> TransportStatistics:
        """Counters; from any thread."""
        with self._lock:
            return TransportStatistics(
                connections=int(self._attachment is not None),
                connects=self._connects,
                fetched_chunks=self._fetched_chunks,
                fetched_bytes=self._fetched_chunks * self._pool.chunk_bytes,
                last_error=self._last_error,
            )

    def close(self) -> None:
        """Let go of the peer's memory (see `PeerTransport`); a fetch that runs ends after the piece it copies."""
        self._closed.set()
        with self._lock:
            if self._attachment is not None:
                self._attachment.link.shut_down()  # its watcher does the rest
        self._helpers.shutdown(wait=False, cancel_futures=True)

    # -- the peer's memory ---------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _attached(self, deadline: Deadline) -> Iterator[Attachment]:
        """The peer's memory, which stays as long as the block runs. Raises KVMeshError."""
        attachment = self._borrow()
        if attachment is None:
            if not self._dialling.acquire(timeout=max(0.0, min(deadline.remaining_s(), threading.TIMEOUT_MAX))):
                raise PeerTimeoutError(str(self.target), expected="a connection before the deadline")
            try:
                attachment = self._borrow() or self._dial(deadline)
            finally:
                self._dialling.release()
        try:
            yield attachment
        finally:
            self._give_back(attachment)

    def _borrow(self) -> Attachment | None:
        with self._lock:
            if self._closed.is_set():
                raise PeerCancelledError(str(self.target), found="transport closed")
            attachment = self._attachment
            if attachment is not None and attachment.is_alive:
                attachment.users += 1
                return attachment
            return None

    def _dial(self, deadline: Deadline) -> Attachment:
        attachment = Attachment.dial(self.target, self._ours, self._pool.chunk_bytes, deadline, self._security)
        attachment.users = 1
        with self._lock:
            self._attachment = attachment
            self._connects += 1
            first = self._connects == 1
            if self._closed.is_set():
                attachment.link.shut_down()
        name = f"kvmesh-shm-watch-{self.target.instance_id}"
        try:
            threading.Thread(target=self._watch, args=(attachment,), name=name, daemon=True).start()
        except RuntimeError as error:
            self._end(attachment)
            self._give_back(attachment)
            raise PeerConnectError(str(self.target), expected="a thread to watch it", found=str(error)) from None
        if first:
            log.info(
                "Established connection to peer %s:%d instance=%s incarnation=%s transport=shm slots=%d",
                self.target.host,
                self.target.port,
                self.target.instance_id,
                self.target.incarnation,
                attachment.ledger.slots,
            )
        return attachment

    def _watch(self, attachment: Attachment) -> None:
        """A thread per connection: notices its end while nobody fetches, too."""
        attachment.wait_for_end()
        if self._end(attachment):
            attachment.close()

    def _end(self, attachment: Attachment) -> bool:
        """Lend it to nobody any more; true when nobody has it now."""
        with self._lock:
            attachment.is_alive = False
            if self._attachment is attachment:
                self._attachment = None
            return attachment.users == 0

    def _give_back(self, attachment: Attachment) -> None:
        with self._lock:
            attachment.users -= 1
            is_over = attachment.users == 0 and not attachment.is_alive
        if is_over:
            attachment.close()

    # -- fetching ------------------------------------------------------------------------------------------------------

    def _fetch(self, book: FetchBook, attachment: Attachment, deadline: Deadline) -> None:
        """Copy with our own thread, and with helpers where the fetch is large enough."""
        if not attachment.index.knows_all(item.key for item in book.items):
            attachment.index.refresh()
        runs = -(-len(book.items) // self._run_chunks)
        helpers = self._start_helpers(min(self._threads, runs) - 1, book, attachment, deadline)
        try:
            self._work(book, attachment, deadline, reports=True)
        finally:
            book.end(MissReason.TRUNCATED)
            running = [helper for helper in helpers if not helper.cancel()]
            wait(running)  # they write into our slots until they are done
        for helper in running:
            helper.result()

    def _start_helpers(
        self, count: int, book: FetchBook, attachment: Attachment, deadline: Deadline
    ) -> list[Future[None]]:
        try:
            return [self._helpers.submit(self._work, book, attachment, deadline, reports=False) for _ in range(count)]
        except RuntimeError:  # closed meanwhile; our own thread finds out
            return []

    def _work(self, book: FetchBook, attachment: Attachment, deadline: Deadline, *, reports: bool) -> None:
        """Copy runs until none is left."""
        while run := book.take(self._run_chunks):
            for index in run:
                try:
                    is_whole = self._copy(book, index, attachment, deadline)
                except KVMeshError as error:
                    reason = self._note(error)
                    for missed in range(index, run.stop):
                        book.miss(missed, reason)
                    book.end(reason)
                    return
                if reports:
                    book.report()
                if not is_whole:
                    book.end(MissReason.TRUNCATED)
                    return

    def _copy(self, book: FetchBook, index: int, attachment: Attachment, deadline: Deadline) -> bool:
        """One chunk into its slot; False when the prefix ends here. Raises KVMeshError when nothing more is to be had
        from this peer.
        """
        item = book.items[index]
        found = attachment.index.find(item.key)
        checksum = attachment.ledger.checksum(*found) if found is not None else None
        if found is None or checksum is None:
            book.miss(index, MissReason.EVICTED)
            return False
        slot, generation = found
        row = self._pool.row(item.slot)
        digest = xxhash.xxh3_128() if self._verify else None
        for start in range(0, len(row), PIECE_BYTES):
            self._check(attachment, deadline)
            piece = row[start : start + PIECE_BYTES]
            attachment.read(slot, start, piece)
            if digest is not None:
                digest.update(piece)
        # Every byte has been copied: only now does the generation say what they were.
        if not attachment.ledger.is_current(slot, generation):
            book.miss(index, MissReason.STALE)
        elif digest is not None and digest.digest() != checksum:
            book.miss(index, MissReason.CORRUPT)
        else:
            book.hit(index, checksum)
            return True
        return False

    def _check(self, attachment: Attachment, deadline: Deadline) -> None:
        if self._closed.is_set():
            raise PeerCancelledError(str(self.target), found="transport closed")
        if not attachment.is_alive:
            raise PeerClosedError(str(self.target), found="connection closed by the peer")
        if deadline.remaining_s() <= 0:
            raise PeerTimeoutError(str(self.target), expected="a copy done before the deadline")

    def _note(self, error: KVMeshError) -> MissReason:
        reason = reason_of(error)
        with self._lock:
            is_news, self._last_error = self._last_error != str(error), str(error)
        log.log(logging.WARNING if is_news else logging.DEBUG, "peer failed reason=%s error=%s", reason.value, error)
        return reason
