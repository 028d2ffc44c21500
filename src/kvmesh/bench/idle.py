"""`kvmesh bench idle`: what an idle cluster costs. A controller and two nodes over small pools; CPU time and memory of
each process.

Memory is what the process has for itself (USS): the pool is shared with the engine and counted there.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from rich.table import Table

from kvmesh.bench.cluster import Controller, wait_healthy
from kvmesh.bench.output import result_console
from kvmesh.bench.stand_in import StandInEngine, make_key
from kvmesh.config import KVMeshConfig

CHUNK_BYTES = 1 << 20
SLOTS = 32


@dataclass(frozen=True)
class IdleRow:
    """One process over the time measured, with the processes that it has started."""

    process: str
    cpu_percent: float
    """Of one core."""
    memory_mb: float


def run_idle(seconds: float, channel: str, *, as_json: bool) -> int:
    """Measure and print; always 0."""
    rows = measure_idle(seconds, channel)
    total = _total_percent(rows)
    if as_json:
        print(
            json.dumps(
                {
                    "seconds": seconds,
                    "channel": channel,
                    "total_cpu_percent": total,
                    "rows": [asdict(row) for row in rows],
                },
                indent=2,
            )
        )
        return 0
    table = Table(title=f"Idle for {seconds:.0f} s, {channel}", title_justify="left")
    for heading in ("process", "CPU, % of a core", "memory, MB"):
        table.add_column(heading, justify="right" if "," in heading else "left")
    for row in rows:
        table.add_row(row.process, f"{row.cpu_percent:.2f}", f"{row.memory_mb:.0f}")
    table.add_row("all", f"{total:.2f}", "")
    result_console().print(table)
    return 0


def measure_idle(seconds: float, channel: str, *, windows: int = 1, enough_percent: float = 0.0) -> list[IdleRow]:
    """Start a controller and two nodes that have exchanged some chunks, leave them alone, and read their processes.

    Of several windows the quietest counts: on a machine that others use as well, the same work takes more CPU time.
    There are no more windows after one in which all of them together used less than `enough_percent` of a core.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvmesh-idle-")))
        controller = Controller(folder)
        stack.callback(controller.stop)
        controller.start()
        wait_healthy(controller, timeout_s=60)
        engines = []
        for name in ("node-1", "node-2"):
            config = KVMeshConfig(
                instance_id=name,
                transfer_channel=channel,  # type: ignore[arg-type]  # pydantic checks what the command line says
                enable_controller=True,
                controller_pull_url=f"tcp://127.0.0.1:{controller.pull_port}",
                controller_reply_url=f"tcp://127.0.0.1:{controller.reply_port}",
                log_level="warning",
            )
            engine = StandInEngine(config, slots=SLOTS, chunk_bytes=CHUNK_BYTES)
            stack.callback(engine.close)
            engine.start()
            engines.append(engine)
        keys = [make_key(str(number)) for number in range(SLOTS)]
        engines[0].put(keys)
        engines[1].wait_visible(keys)
        engines[1].get(keys)
        pids = {"controller": controller.pid} | {
            engine.node.ready.instance_id: engine.node.pid
            for engine in engines
            if engine.node.ready and engine.node.pid
        }
        time.sleep(2.0)  # let what the fetch has stirred up settle
        quietest = _window(pids, seconds)
        for _ in range(windows - 1):
            if _total_percent(quietest) < enough_percent:
                break
            quietest = min(quietest, _window(pids, seconds), key=_total_percent)
        return quietest


def _window(pids: Mapping[str, int], seconds: float) -> list[IdleRow]:
    before = {name: _cpu_s(pid) for name, pid in pids.items()}
    started_s = time.monotonic()
    time.sleep(seconds)
    passed_s = time.monotonic() - started_s
    return [IdleRow(name, 100 * (_cpu_s(pid) - before[name]) / passed_s, _memory_mb(pid)) for name, pid in pids.items()]


def _total_percent(rows: Sequence[IdleRow]) -> float:
    return sum(row.cpu_percent for row in rows)


def _family(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def _cpu_s(pid: int) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in _family(pid))


def _memory_mb(pid: int) -> float:
    """Memory of the process alone, without the shared pool."""
    return float(sum(process.memory_full_info().uss for process in _family(pid)) / 1e6)
