"""`kvmesh bench gate`: does the gate take the better of fetching and computing, at every speed of the link?

At each speed a reader is asked prompts that a holder behind that link has: with the gate, always fetching what is
there, and never. Engines are stand-ins whose prefill takes real time (`kvmesh.bench.rated_engine`); node, link, probes
and gate are the real thing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import mean, median

from rich.console import Console
from rich.table import Table

from kvmesh.bench.output import result_console
from kvmesh.bench.rated_cluster import RatedCluster
from kvmesh.bench.rated_engine import Ask, Mode

CHUNK_BYTES, CHUNK_TOKENS = 512 << 10, 256
"""2 KiB of KV per token."""
TOKENS_PER_S = 4000.0
"""So computing makes 65 Mbit of KV per second: the speed of the link at which both take equally long."""
LENGTHS = (4, 8, 16)
"""Chunks of a prompt, in turn."""
SPEEDS_MBIT_S = (10, 30, 50, 65, 80, 100, 300, 1000, 5000)
ALLOWED_OVER_NEVER, ALLOWED_OVER_BETTER = 1.05, 1.10
MODES: tuple[Mode, ...] = ("gate", "always", "never")


@dataclass(frozen=True)
class GateRow:
    """One speed of the link."""

    mbit_s: float
    never_s: float
    """Time to the end of prefill, everything computed: the mean over LENGTHS of each one's median."""
    always_s: float
    gate_s: float
    fetched_share: float
    """Of the chunks, with the gate."""
    decision: str
    """The last one."""

    @property
    def over_never(self) -> float:
        return self.gate_s / self.never_s

    @property
    def over_better(self) -> float:
        return self.gate_s / min(self.never_s, self.always_s)

    @property
    def is_kept(self) -> bool:
        """Whether the gate has cost no more than it may."""
        return self.over_never <= ALLOWED_OVER_NEVER and self.over_better <= ALLOWED_OVER_BETTER


def run_gate(speeds_mbit_s: Sequence[float], requests: int, *, as_json: bool) -> int:
    """Measure and print; 1 when the gate cost more than it may at any speed. Raises StartupError."""
    rows = [measure_speed(speed, requests) for speed in speeds_mbit_s]
    if as_json:
        shown = [asdict(row) | {"over_never": row.over_never, "over_better": row.over_better} for row in rows]
        print(json.dumps({"requests": requests, "tokens_per_s": TOKENS_PER_S, "rows": shown}, indent=2))
    else:
        _show(rows, requests)
    return int(not all(row.is_kept for row in rows))


def measure_speed(mbit_s: float, requests: int) -> GateRow:
    """A fresh cluster at one speed. The reader has computed two other prompts before, so it knows its own speed."""
    with RatedCluster(
        1,
        slots=4 * max(LENGTHS),
        chunk_bytes=CHUNK_BYTES,
        chunk_tokens=CHUNK_TOKENS,
        tokens_per_s=TOKENS_PER_S,
        fetch_timeout_s=120.0,
    ) as cluster:
        cluster.star.limit(mbit_s)
        for number, chunks in enumerate(LENGTHS[:2]):
            cluster.reader.tell(Ask(f"unknown {number}", chunks, "gate"))
        cluster.put("document", max(LENGTHS))
        for chunks in LENGTHS:
            cluster.reader.tell(Ask("document", chunks, "gate"))  # not counted: opens connections where it fetches
        seconds: dict[str, float] = {}
        shares, decision = {}, ""
        for mode in MODES:
            answers = [
                cluster.reader.tell(Ask("document", LENGTHS[turn % len(LENGTHS)], mode)) for turn in range(requests)
            ]
            assert not any(answer.wrong for answer in answers)
            seconds[mode] = mean(
                median(answer.seconds for answer in answers[turn :: len(LENGTHS)]) for turn in range(len(LENGTHS))
            )
            fetched = sum(answer.fetched for answer in answers)
            shares[mode] = fetched / (fetched + sum(answer.computed for answer in answers))
            if mode == "gate":
                decision = answers[-1].decision
    return GateRow(mbit_s, seconds["never"], seconds["always"], seconds["gate"], shares["gate"], decision)


def _show(rows: Sequence[GateRow], requests: int) -> None:
    table = Table(
        title=f"Fetch or compute: {requests} prompts, {TOKENS_PER_S:.0f} tokens/s computed, "
        f"{CHUNK_BYTES // CHUNK_TOKENS} bytes of KV per token",
        title_justify="left",
    )
    headings = ("link, Mbit/s", "never, s", "always, s", "gate, s", "gate/never", "gate/better", "fetched", "")
    for heading in headings:
        table.add_column(heading, justify="right" if heading else "left")
    for row in rows:
        table.add_row(
            f"{row.mbit_s:g}",
            f"{row.never_s:.3f}",
            f"{row.always_s:.3f}",
            f"{row.gate_s:.3f}",
            f"{row.over_never:.3f}",
            f"{row.over_better:.3f}",
            f"{row.fetched_share:.0%}",
            row.decision if row.is_kept else f"MORE THAN IT MAY. {row.decision}",
        )
    out = result_console()
    (out if out.is_terminal else Console(width=200)).print(table)
