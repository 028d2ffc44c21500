"""What is told of a fetch that has ended: one line in the log, one report to the directory, and running totals."""

from __future__ import annotations

import logging
from collections import Counter
from typing import NamedTuple

from kvmesh.node.fetcher import JobResult
from kvmesh.node.peers import Peers
from kvmesh.wire.directory import FetchReport

log = logging.getLogger("kvmesh.node")

MAX_ID_CHARACTERS = 256
MAX_HOLDERS = 64


class FetchSummary(NamedTuple):
    """One fetch that has ended."""

    request_id: str
    asked_chunks: int
    fetched_chunks: int
    fetched_bytes: int
    seconds: float
    holders: list[str]
    transports: str
    """Their names with commas between them, or "-"."""
    misses: dict[str, int]
    corrupt: dict[str, int]

    @classmethod
    def of(cls, request_id: str, result: JobResult, peers: Peers, chunk_bytes: int) -> FetchSummary:
        """Called while the holders are peers still, as far as they are."""
        fetched = len(result.fetched())
        transports = {peer.transport.name for holder in result.holders if (peer := peers.get(holder))}
        return cls(
            request_id,
            len(result.outcomes),
            fetched,
            fetched * chunk_bytes,
            result.seconds,
            result.holders,
            ",".join(sorted(transports)) or "-",
            {reason.value: count for reason, count in result.misses().items()},
            result.corrupt,
        )

    def log(self) -> None:
        """The one line per fetch."""
        log.info(
            "fetch request=%s chunks=%d/%d bytes=%d seconds=%.4f gb_per_s=%.2f holders=%s transport=%s misses=%s",
            self.request_id,
            self.fetched_chunks,
            self.asked_chunks,
            self.fetched_bytes,
            self.seconds,
            self.fetched_bytes / max(self.seconds, 1e-9) / 1e9,
            ",".join(self.holders) or "-",
            self.transports,
            ",".join(f"{reason}:{count}" for reason, count in self.misses.items()) or "-",
        )

    def report(self, instance_id: str, incarnation: str) -> FetchReport:
        """For the directory."""
        return FetchReport(
            instance_id=instance_id,
            incarnation=incarnation,
            request_id=self.request_id[:MAX_ID_CHARACTERS],
            holders=tuple(self.holders[:MAX_HOLDERS]),
            transport=self.transports,
            chunks_asked=self.asked_chunks,
            chunks_fetched=self.fetched_chunks,
            fetched_bytes=self.fetched_bytes,
            seconds=self.seconds,
            misses=self.misses,
            corrupt=self.corrupt,
        )


class FetchTotals:
    """All fetches of a node so far."""

    def __init__(self) -> None:
        self.fetches = 0
        self.chunks = 0
        self.bytes = 0
        self.seconds = 0.0
        self.misses: Counter[str] = Counter()
        """Chunks by reason."""

    def add(self, done: FetchSummary) -> None:
        self.fetches += 1
        self.chunks += done.fetched_chunks
        self.bytes += done.fetched_bytes
        self.seconds += done.seconds
        self.misses.update(done.misses)
