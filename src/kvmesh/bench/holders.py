"""`kvmesh bench holders`: how much sooner a prompt is there when several instances hold it.

Every holder has a link of its own to the reader, all of one speed; then the same prompt is fetched from one of them and
from all.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median

from rich.table import Table

from kvmesh.bench.output import result_console
from kvmesh.bench.rated_cluster import RatedCluster
from kvmesh.bench.rated_engine import Ask

CHUNK_BYTES, CHUNK_TOKENS = 2 << 20, 256
CHUNKS = 64


@dataclass(frozen=True)
class HoldersRow:
    """One number of holders."""

    holders: int
    median_s: float
    mb_per_s: float
    speedup: float
    """Over one holder."""
    link_share: float
    """Of what the links together could carry."""


def run_holders(counts: Sequence[int], mbit_s: float, repeats: int, *, as_json: bool) -> int:
    """Measure and print; always 0. Raises StartupError."""
    rows = measure_holders(counts, mbit_s, repeats)
    size = CHUNKS * CHUNK_BYTES
    if as_json:
        print(json.dumps({"mbit_s": mbit_s, "bytes": size, "rows": [asdict(row) for row in rows]}, indent=2))
        return 0
    title = f"{CHUNKS} chunks of {CHUNK_BYTES >> 20} MiB, {mbit_s:g} Mbit/s for each holder, medians of {repeats}"
    table = Table(title=title, title_justify="left")
    for heading in ("holders", "fetch, s", "MB/s", "times one", "of the links"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            str(row.holders),
            f"{row.median_s:.3f}",
            f"{row.mb_per_s:.1f}",
            f"{row.speedup:.2f}",
            f"{row.link_share:.0%}",
        )
    result_console().print(table)
    return 0


def measure_holders(counts: Sequence[int], mbit_s: float, repeats: int) -> list[HoldersRow]:
    """One row for each number of holders. Raises StartupError."""
    rows: list[HoldersRow] = []
    size = CHUNKS * CHUNK_BYTES
    for count in counts:
        found_s = median(_measure(count, mbit_s, repeats))
        speedup = (rows[0].median_s * rows[0].holders if rows else found_s * count) / found_s
        rows.append(
            HoldersRow(count, found_s, size / found_s / 1e6, speedup, size * 8 / found_s / (mbit_s * 1e6 * count))
        )
    return rows


def _measure(holders: int, mbit_s: float, repeats: int) -> list[float]:
    """Seconds of each fetch."""
    with RatedCluster(
        holders,
        slots=CHUNKS + 8,
        chunk_bytes=CHUNK_BYTES,
        chunk_tokens=CHUNK_TOKENS,
        tokens_per_s=1e6,
        fetch_timeout_s=120.0,
    ) as cluster:
        cluster.star.limit(mbit_s)
        cluster.put("document", CHUNKS)
        answers = [cluster.reader.tell(Ask("document", CHUNKS, "always")) for _ in range(repeats + 1)]
        assert all(answer.fetched == CHUNKS and not answer.wrong for answer in answers)
        return [answer.seconds for answer in answers[1:]]
