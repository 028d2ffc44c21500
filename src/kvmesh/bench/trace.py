"""`kvmesh bench trace`: a request trace replayed in `simulator.py`, with sharing and without, for each policy.

A trace has one JSON object per line: `timestamp` (ms), `input_length`, `output_length` (tokens) and `hash_ids`, one per
block of 512 tokens; equal ids mean an equal prefix. That is the form of the traces published with the Mooncake paper
(FAST'25).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from kvmesh.bench.output import result_console
from kvmesh.bench.simulator import SIMULATED_POLICIES, Fleet, Outcome, SimRequest, Simulator
from kvmesh.errors import StartupError

BLOCK_TOKENS = 512
"""Of a hash id in the trace."""
ATTENTION_AT_TOKENS = 65_536
"""Attention to earlier tokens doubles the time per token about there (Llama-3.1-8B on an H100)."""


@dataclass(frozen=True)
class TraceRun:
    """What to replay. One line of the result for each combination."""

    path: Path
    instances: Sequence[int]
    pool_gib: Sequence[float]
    policies: Sequence[str]
    link_gbit: float
    prefill_tokens_per_s: float
    kv_bytes_per_token: int
    speed: float = 1.0
    copies: int = 1
    limit: int = 0

    def fleet(self, instances: int, pool_gib: float) -> Fleet:
        chunk_bytes = BLOCK_TOKENS * self.kv_bytes_per_token
        return Fleet(
            instances=instances,
            pool_chunks=max(1, int(pool_gib * 2**30 / chunk_bytes)) if pool_gib else 0,
            chunk_tokens=BLOCK_TOKENS,
            kv_bytes_per_token=self.kv_bytes_per_token,
            prefill_tokens_per_s=self.prefill_tokens_per_s,
            attention_s_per_token2=1 / self.prefill_tokens_per_s / ATTENTION_AT_TOKENS,
            link_bytes_per_s=self.link_gbit * 1e9 / 8,
        )


class _Line(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int]


def read_trace(path: Path, *, speed: float = 1.0, copies: int = 1, limit: int = 0) -> list[SimRequest]:
    """Read a trace.

    Args:
        path: JSON lines.
        speed: so many times as fast.
        copies: so many tenants send the same requests, each with texts of its own.
        limit: only so many lines; 0: all.

    Raises:
        StartupError: the file cannot be read, or a line is not as described above.
    """
    decoder = msgspec.json.Decoder(_Line)
    lines = []
    try:
        with path.open("rb") as file:
            for number, text in enumerate(file, start=1):
                if text.strip():
                    lines.append(decoder.decode(text))
                if limit and number >= limit:
                    break
    except (OSError, msgspec.MsgspecError) as error:
        expected = "lines with timestamp, input_length, output_length and hash_ids"
        raise StartupError(f"trace {path}", expected, str(error)) from None
    if not lines:
        raise StartupError(f"trace {path}", "at least one request", "none")
    return sorted(_requests(lines, speed, copies), key=lambda request: request.at_s)


def _requests(lines: Sequence[_Line], speed: float, copies: int) -> Iterator[SimRequest]:
    size = 1 + max((max(line.hash_ids, default=0) for line in lines), default=0)
    for copy in range(copies):
        for line in lines:
            whole = line.hash_ids[: line.input_length // BLOCK_TOKENS]  # the last block may not be full
            chunks = [copy * size + id_ for id_ in whole]
            # A conversation is known by its second block: the first is the same for many.
            session = str(chunks[min(1, len(chunks) - 1)]) if chunks else ""
            yield SimRequest(line.timestamp / 1000 / speed, line.input_length, line.output_length, chunks, session)


def replay(run: TraceRun, console: Console | None = None) -> list[Outcome]:
    """All combinations. Raises StartupError for unknown policies and unreadable traces."""
    unknown = [policy for policy in run.policies if policy not in SIMULATED_POLICIES]
    if unknown:
        raise StartupError("--policies", ", ".join(SIMULATED_POLICIES), ", ".join(unknown))
    requests = read_trace(run.path, speed=run.speed, copies=run.copies, limit=run.limit)
    outcomes = []
    for instances in run.instances:
        for pool_gib in run.pool_gib:
            for sharing in (False, True):
                for policy in run.policies:
                    started_s = time.perf_counter()
                    outcome = Simulator(run.fleet(instances, pool_gib), policy, sharing=sharing).run(requests)
                    outcomes.append(outcome)
                    if console is not None:
                        took_s = time.perf_counter() - started_s
                        label = (
                            f"{instances} instances, {pool_gib:g} GiB, {policy}, sharing {'on' if sharing else 'off'}"
                        )
                        console.print(f"[dim]{label}: {took_s:.1f} s[/dim]")
    return outcomes


def outcome_record(outcome: Outcome, chunk_bytes: int) -> dict[str, object]:
    """For JSON."""
    return {
        "policy": outcome.policy,
        "sharing": outcome.sharing,
        "instances": outcome.instances,
        "pool_gib": round(outcome.pool_chunks * chunk_bytes / 2**30, 3),
        "requests": outcome.requests,
        "prompt_tokens": outcome.prompt_tokens,
        "hit_rate": outcome.hit_rate,
        "local_hit_rate": outcome.local_hit_rate,
        "moved_bytes": outcome.moved_bytes,
        "gated_tokens": outcome.gated_tokens,
        "mean_ttft_s": outcome.mean_ttft_s,
        "p50_ttft_s": outcome.ttft(0.5),
        "p90_ttft_s": outcome.ttft(0.9),
        "p99_ttft_s": outcome.ttft(0.99),
        "busiest_of_mean": outcome.busiest_of_mean,
        "utilisation": outcome.utilisation,
    }


def outcome_table(title: str, outcomes: Sequence[Outcome], chunk_bytes: int) -> Table:
    """For people."""
    table = Table(title=title, title_justify="left")
    for heading in ("instances", "pool", "sharing", "policy"):
        table.add_column(heading)
    for heading in ("hit %", "local %", "moved GB", "TTFT mean s", "p50", "p90", "p99", "busiest/mean", "busy %"):
        table.add_column(heading, justify="right")
    for one in outcomes:
        pool_gib = one.pool_chunks * chunk_bytes / 2**30
        table.add_row(
            str(one.instances),
            f"{pool_gib:.3g} GiB" if pool_gib else "unlimited",
            "on" if one.sharing else "off",
            one.policy,
            f"{100 * one.hit_rate:.1f}",
            f"{100 * one.local_hit_rate:.1f}",
            f"{one.moved_bytes / 1e9:,.{0 if one.moved_bytes > 10e9 else 2}f}",
            f"{one.mean_ttft_s:.3f}",
            f"{one.ttft(0.5):.3f}",
            f"{one.ttft(0.9):.2f}",
            f"{one.ttft(0.99):.2f}",
            f"{one.busiest_of_mean:.2f}",
            f"{100 * one.utilisation:.0f}",
        )
    return table


def run_trace(run: TraceRun, *, as_json: bool) -> int:
    """Replay and print; returns the exit status."""
    outcomes = replay(run, None if as_json else Console(stderr=True))
    chunk_bytes = BLOCK_TOKENS * run.kv_bytes_per_token
    if as_json:
        records = [outcome_record(one, chunk_bytes) for one in outcomes]
        typer.echo(json.dumps({"trace": run.path.name, "outcomes": records}, indent=2))
        return 0
    title = (
        f"{run.path.name}: {run.prefill_tokens_per_s:,.0f} prefill tokens/s, {run.link_gbit:g} Gbit/s, "
        f"{run.kv_bytes_per_token:,} KV bytes per token, speed {run.speed:g}"
    )
    result_console().print(outcome_table(title, outcomes, chunk_bytes))
    return 0
