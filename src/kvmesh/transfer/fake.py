"""A transport between two pools of one process, with scripted faults: for tests of whatever uses transports."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import xxhash

from kvmesh.core.reasons import MissReason
from kvmesh.transfer.base import (
    ChunkOutcome,
    Deadline,
    FetchItem,
    Locate,
    Progress,
    TransportStatistics,
)
from kvmesh.transfer.leases import FetchBook
from kvmesh.transfer.pool import HostPool

_ENDING = frozenset(
    {
        MissReason.PEER_LOST,
        MissReason.PEER_STALLED,
        MissReason.PEER_UNREACHABLE,
        MissReason.PROTOCOL,
        MissReason.DEADLINE,
        MissReason.FORMAT_MISMATCH,
    }
)
"""Reasons after which the rest carries the same one."""


class Fault(NamedTuple):
    """What happens to one chunk. Several may be combined; the delay comes first."""

    until: threading.Event | None = None
    """Nothing arrives before this is set; the deadline runs."""
    reason: MissReason | None = None
    """The chunk is missed for this reason: EVICTED, STALE, PEER_LOST, ..."""
    is_corrupt: bool = False
    """One bit arrives wrong."""


class FakeTransport:
    """Copies chunks that `locate` finds in `holder` into `pool` (see `PeerTransport`)."""

    name = "fake"

    def __init__(
        self, holder: HostPool, locate: Locate, pool: HostPool, *, faults: Mapping[bytes, Fault] | None = None
    ) -> None:
        self._holder = holder
        self._locate = locate
        self._pool = pool
        self.faults = dict(faults or {})
        """By key; may be changed between fetches."""
        self.unreachable = False
        """Nobody answers any more."""
        self._closed = threading.Event()
        self._connects = 0
        self._fetched_chunks = 0

    def warm_up(self, deadline: Deadline) -> MissReason | None:
        """Succeeds unless `unreachable`."""
        del deadline
        if self.unreachable:
            return MissReason.PEER_UNREACHABLE
        self._connects = 1
        return None

    def fetch(
        self, items: Sequence[FetchItem], deadline: Deadline, progress: Progress | None = None
    ) -> list[ChunkOutcome]:
        """Copy `items` one by one, with the faults (see `PeerTransport`)."""
        book = FetchBook(items, progress)
        if self.unreachable:
            book.end(MissReason.PEER_UNREACHABLE)
        while run := book.take(1):
            reason = self._copy(items[run[0]], book, run[0], deadline)
            if reason is not None:
                book.miss(run[0], reason)
                book.end(reason if reason in _ENDING else MissReason.TRUNCATED)
            book.report()
        return book.close()

    def statistics(self) -> TransportStatistics:
        """Counters; from any thread."""
        chunks = self._fetched_chunks
        return TransportStatistics(self._connects, self._connects, chunks, chunks * self._pool.chunk_bytes, "")

    def close(self) -> None:
        """A running `fetch` ends with PEER_LOST at its next chunk."""
        self._closed.set()

    def _copy(self, item: FetchItem, book: FetchBook, index: int, deadline: Deadline) -> MissReason | None:
        fault = self.faults.get(item.key, Fault())
        if fault.until is not None:
            remaining_s = deadline.at_s - time.monotonic()
            if not fault.until.wait(max(0.0, min(remaining_s, deadline.stall_s))):
                return MissReason.PEER_STALLED if deadline.stall_s < remaining_s else MissReason.DEADLINE
        if self._closed.is_set():
            return MissReason.PEER_LOST
        if fault.reason is not None:
            return fault.reason
        located = self._locate(item.key)
        if located is None:
            return MissReason.EVICTED
        row = self._pool.row(item.slot)
        row[:] = self._holder.row(located.slot)
        if fault.is_corrupt:
            row[0] ^= 1
        if self._locate(item.key) != located:
            return MissReason.STALE
        if xxhash.xxh3_128_digest(row) != located.checksum:
            return MissReason.CORRUPT
        book.hit(index, located.checksum)
        self._fetched_chunks += 1
        return None
