"""Runs the cells: requests before, during and after each fault, and a verdict."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kvmesh.bench.chaos import network
from kvmesh.bench.chaos.cells import CELLS, TRANSPORTS, Cell, Transport
from kvmesh.bench.chaos.stage import FETCH_TIMEOUT_S, Kind, Stage
from kvmesh.bench.chaos.traffic import reasons, share
from kvmesh.errors import KVMeshError
from kvmesh.node.fetch_jobs import GRACE_S
from kvmesh.node.handle import WAKE_S
from kvmesh.transfer import nixl_agent

ALLOWED_DELAY_S = GRACE_S + WAKE_S + 2.0
"""Beyond its deadline a request may be out for the grace after which the engine kills its node, the time in which it
looks, and what a busy machine takes to kill and to reap a process.
"""
HEALTHY_S = 60.0
RECOVERY_S = 60.0
SERVING_SHARE = 0.8
"""Of the chunks asked for, in cells where requests go on hitting."""


@dataclass(frozen=True)
class Pace:
    """How much is asked in a cell."""

    before: int
    """Requests."""
    during_s: float
    """How long a fault lasts that does not end by itself."""
    during: int
    """Requests that must have been answered meanwhile, at least."""
    after: int
    """Requests, once everything has healed."""


FULL = Pace(20, 3.0, 8, 20)
QUICK = Pace(10, 1.5, 4, 10)


@dataclass
class Result:
    """What one cell gave. `failures` is empty when all was well; `not_run` says why it was left out."""

    transport: str
    cell: str
    meaning: str
    not_run: str = ""
    sent: int = 0
    answered: int = 0
    wrong: int = 0
    """Chunks whose bytes were not the key's."""
    share_before: float | None = None
    """Of the chunks asked for, how many came; None without requests."""
    share_during: float | None = None
    """From the fault's start until everything had healed."""
    share_after: float | None = None
    worst_delay_s: float = 0.0
    """Beyond the deadline; 0 when every answer came before it."""
    recovery_s: float | None = None
    """From the end of the fault until every document had been fetched whole."""
    seconds: float = 0.0
    misses: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)


class Stages:
    """Opens stages as cells need them, and keeps one open for the next cell of the same kind."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder = folder
        self._seed = seed
        self._stage: Stage | None = None
        self._opened = 0

    def get(self, kind: Kind, transport: str) -> Stage:
        """An open stage. Raises StartupError."""
        stage = self._stage
        if stage is not None and (stage.kind, stage.transport) == (kind, transport):
            return stage
        self.close()
        self._opened += 1
        stage = Stage(kind, transport, self._folder / f"{self._opened:02}-{kind}-{transport}", self._seed)
        stage.open()
        self._stage = stage
        return stage

    def close(self) -> None:
        """End the stage; the next cell gets a new one."""
        if self._stage is not None:
            stage, self._stage = self._stage, None
            stage.close()


def choose(only: Sequence[str], *, quick: bool, channels: Sequence[str] = TRANSPORTS) -> list[tuple[Transport, Cell]]:
    """Cells to run, in an order that opens few stages. `only` are names of cells, with or without `transport/`."""
    chosen = [
        (transport, cell)
        for transport in TRANSPORTS
        if transport in channels
        for cell in CELLS
        if transport in cell.transports and (transport in cell.quick or not quick or only)
    ]
    if only:
        wanted = set(only)
        chosen = [(transport, cell) for transport, cell in chosen if {cell.name, f"{transport}/{cell.name}"} & wanted]
    return sorted(chosen, key=lambda entry: (TRANSPORTS.index(entry[0]), _KINDS.index(entry[1].kind)))


_KINDS: tuple[Kind, ...] = ("local", "proxied", "secured", "lossy", "small_disks", "network")


class Availability:
    """Why kinds of stages and transports cannot be had here; looked up once each."""

    def __init__(self) -> None:
        self._known: dict[str, str | None] = {}

    def reason(self, transport: str, cell: Cell) -> str | None:
        checks: dict[str, Callable[[], str | None]] = {cell.kind: _KIND_NEEDS.get(cell.kind, lambda: None)}
        if transport == "nixl":
            checks["nixl"] = nixl_agent.unavailable
        for name, check in checks.items():
            if name not in self._known:
                self._known[name] = check()
            if self._known[name] is not None:
                return self._known[name]
        return cell.needs()


def _needs_mounts() -> str | None:
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        return "mount namespaces need root and util-linux"
    return None


_KIND_NEEDS: dict[str, Callable[[], str | None]] = {"network": network.unavailable, "small_disks": _needs_mounts}


def run_matrix(chosen: Sequence[tuple[Transport, Cell]], folder: Path, *, pace: Pace, seed: int) -> Iterator[Result]:
    """Run cells one after the other and yield each one's result."""
    stages = Stages(folder, seed)
    available = Availability()
    with contextlib.closing(stages):
        for transport, cell in chosen:
            missing = available.reason(transport, cell)
            if missing is not None:
                yield Result(transport, cell.name, cell.meaning, not_run=missing)
                continue
            result = Result(transport, cell.name, cell.meaning)
            started_s = time.monotonic()
            try:
                run_cell(cell, stages.get(cell.kind, transport), pace, result)
            except (KVMeshError, OSError) as error:
                result.failures.append(str(error))
            result.seconds = time.monotonic() - started_s
            if result.failures:
                stages.close()  # the next cell is to fail for its own faults only
            yield result


def run_cell(cell: Cell, stage: Stage, pace: Pace, result: Result) -> None:
    """Do one fault to a stage while requests run, and judge it. Raises KVMeshError when the harness itself fails."""
    traffic = stage.traffic
    begin_s = time.monotonic()
    stage.load()
    try:
        if traffic.wait_whole(begin_s, HEALTHY_S) is None:
            result.failures.append("not healthy before the fault")
            return
        before_s = time.monotonic()
        traffic.wait_answers(pace.before, before_s, HEALTHY_S)
        fault_s = time.monotonic()
        with cell.fault(stage):
            if cell.lasts:
                time.sleep(pace.during_s)
                traffic.wait_answers(pace.during, fault_s, HEALTHY_S)
        end_s = time.monotonic()
        healed_s = traffic.wait_whole(end_s, RECOVERY_S)
        result.recovery_s = None if healed_s is None else healed_s - end_s
        after_s = time.monotonic()
        traffic.wait_answers(pace.after, after_s, HEALTHY_S)
        stage.idle()
        traffic.wait_all_answered(FETCH_TIMEOUT_S + ALLOWED_DELAY_S)
        _judge(cell, stage, result, (before_s, fault_s, end_s, after_s))
    finally:
        stage.calm()


def _judge(cell: Cell, stage: Stage, result: Result, times: tuple[float, float, float, float]) -> None:
    before_s, fault_s, end_s, after_s = times
    answers = stage.traffic.answers()
    result.sent, result.answered = stage.traffic.sent, len(answers)
    result.wrong = sum(one.wrong for one in answers)
    result.share_before = share(answers, before_s, fault_s).fraction
    # Requests that are out when the fault comes are hit by it: they count as "during".
    result.share_during = share(answers, fault_s - 0.05, after_s).fraction
    result.share_after = share(answers, after_s, float("inf")).fraction
    result.worst_delay_s = max([0.0, *(one.seconds - FETCH_TIMEOUT_S for one in answers)])
    result.misses = reasons([one for one in answers if one.sent_at_s >= before_s])
    failures = result.failures
    if result.wrong:
        failures.append(f"{result.wrong} wrong chunks")
    if result.answered < result.sent:
        failures.append(f"{result.sent - result.answered} requests without an answer")
    if result.worst_delay_s > ALLOWED_DELAY_S:
        failures.append(f"an answer came {result.worst_delay_s:.1f} s after its deadline")
    if result.recovery_s is None:
        failures.append(f"not healed within {RECOVERY_S:.0f} s")
    serving = share(answers, fault_s, end_s).fraction
    if cell.serves and (serving is None or serving < SERVING_SHARE):
        failures.append(f"only {serving or 0.0:.0%} of the chunks came while known chunks should have been fetched")
    failures += stage.problems
