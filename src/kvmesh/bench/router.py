"""`kvmesh bench router`: requests per second through the router and what it adds to each, beside a direct connection.

The router has one core for itself; the engine, which only streams (`streaming_engine.py`), and the client
(`http_load.py`) share the others. Three measurements for each target, in turns within one run:

    alone   one request at a time: what the router adds to a quiet system
    paced   at a steady rate: what it adds while it works
    full    as many as it can take
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from kvmesh.bench.cluster import HOST, Process, free_ports, tail
from kvmesh.bench.output import result_console
from kvmesh.bench.trace import BLOCK_TOKENS, TraceRun, outcome_record, outcome_table, replay
from kvmesh.errors import StartupError

EVENTS = 4
"""Per answer."""
CONNECTIONS = 32
PACED_PER_S = 1000.0
ROUNDS = 3
"""Turns, of which the medians are told: this machine's cores are shared."""
START_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Measured:
    """Medians over the turns for one target. Milliseconds; added against the direct connection in the same turn."""

    target: str
    full_per_s: float
    alone_p50_ms: float
    paced_p50_ms: float
    paced_p99_ms: float
    alone_added_p50_ms: float
    paced_added_p50_ms: float
    alone_first_byte_added_p50_ms: float
    cpu_us_per_request: float
    """Of the router, while it was full."""


class _Load(msgspec.Struct):
    """What http_load prints."""

    requests_per_s: float
    first_byte_p50_ms: float
    first_byte_p99_ms: float
    total_p50_ms: float
    total_p99_ms: float
    failed: int


class _Turn(msgspec.Struct):
    alone: _Load
    paced: _Load
    full: _Load
    cpu_us_per_request: float


def run_router_benchmark(
    *, seconds: float, compare: Path | None, trace: Path | None, as_json: bool, quick: bool
) -> int:
    """Measure and print; returns the exit status."""
    console = Console(stderr=True)
    with console.status("measuring the router"):
        rows = measure(seconds, compare, rounds=1 if quick else ROUNDS)
    runs = _trace_runs(trace, quick=quick) if trace is not None else []
    outcomes = []
    for run in runs:
        with console.status(f"replaying {run.path.name} at {run.prefill_tokens_per_s:,.0f} prefill tokens/s"):
            outcomes.append(replay(run))
    if as_json:
        told = {
            "machine": {"cpus": os.cpu_count(), "python": platform.python_version(), "system": platform.platform()},
            "router": [asdict(row) for row in rows],
            "trace": [
                outcome_record(one, BLOCK_TOKENS * run.kv_bytes_per_token)
                for run, group in zip(runs, outcomes, strict=True)
                for one in group
            ],
        }
        typer.echo(json.dumps(told, indent=2))
        return 0
    result_console().print(_table(rows))
    for run, group in zip(runs, outcomes, strict=True):
        title = f"{run.path.name} in a simulation (kvmesh bench trace)"
        result_console().print(outcome_table(title, group, BLOCK_TOKENS * run.kv_bytes_per_token))
    return 0


def _trace_runs(trace: Path, *, quick: bool) -> list[TraceRun]:
    return [
        TraceRun(
            path=trace,
            instances=[8],
            pool_gib=[50.0],
            policies=["roundrobin", "leastload", "prefix", "kv"],
            link_gbit=25.0,
            prefill_tokens_per_s=10_000.0,
            kv_bytes_per_token=131_072,
            limit=2000 if quick else 0,
        )
    ]


def measure(seconds: float, compare: Path | None, *, rounds: int) -> list[Measured]:
    """Direct, through our router, and through another one if its command is given."""
    cores = sorted(os.sched_getaffinity(0))
    router_core, other_cores = {cores[0]}, set(cores[1:]) or {cores[0]}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvmesh-router-")))
        engine_port, router_port, compare_port = free_ports(3)
        engine = _start(
            stack,
            Process(
                "engine",
                [sys.executable, "-m", "kvmesh.bench.streaming_engine", str(engine_port), str(EVENTS)],
                folder / "engine.log",
            ),
            engine_port,
            other_cores,
        )
        del engine
        targets: dict[str, tuple[int, Process | None]] = {"direct": (engine_port, None)}
        command = [
            *(sys.executable, "-m", "kvmesh.cli", "router", "--host", HOST, "--port", str(router_port)),
            *("--backends", f"http://{HOST}:{engine_port}", "--log-level", "warning"),
        ]
        router = _start(stack, Process("kvmesh router", command, folder / "router.log"), router_port, router_core)
        targets["kvmesh router"] = (router_port, router)
        if compare is not None:
            command = [
                *(*shlex.split(str(compare)), "--host", HOST, "--port", str(compare_port)),
                *("--worker-urls", f"http://{HOST}:{engine_port}", "--policy", "round_robin"),
            ]
            other = Process(compare.name, command, folder / "compare.log")
            targets[compare.name] = (compare_port, _start(stack, other, compare_port, router_core))
        for port, process in targets.values():
            _wait_ready(port, process)
        turns: dict[str, list[_Turn]] = {name: [] for name in targets}
        for _ in range(rounds):
            for name, (port, process) in targets.items():
                turns[name].append(_turn(port, process, seconds, other_cores))
    return [_summary(name, turns[name], turns["direct"]) for name in targets]


def _start(stack: contextlib.ExitStack, process: Process, port: int, cores: set[int]) -> Process:
    stack.callback(process.stop)
    with _pinned(cores):
        process.start()
    until_s = time.monotonic() + START_TIMEOUT_S
    while True:
        with contextlib.suppress(OSError), socket.create_connection((HOST, port), timeout=1):
            return process
        if not process.is_running() or time.monotonic() > until_s:
            raise StartupError(process.name, "a program that listens", tail(process.log()))
        time.sleep(0.05)


def _wait_ready(port: int, process: Process | None) -> None:
    """Wait until a request comes back whole: routers check their engines first."""
    until_s = time.monotonic() + START_TIMEOUT_S
    while _load(port, 1, 0.2, 0.0, None).failed:
        if time.monotonic() > until_s:
            log = tail(process.log()) if process is not None else ""
            raise StartupError(f"port {port}", "an answer", log)
        time.sleep(0.2)


def _turn(port: int, process: Process | None, seconds: float, cores: set[int]) -> _Turn:
    alone = _load(port, 1, seconds, 0.0, cores)
    paced = _load(port, CONNECTIONS, seconds, PACED_PER_S, cores)
    before_s = 0.0 if process is None else _cpu_s(process)
    full = _load(port, CONNECTIONS, seconds, 0.0, cores)
    used_s = 0.0 if process is None else _cpu_s(process) - before_s
    return _Turn(alone, paced, full, 1e6 * used_s / max(1.0, full.requests_per_s * seconds))


def _load(port: int, connections: int, seconds: float, rate: float, cores: set[int] | None) -> _Load:
    command = [sys.executable, "-m", "kvmesh.bench.http_load", str(port), str(connections), str(seconds), str(rate)]
    with _pinned(cores):
        done = subprocess.run(command, capture_output=True, check=True, timeout=seconds + 60)
    return msgspec.json.decode(done.stdout.replace(b"NaN", b"0"), type=_Load)


@contextlib.contextmanager
def _pinned(cores: set[int] | None) -> Iterator[None]:
    """What is started meanwhile runs on these cores."""
    before = os.sched_getaffinity(0)
    if cores:
        os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _cpu_s(process: Process) -> float:
    import psutil  # noqa: PLC0415 - not needed for --help

    times = psutil.Process(process.pid).cpu_times()
    return float(times.user + times.system)


def _summary(name: str, turns: Sequence[_Turn], direct: Sequence[_Turn]) -> Measured:
    def median(value: Callable[[_Turn], float]) -> float:
        return statistics.median(value(turn) for turn in turns)

    def added(value: Callable[[_Turn], float]) -> float:
        pairs = zip(turns, direct, strict=True)
        return statistics.median(value(turn) - value(reference) for turn, reference in pairs)

    return Measured(
        target=name,
        full_per_s=median(lambda turn: turn.full.requests_per_s),
        alone_p50_ms=median(lambda turn: turn.alone.total_p50_ms),
        paced_p50_ms=median(lambda turn: turn.paced.total_p50_ms),
        paced_p99_ms=median(lambda turn: turn.paced.total_p99_ms),
        alone_added_p50_ms=added(lambda turn: turn.alone.total_p50_ms),
        paced_added_p50_ms=added(lambda turn: turn.paced.total_p50_ms),
        alone_first_byte_added_p50_ms=added(lambda turn: turn.alone.first_byte_p50_ms),
        cpu_us_per_request=median(lambda turn: turn.cpu_us_per_request),
    )


def _table(rows: Sequence[Measured]) -> Table:
    title = f"{EVENTS} events per answer; paced: {PACED_PER_S:.0f} requests/s; full: {CONNECTIONS} connections"
    table = Table(title=title, title_justify="left")
    table.add_column("target")
    for heading in (
        "full, requests/s",
        "router CPU µs",
        "alone p50 ms",
        "added",
        "first byte added",
        "paced p50 ms",
        "added",
        "paced p99 ms",
    ):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row.target,
            f"{row.full_per_s:,.0f}",
            f"{row.cpu_us_per_request:.0f}" if row.cpu_us_per_request else "",
            f"{row.alone_p50_ms:.3f}",
            f"{row.alone_added_p50_ms:.3f}",
            f"{row.alone_first_byte_added_p50_ms:.3f}",
            f"{row.paced_p50_ms:.3f}",
            f"{row.paced_added_p50_ms:.3f}",
            f"{row.paced_p99_ms:.3f}",
        )
    return table
