"""`kvmesh bench controller`: what a controller costs, and how quick it is, with a swarm of instances around it.

A real controller process; the instances are simulated (`kvmesh.bench.swarm`), their connections are real. Measured in
order: everybody joins, everybody is quiet, everybody publishes and retracts at the given rate while the HTTP API and
the web page are asked again and again.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import httpx
import psutil
from rich.console import Console
from rich.table import Table

from kvmesh.bench.browser import BrowserError, PageTimes, find_chromium, measure_page
from kvmesh.bench.cluster import Controller, wait_healthy
from kvmesh.bench.output import result_console
from kvmesh.bench.swarm import Swarm, SwarmPlan, SwarmStatistics, percentile
from kvmesh.bench.swarm_controller import ControllerLink, ControllerUrls
from kvmesh.errors import StartupError

JOIN_TIMEOUT_S = 600.0
QUIET_S = 5.0
SETTLE_S = 2.0
CALLS = (
    "/healthz",
    "/api/v1/totals",
    "/api/v1/instances/swarm-0000",
    "/api/v1/lookup?keys={key}",
    "/api/v1/instances",
    "/metrics",
    "/",
    "/instances",
)
"""What the API's latency is measured with: small answers, large answers, pages."""


@dataclass(frozen=True)
class ControllerPlan:
    """What is measured."""

    swarm: SwarmPlan
    events_per_s: float
    seconds: float
    pages: int = 1
    """Browsers' pages that are open meanwhile, where there is a browser."""


@dataclass(frozen=True)
class Latency:
    """Of one kind of call, in seconds."""

    name: str
    calls: int
    p50_s: float
    p99_s: float
    answer_bytes: int


@dataclass
class ControllerResult:
    """All numbers. CPU is in percent of one core."""

    machine: str
    load_before: float
    """The machine's load average before: above a half, others were at work."""
    instances: int
    chunks: int
    formats: int
    join_s: float = 0.0
    """Until everybody is a member, knows the others and is known with its inventory."""
    empty_mb: float = 0.0
    full_mb: float = 0.0
    after_mb: float = 0.0
    bytes_per_entry: float = 0.0
    quiet_cpu_percent: float = 0.0
    events_wanted_per_s: float = 0.0
    events_per_s: float = 0.0
    late_events: int = 0
    busy_cpu_percent: float = 0.0
    swarm_cpu_percent: float = 0.0
    frames_per_s: float = 0.0
    """That the controller has sent."""
    sent_mb_per_s: float = 0.0
    visible_p50_s: float = 0.0
    """From an instance's event to another one's hearing of it."""
    visible_p99_s: float = 0.0
    delays: int = 0
    gaps: int = 0
    resyncs: int = 0
    dropped_members: int = 0
    calls: list[Latency] = field(default_factory=list)
    page: PageTimes | None = None


def run_controller_benchmark(plan: ControllerPlan, *, as_json: bool) -> int:
    """Measure and print; 1 when a member was lost or nothing was heard."""
    console = Console(stderr=True, quiet=as_json)
    result = measure(plan, console)
    if as_json:
        print(json.dumps(asdict(result), indent=2))
    else:
        show(result, result_console())
    return 0 if result.delays and not result.dropped_members else 1


def measure(plan: ControllerPlan, console: Console) -> ControllerResult:
    """Start everything, measure, end everything."""
    wanted = plan.swarm
    result = ControllerResult(_machine(), os.getloadavg()[0], wanted.instances, wanted.chunks, wanted.formats)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvmesh-bench-")))
        controller = Controller(folder)
        stack.callback(controller.stop)
        controller.start()
        wait_healthy(controller, timeout_s=60)
        http = stack.enter_context(httpx.Client(base_url=controller.url, timeout=60, trust_env=False))
        http.get("/")  # so that what the first page loads is part of the empty controller
        process = psutil.Process(controller.pid)
        result.empty_mb = _memory_mb(process)
        urls = ControllerUrls(f"tcp://127.0.0.1:{controller.pull_port}", f"tcp://127.0.0.1:{controller.reply_port}")
        swarm = stack.enter_context(contextlib.closing(Swarm(wanted, functools.partial(ControllerLink, urls))))
        swarm.start()
        console.print(f"{wanted.instances} instances join, each with {wanted.chunks} chunks ...")
        result.join_s = _join(swarm, http)
        result.full_mb = _memory_mb(process)
        entries = wanted.instances * wanted.chunks
        result.bytes_per_entry = (result.full_mb - result.empty_mb) * 1e6 / entries if entries else 0.0
        console.print(f"joined after {result.join_s:.1f} s; quiet for {QUIET_S:g} s ...")
        time.sleep(SETTLE_S)
        result.quiet_cpu_percent = _cpu_percent(process, QUIET_S)
        console.print(f"{plan.events_per_s:g} events/s for {plan.seconds:g} s ...")
        _measure_busy(plan, swarm, http, process, result, console)
        result.after_mb = _memory_mb(process)
        result.dropped_members = wanted.instances - int(http.get("/api/v1/totals").json()["instances"])
    return result


def _join(swarm: Swarm, http: httpx.Client) -> float:
    started_s = time.monotonic()
    swarm.join(JOIN_TIMEOUT_S)
    entries = swarm.plan.instances * swarm.plan.chunks
    while True:
        totals = http.get("/api/v1/totals").json()
        owed = _metric(http, "kvmesh_controller_snapshots_owed")
        if totals["entries"] >= entries and not owed:
            return time.monotonic() - started_s
        if time.monotonic() - started_s > JOIN_TIMEOUT_S:
            found = f"{totals['entries']} are, and {owed:.0f} inventories are still on their way"
            raise StartupError("the swarm", f"{entries} chunks to be known within {JOIN_TIMEOUT_S:g} s", found)
        time.sleep(0.2)


def _measure_busy(
    plan: ControllerPlan,
    swarm: Swarm,
    http: httpx.Client,
    process: psutil.Process,
    result: ControllerResult,
    console: Console,
) -> None:
    swarm.publish(plan.events_per_s)
    time.sleep(SETTLE_S)
    swarm.forget_delays()
    before, frames_before = swarm.statistics(), _sent(http)
    started_s, cpu_before = time.monotonic(), _cpu_s(process)
    swarm_cpu_before = sum(_cpu_s(psutil.Process(pid)) for pid in swarm.pids)
    while time.monotonic() - started_s < plan.seconds:  # nobody asks: the CPU time is that of the events alone
        time.sleep(0.1)
    passed_s = time.monotonic() - started_s
    after, frames_after = swarm.statistics(), _sent(http)
    result.busy_cpu_percent = 100 * (_cpu_s(process) - cpu_before) / passed_s
    swarm_cpu_s = sum(_cpu_s(psutil.Process(pid)) for pid in swarm.pids) - swarm_cpu_before
    result.swarm_cpu_percent = 100 * swarm_cpu_s / passed_s
    result.frames_per_s = (frames_after[0] - frames_before[0]) / passed_s
    result.sent_mb_per_s = (frames_after[1] - frames_before[1]) / passed_s / 1e6
    _take_events(result, plan, before, after, passed_s)
    result.calls = _measure_calls(http, min(plan.seconds, 10.0))
    chromium = find_chromium() if plan.pages else None
    if chromium is not None:
        try:
            result.page = measure_page(str(http.base_url), chromium, pages=plan.pages)
        except BrowserError as error:
            console.print(f"the page could not be measured: {error}")
    swarm.publish(0.0)


def _take_events(
    result: ControllerResult, plan: ControllerPlan, before: SwarmStatistics, after: SwarmStatistics, passed_s: float
) -> None:
    result.events_wanted_per_s = plan.events_per_s
    result.events_per_s = (after.events_sent - before.events_sent) / passed_s
    result.late_events = after.late_events - before.late_events
    result.delays = len(after.delays_s)
    result.visible_p50_s = percentile(after.delays_s, 0.50)
    result.visible_p99_s = percentile(after.delays_s, 0.99)
    result.gaps, result.resyncs = after.gaps - before.gaps, after.resyncs - before.resyncs


def _measure_calls(http: httpx.Client, seconds: float) -> list[Latency]:
    """Each call in turn, one at a time, on a connection that stays open."""
    times: dict[str, list[float]] = {call: [] for call in CALLS}
    sizes: dict[str, int] = {}
    until_s = time.monotonic() + seconds
    pause = threading.Event()
    while time.monotonic() < until_s:
        for call in CALLS:
            started_s = time.monotonic()
            answer = http.get(call.format(key="00" * 36)).raise_for_status()
            times[call].append(time.monotonic() - started_s)
            sizes[call] = len(answer.content)
            pause.wait(0.02)
    return [
        Latency(call, len(taken), percentile(taken, 0.5), percentile(taken, 0.99), sizes[call])
        for call, taken in times.items()
    ]


def _sent(http: httpx.Client) -> tuple[float, float]:
    text = http.get("/metrics").text
    return _value(text, "kvmesh_controller_sent_frames_total"), _value(text, "kvmesh_controller_sent_bytes_total")


def _metric(http: httpx.Client, name: str) -> float:
    return _value(http.get("/metrics").text, name)


def _value(text: str, name: str) -> float:
    return next(float(line.split()[1]) for line in text.splitlines() if line.startswith(f"{name} "))


def _cpu_percent(process: psutil.Process, seconds: float) -> float:
    before, started_s = _cpu_s(process), time.monotonic()
    time.sleep(seconds)
    return 100 * (_cpu_s(process) - before) / (time.monotonic() - started_s)


def _cpu_s(process: psutil.Process) -> float:
    return float(sum(process.cpu_times()[:2]))


def _memory_mb(process: psutil.Process) -> float:
    return float(process.memory_full_info().uss / 1e6)


def _machine() -> str:
    memory = psutil.virtual_memory().total / 1e9
    return f"{os.cpu_count()} cores, {memory:.0f} GB, {platform.system()} {platform.release()}"


def show(result: ControllerResult, console: Console) -> None:
    """As tables."""
    title = f"{result.instances} instances, {result.chunks} chunks each, {result.formats} formats; {result.machine}"
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column("what")
    table.add_column("value", justify="right")
    rows = [
        ("load average before", f"{result.load_before:.2f}"),
        ("all joined, all inventories delivered", f"{result.join_s:.1f} s"),
        ("memory: empty, full, afterwards", _triple(result.empty_mb, result.full_mb, result.after_mb)),
        ("memory per chunk and holder", f"{result.bytes_per_entry:.0f} bytes"),
        ("CPU, quiet (heartbeats)", f"{result.quiet_cpu_percent:.1f} %"),
        ("events sent per second", f"{result.events_per_s:.0f} of {result.events_wanted_per_s:.0f}"),
        ("CPU, with events", f"{result.busy_cpu_percent:.1f} %"),
        ("CPU of the swarm itself", f"{result.swarm_cpu_percent:.1f} %"),
        ("frames sent per second", f"{result.frames_per_s:.0f}"),
        ("bytes sent per second", f"{result.sent_mb_per_s:.1f} MB"),
        ("event to visible, p50", f"{result.visible_p50_s * 1000:.1f} ms"),
        ("event to visible, p99", f"{result.visible_p99_s * 1000:.1f} ms"),
        ("gaps heard, snapshots asked for", f"{result.gaps}, {result.resyncs}"),
        ("members lost", str(result.dropped_members)),
    ]
    if result.page is not None:
        rows += [
            ("page: shown, full", f"{result.page.shown_s:.2f} s, {result.page.complete_s:.2f} s"),
            ("page: between two updates", f"{result.page.update_s:.2f} s"),
            ("page: answer to sorting 1 table", f"{result.page.sort_s * 1000:.0f} ms"),
        ]
    for row in rows:
        table.add_row(*row)
    console.print(table)
    calls = Table(title="Calls during the events", title_justify="left")
    for heading in ("call", "p50", "p99", "answer"):
        calls.add_column(heading, justify="left" if heading == "call" else "right")
    for call in result.calls:
        calls.add_row(
            call.name,
            f"{call.p50_s * 1000:.1f} ms",
            f"{call.p99_s * 1000:.1f} ms",
            f"{call.answer_bytes / 1000:.1f} kB",
        )
    console.print(calls)


def _triple(*values: float) -> str:
    return ", ".join(f"{value:.0f} MB" for value in values)
