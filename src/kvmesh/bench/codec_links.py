"""`kvmesh bench codec`, first part: what the wire codec does for fetches over links of different speeds.

A holder and a reader behind a rate-limited link, with nodes as they are; the chunks are numbers distributed like those
of KV. At each speed the same prompt is fetched again and again with each codec in turn, between nodes of its own. The
first fetches are not counted: they open connections, and `auto` learns from them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from kvmesh.bench.rated_cluster import RatedCluster
from kvmesh.bench.rated_engine import Ask
from kvmesh.config.model import WireCodec

CHUNK_BYTES, CHUNK_TOKENS = 512 << 10, 256
MIN_CHUNKS, MAX_CHUNKS = 4, 64
FETCH_S = 1.0
"""About how long a fetch is to take raw, between these limits."""
SPEEDS_MBIT_S = (10, 100, 300, 1000, 2500, 5000, 0)
"""0: as fast as the machine can."""
CODECS: tuple[WireCodec, ...] = ("none", "lossless", "auto")
LEARNING = 7
MEASURED_S = 1.5
"""Fetches that are over in milliseconds are repeated until so much raw time has been measured."""
ALLOWED_OVER_RAW = 1.05


@dataclass(frozen=True)
class LinkRow:
    """One speed of the link: medians of the seconds of a fetch."""

    mbit_s: float
    fetch_bytes: int
    none_s: float
    lossless_s: float
    auto_s: float

    @property
    def auto_over_raw(self) -> float:
        return self.auto_s / self.none_s

    @property
    def link(self) -> str:
        """Its speed in words."""
        return f"{self.mbit_s:g}" if self.mbit_s else "no limit"

    @property
    def is_kept(self) -> bool:
        """Whether choosing has cost no more than it may."""
        return self.auto_over_raw <= ALLOWED_OVER_RAW


def measure_link(mbit_s: float, repeats: int) -> LinkRow:
    """One speed. Raises StartupError without network namespaces."""
    rate = mbit_s * 1e6 / 8 * FETCH_S if mbit_s else float("inf")
    chunks = int(max(MIN_CHUNKS, min(MAX_CHUNKS, rate // CHUNK_BYTES)))
    with contextlib.ExitStack() as stack:
        clusters = [
            stack.enter_context(_cluster(codec, chunks, first_net=2 * number)) for number, codec in enumerate(CODECS)
        ]
        for cluster in clusters:
            cluster.star.limit(mbit_s or None)
            cluster.put("document", chunks)
        # In turns: whatever else the machine does, it does to all of them.
        for _ in range(LEARNING):
            _round(clusters, chunks)
        rounds: list[list[float]] = []
        while len(rounds) < repeats or sum(seconds[0] for seconds in rounds) < MEASURED_S:
            rounds.append(_round(clusters, chunks))
    return LinkRow(mbit_s, chunks * CHUNK_BYTES, *map(median, zip(*rounds, strict=True)))


def _cluster(codec: WireCodec, chunks: int, first_net: int) -> RatedCluster:
    return RatedCluster(
        1,
        slots=2 * chunks,
        chunk_bytes=CHUNK_BYTES,
        chunk_tokens=CHUNK_TOKENS,
        tokens_per_s=1e6,
        like_kv=True,
        wire_codec=codec,
        first_net=first_net,
        fetch_timeout_s=120.0,
    )


def _round(clusters: Sequence[RatedCluster], chunks: int) -> list[float]:
    """Seconds of a fetch by each."""
    answers = [cluster.reader.tell(Ask("document", chunks, "always")) for cluster in clusters]
    assert all(answer.fetched == chunks and not answer.wrong for answer in answers)
    return [answer.seconds for answer in answers]
