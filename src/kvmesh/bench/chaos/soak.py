"""Random faults under load for minutes: at the end everything works, and nothing has grown.

The first third kills whatever there is. Then the controller, both engines and the reader's node are left alive, so that
they live through hundreds of faults of others; what they have at the start of the second third is compared with what
they have at the end.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
from rich.table import Table

from kvmesh.bench.chaos.cells import CELLS, TRANSPORTS, Cell
from kvmesh.bench.chaos.matrix import Availability, Pace, Result, run_cell
from kvmesh.bench.chaos.report import progress, show_progress
from kvmesh.bench.chaos.stage import Stage
from kvmesh.bench.output import result_console
from kvmesh.errors import KVMeshError

PACE = Pace(before=5, during_s=2.0, during=4, after=5)
DESTRUCTIVE = frozenset({"controller-killed", "own-node-killed", "own-node-stopped", "peer-restarted", "engine-killed",
                         "address-reused", "clocks-apart"})  # fmt: skip
"""Cells that end a process that is measured."""
GROWTH_FRACTION, GROWTH_MB = 0.25, 16.0
"""Memory may be so much more at the end: allocators keep what a burst has needed."""
GROWTH_HANDLES = 8
"""Descriptors and threads: connections and threads that one fetch more has open at that moment."""
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - only its names are listed
SETTLE_S = 3.0


@dataclass(frozen=True)
class Sample:
    """One process at one time, with what it has started."""

    process: str
    pid: int
    memory_mb: float
    """What it has for itself (USS)."""
    descriptors: int
    threads: int
    children: int


@dataclass
class SoakResult:
    """What a soak gave."""

    transport: str
    minutes: float
    seed: int
    faults: int = 0
    sent: int = 0
    answered: int = 0
    wrong: int = 0
    worst_delay_s: float = 0.0
    worst_recovery_s: float = 0.0
    start: list[Sample] = field(default_factory=list)
    end: list[Sample] = field(default_factory=list)
    shared_memory_left: list[str] = field(default_factory=list)
    """Names in /dev/shm that were not there before."""
    failures: list[str] = field(default_factory=list)


def run_soak(*, minutes: float, as_json: bool, seed: int, logs: Path | None = None) -> int:
    """Soak each transport for its share of the time and print what was measured; 1 when anything failed or grew."""
    results = []
    available = Availability()
    transports = [name for name in TRANSPORTS if available.reason(name, CELLS[0]) is None]
    with ExitStack() as stack:
        folder = logs or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvmesh-soak-")))
        for transport in transports:
            result = SoakResult(transport, minutes / len(transports), seed)
            before = _shared_memory()
            try:
                _soak(result, folder / transport, available)
            except (KVMeshError, OSError) as error:
                result.failures.append(str(error))
            result.shared_memory_left = sorted(_shared_memory() - before)
            if result.shared_memory_left:
                result.failures.append(f"left in {SHARED_MEMORY}: {', '.join(result.shared_memory_left[:5])}")
            results.append(result)
    if as_json:
        print(json.dumps([asdict(result) for result in results], indent=2))
    else:
        for result in results:
            _show(result)
    return int(any(result.failures for result in results))


def _soak(result: SoakResult, folder: Path, available: Availability) -> None:
    stage = Stage("local", result.transport, folder, result.seed)
    stage.open()
    try:
        chance = random.Random(f"{result.seed} {result.transport}")
        cells = [
            cell
            for cell in CELLS
            if cell.kind == "local"
            and result.transport in cell.transports
            and available.reason(result.transport, cell) is None
        ]
        total_s = result.minutes * 60
        _torment(stage, result, chance, cells, total_s / 3)
        result.start = list(_samples(stage))
        gentle = [cell for cell in cells if cell.name not in DESTRUCTIVE]
        _torment(stage, result, chance, gentle, total_s * 2 / 3)
        result.end = list(_samples(stage))
        result.failures += list(_growth(result.start, result.end))
    finally:
        stage.close()


def _torment(stage: Stage, result: SoakResult, chance: random.Random, cells: list[Cell], seconds: float) -> None:
    until_s = time.monotonic() + seconds
    while time.monotonic() < until_s:
        cell = chance.choice(cells)
        one = Result(result.transport, cell.name, cell.meaning)
        started_s = time.monotonic()
        run_cell(cell, stage, PACE, one)
        one.seconds = time.monotonic() - started_s
        result.faults += 1
        result.sent += one.sent
        result.answered += one.answered
        result.wrong += one.wrong
        result.worst_delay_s = max(result.worst_delay_s, one.worst_delay_s)
        result.worst_recovery_s = max(result.worst_recovery_s, one.recovery_s or 0.0)
        result.failures += [f"{cell.name}: {failure}" for failure in one.failures]
        show_progress(result.faults, 0, one)


def _samples(stage: Stage) -> Iterator[Sample]:
    """After a while without requests, so that what ends with the last ones has ended."""
    time.sleep(SETTLE_S)
    roles = {"controller": stage.controller.pid}
    for actor in (stage.reader, stage.holder):
        status = actor.status()
        roles[f"{actor.name}'s engine"] = status.pid
        for index, pid in enumerate(status.node_pids):
            roles[f"{actor.name}'s node" if index == 0 else f"{actor.name}'s NIXL process {index}"] = pid
    for role, pid in roles.items():
        process = psutil.Process(pid)
        with process.oneshot():
            yield Sample(
                role,
                pid,
                process.memory_full_info().uss / 1e6,
                process.num_fds(),
                process.num_threads(),
                len(process.children()),
            )


def _growth(start: list[Sample], end: list[Sample]) -> Iterator[str]:
    before = {sample.process: sample for sample in start}
    for now in end:
        then = before.get(now.process)
        if then is None:
            yield f"{now.process} is new"
            continue
        if now.memory_mb > then.memory_mb * (1 + GROWTH_FRACTION) + GROWTH_MB:
            yield f"{now.process}: memory from {then.memory_mb:.0f} to {now.memory_mb:.0f} MB"
        for what, first, last in (
            ("descriptors", then.descriptors, now.descriptors),
            ("threads", then.threads, now.threads),
            ("children", then.children, now.children),
        ):
            if last > first + GROWTH_HANDLES:
                yield f"{now.process}: {what} from {first} to {last}"


def _show(result: SoakResult) -> None:
    title = f"{result.minutes:g} minutes of random faults, {result.transport}"
    table = Table(title=title, title_justify="left")
    table.add_column("process")
    for heading in ("memory, MB", "descriptors", "threads"):
        table.add_column(heading, justify="right")
    ends = {sample.process: sample for sample in result.end}
    for then in result.start:
        now = ends.get(then.process)
        if now is None:
            continue
        same = "" if now.pid == then.pid else " (another life)"
        table.add_row(
            then.process + same,
            f"{then.memory_mb:.1f} -> {now.memory_mb:.1f}",
            f"{then.descriptors} -> {now.descriptors}",
            f"{then.threads} -> {now.threads}",
        )
    out = result_console()
    out.print(table)
    out.print(
        f"{result.faults} faults; {result.sent} requests sent, {result.answered} answered, "
        f"{result.wrong} wrong chunks; at most {result.worst_delay_s:.1f} s beyond a deadline, "
        f"healed after at most {result.worst_recovery_s:.1f} s",
        highlight=False,
    )
    for failure in result.failures:
        out.print(f"[red]FAILED[/] {failure}")
    progress.print(f"seed {result.seed}")


def _shared_memory() -> set[str]:
    """Names that are ours or of libraries we use; other programs' come and go."""
    if not SHARED_MEMORY.is_dir():
        return set()
    return {entry.name for entry in SHARED_MEMORY.iterdir() if entry.name.startswith(("kvmesh", "ucx", "nixl"))}
