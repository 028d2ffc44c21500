"""`kvmesh bench directory`: what a directory costs, and how quick it is, as the number of instances grows.

Real servers (a controller, a Redis), a swarm of simulated instances that publish (`kvmesh.bench.swarm`), and one real
client with its replica, or asking, in a process of its own (`kvmesh.bench.directory_witness`). Everything is on this
machine, so that the swarm takes part of the CPU that the directory would have alone.

With the controller each simulated instance hears of all others of its format, with Redis none does: what one follower
costs Redis is measured at the witness, and the estimate multiplies it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import redis
from rich import box
from rich.console import Console
from rich.table import Table

from kvmesh.bench.cluster import Controller, free_ports, metric, metrics, wait_healthy
from kvmesh.bench.directory_witness import KEYS_PER_QUESTION, QUESTIONS_AT_ONCE, Witness
from kvmesh.bench.swarm import KEY, MakeLink, Swarm, SwarmPlan, make_format, make_instance, percentile
from kvmesh.bench.swarm_controller import ControllerLink, ControllerUrls
from kvmesh.bench.swarm_redis import RedisPlace, SwarmRedisLink
from kvmesh.config import KVMeshConfig
from kvmesh.errors import StartupError
from kvmesh.wire.redis_layout import Layout

CLUSTER = "bench"
WAIT_S = 600.0
JOINS_PER_S = 200.0
INDEXED_JOINS_PER_S = 40.0
"""While somebody asks, a publisher that joins writes an index entry per chunk."""
PROBES = 50
"""Chunks whose way to somebody who asks is timed."""


@dataclass(frozen=True)
class DirectoryPlan:
    """What is measured."""

    sizes: tuple[int, ...]
    chunks: int
    formats: int
    events_per_s: float
    """At the largest size; fewer in proportion at smaller ones."""
    seconds: float
    kinds: tuple[str, ...] = ("controller", "redis")
    modes: tuple[str, ...] = ("replica", "query")


@dataclass
class Cell:
    """One directory, one mode, one size."""

    directory: str
    mode: str
    instances: int
    entries: int
    events_per_s: float
    events_sent: int
    late_events: int
    join_s: float
    """Until all are members and all inventories are there."""
    visible_p50_ms: float | None
    visible_p99_ms: float | None
    directory_rss_mb: float
    directory_cpu_percent: float
    node_rss_mb: float
    node_entries: int
    node_cpu_percent: float
    questions_per_s: float | None
    """With QUESTIONS_AT_ONCE under way; the times are those of one after the other."""
    question_p50_ms: float | None
    question_p99_ms: float | None
    resync_s: float | None
    """From the restart of an empty directory until it knows everything again."""
    resync_told_s: float | None
    """Until it has also sent everything to everybody who follows (controller; with Redis, nobody reads it again)."""
    resync_sent_mb: float | None
    """What it has sent for that."""


class _RedisServer:
    """A redis-server or valkey-server of its own."""

    def __init__(self, folder: Path) -> None:
        found = shutil.which("redis-server") or shutil.which("valkey-server")
        if found is None:
            raise StartupError(
                "bench directory", "redis-server or valkey-server", "neither", "apt-get install redis-server"
            )
        self._command = found
        self._folder = folder
        self.port = free_ports(1)[0]
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def start(self) -> None:
        options = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        with (self._folder / "redis.log").open("ab") as log:
            self.process = subprocess.Popen(
                [self._command, *options, "--dir", str(self._folder)], stdout=log, stderr=log
            )
        client: Any = redis.Redis(port=self.port)
        until_s = time.monotonic() + 20
        while time.monotonic() < until_s:
            with contextlib.suppress(redis.RedisError):
                client.ping()
                return
            time.sleep(0.05)
        raise StartupError("redis-server", "an answer within 20 s", "none")

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()


def run_directory_benchmark(plan: DirectoryPlan, *, as_json: bool, plot: Path | None) -> int:
    """Measure everything and print it. Returns the exit status."""
    console = Console(stderr=as_json)
    console.width = max(console.width, 240)  # the table says little in narrow columns
    cells: list[Cell] = []
    failed = 0
    for kind in plan.kinds:
        for mode in plan.modes:
            for size in plan.sizes:
                console.print(f"{kind}, {mode}, {size} instances ...", style="dim")
                try:
                    cells.append(_measure(plan, kind, mode, size))
                except StartupError as error:  # what was measured before is worth having
                    failed += 1
                    console.print(f"{kind}, {mode}, {size} instances: {error}", style="red")
                else:
                    found = ", ".join(f"{name} {text}" for name, text in _columns(cells[-1]))
                    console.print(found, style="dim")
    machine = f"{os.cpu_count()} x {platform.processor() or platform.machine()}, Python {platform.python_version()}"
    if plot is not None and cells:
        from kvmesh.bench.directory_plot import draw  # noqa: PLC0415 - not installed everywhere

        draw(cells, plot, machine)
    if as_json:
        print(
            json.dumps({"machine": machine, "plan": asdict(plan), "cells": [asdict(cell) for cell in cells]}, indent=2)
        )
    elif cells:
        _show(console, cells, machine)
    return 1 if failed else 0


def _measure(plan: DirectoryPlan, kind: str, mode: str, size: int) -> Cell:
    share = size / max(plan.sizes)
    swarm_plan = SwarmPlan(
        instances=size,
        chunks=plan.chunks,
        formats=min(plan.formats, size),
        joins_per_s=INDEXED_JOINS_PER_S if (kind, mode) == ("redis", "query") else JOINS_PER_S,
    )
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        server, config, make_link = _directory(stack, Path(name), kind, mode)
        witness = stack.enter_context(contextlib.closing(Witness(config, swarm_plan)))
        swarm = stack.enter_context(contextlib.closing(Swarm(swarm_plan, make_link)))
        swarm.start()
        started_s = time.monotonic()
        swarm.join(WAIT_S)
        followed = len(range(0, size, swarm_plan.formats))
        expected = followed * plan.chunks
        if mode == "replica":
            _wait(lambda: witness.report().entries >= expected)
        _wait(lambda: _entries(server, swarm_plan) >= size * plan.chunks)
        join_s = time.monotonic() - started_s
        events_per_s = plan.events_per_s * share
        process = psutil.Process(server.pid)
        swarm.publish(events_per_s)
        time.sleep(min(2.0, plan.seconds / 2))
        witness.report()
        before, begun_s, spent_s = swarm.statistics(), time.monotonic(), _cpu_s(process)
        time.sleep(plan.seconds)
        node = witness.report()
        elapsed_s = time.monotonic() - begun_s
        cpu_percent = 100 * (_cpu_s(process) - spent_s) / elapsed_s
        after = swarm.statistics()
        asked = asked_at_once = None
        delays_s = node.delays_s
        if mode == "query":
            keys = list(make_instance(swarm_plan, 0).inventory)
            asked = witness.question(keys, plan.seconds / 2)
            asked_at_once = witness.question(keys, plan.seconds / 2, at_once=QUESTIONS_AT_ONCE)
            delays_s = _find_news(swarm_plan, make_link, witness)
        rss_mb = process.memory_info().rss / 1e6
        swarm.publish(0)
        resync_s = resync_told_s = resync_sent_mb = None
        if mode == "replica":
            server.stop()
            begun_s = time.monotonic()
            server.start()
            _wait(lambda: _entries(server, swarm_plan) >= size * plan.chunks)
            resync_s = time.monotonic() - begun_s
            if isinstance(server, Controller):
                found = _wait_told(server, size)
                resync_told_s = time.monotonic() - begun_s
                resync_sent_mb = found["kvmesh_controller_sent_bytes_total"] / 1e6
        return Cell(
            directory=kind,
            mode=mode,
            instances=size,
            entries=size * plan.chunks,
            events_per_s=events_per_s,
            events_sent=after.events_sent - before.events_sent,
            late_events=after.late_events - before.late_events,
            join_s=join_s,
            visible_p50_ms=_ms(delays_s, 0.5),
            visible_p99_ms=_ms(delays_s, 0.99),
            directory_rss_mb=rss_mb,
            directory_cpu_percent=cpu_percent,
            node_rss_mb=node.rss_bytes / 1e6,
            node_entries=node.entries,
            node_cpu_percent=100 * node.cpu_s / elapsed_s,
            questions_per_s=None if asked_at_once is None else asked_at_once.questions / (plan.seconds / 2),
            question_p50_ms=None if asked is None else _ms(asked.question_seconds, 0.5),
            question_p99_ms=None if asked is None else _ms(asked.question_seconds, 0.99),
            resync_s=resync_s,
            resync_told_s=resync_told_s,
            resync_sent_mb=resync_sent_mb,
        )


def _find_news(plan: SwarmPlan, make_link: MakeLink, witness: Witness) -> list[float]:
    """How long it takes from publishing a chunk until who asks for it is told a holder, in seconds."""
    instance = make_instance(replace(plan, chunks=1), plan.instances * plan.formats)  # of the witness's format
    with contextlib.closing(make_link(replace(plan, instances=1))) as link:
        link.join(instance)
        until_s = time.monotonic() + WAIT_S
        while not link.statistics.joined and time.monotonic() < until_s:
            link.poll(0.02)
        delays_s: list[float] = []
        for number in range(PROBES + 1):
            link.beat(instance)
            link.poll(0.02)
            key = KEY.pack(time.monotonic_ns(), number, instance.number, 0, 0, 0)
            instance.inventory.append(key)
            instance.sequence += 1
            link.publish(instance, key, instance.inventory.popleft())
            link.poll(0.0)
            delays_s += witness.find(key).delays_s[-1:]
        return delays_s[1:]  # the first includes joining


def _directory(
    stack: contextlib.ExitStack, folder: Path, kind: str, mode: str
) -> tuple[Controller | _RedisServer, KVMeshConfig, MakeLink]:
    if kind == "redis":
        server = _RedisServer(folder)
        server.start()
        stack.callback(server.stop)
        config = KVMeshConfig.model_validate(
            {"instance_id": "witness", "lookup_url": server.url, "cluster_name": CLUSTER, "index_mode": mode}
        )
        place = RedisPlace(server.url, CLUSTER, with_index=mode == "query")
        return server, config, functools.partial(SwarmRedisLink, place)
    controller = Controller(folder)
    controller.start()
    stack.callback(controller.stop)
    wait_healthy(controller, timeout_s=60)
    pull, reply = f"tcp://127.0.0.1:{controller.pull_port}", f"tcp://127.0.0.1:{controller.reply_port}"
    config = KVMeshConfig.model_validate(
        {
            "instance_id": "witness",
            "enable_controller": True,
            "controller_pull_url": pull,
            "controller_reply_url": reply,
            "index_mode": mode,
        }
    )
    return controller, config, functools.partial(ControllerLink, ControllerUrls(pull, reply, asks=mode == "query"))


def _entries(server: Controller | _RedisServer, plan: SwarmPlan) -> int:
    """Pairs of chunk and holder that the directory knows; 0 while it does not answer."""
    if isinstance(server, Controller):
        try:
            return int(metric(server.url, "kvmesh_controller_entries"))
        except Exception:  # it is starting
            return 0
    client: Any = redis.Redis(port=server.port)
    layout = Layout(CLUSTER)
    pipeline = client.pipeline(transaction=False)
    for number in range(plan.instances):
        format_id = make_format(number % plan.formats, plan.chunk_bytes).format_id()
        name = f"swarm-{number:04d}"
        pipeline.scard(layout.shard_of(format_id, name).published(name))
    try:
        return sum(pipeline.execute())
    except redis.RedisError:
        return 0


def _wait_told(controller: Controller, size: int) -> dict[str, float]:
    """Until everybody is a member again and nothing is owed; returns the metrics of that moment."""
    found: dict[str, float] = {}

    def is_told() -> bool:
        found.update(metrics(controller.url))
        members = sum(found.get(f'kvmesh_controller_instances{{state="{state}"}}', 0) for state in ("up", "suspect"))
        return members > size and not found["kvmesh_controller_snapshots_owed"]  # and the witness

    _wait(is_told)
    return found


def _wait(check: Any) -> None:
    until_s = time.monotonic() + WAIT_S
    while not check():
        if time.monotonic() > until_s:
            raise StartupError("bench directory", f"everything known within {WAIT_S:g} s", "less")
        time.sleep(0.2)


def _cpu_s(process: psutil.Process) -> float:
    spent = process.cpu_times()
    return float(spent.user + spent.system)


def _ms(values: Sequence[float], share: float) -> float | None:
    return 1000 * percentile(values, share) if values else None


def _show(console: Console, cells: Sequence[Cell], machine: str) -> None:
    table = Table(title=f"Directories ({machine})", box=box.MARKDOWN)  # to be pasted
    for column, _ in _columns(cells[0]):
        table.add_column(column, justify="right")
    for cell in cells:
        table.add_row(*(text for _, text in _columns(cell)))
    console.print(table)
    console.print(
        f"A question is about {KEYS_PER_QUESTION} chunks: one client, {QUESTIONS_AT_ONCE} under way for the rate, one "
        "after the other for the times.",
        style="dim",
    )


def _columns(cell: Cell) -> Iterator[tuple[str, str]]:
    yield "directory", cell.directory
    yield "mode", cell.mode
    yield "instances", str(cell.instances)
    yield "chunks x holders", f"{cell.entries:,}"
    yield "joined s", f"{cell.join_s:.1f}"
    yield "changes/s", f"{cell.events_per_s:,.0f}"
    yield "visible p50/p99 ms", f"{_number(cell.visible_p50_ms)}/{_number(cell.visible_p99_ms)}"
    yield "directory MB", f"{cell.directory_rss_mb:.0f}"
    yield "directory CPU %", f"{cell.directory_cpu_percent:.0f}"
    yield "node MB", f"{cell.node_rss_mb:.0f}"
    yield "node CPU %", f"{cell.node_cpu_percent:.0f}"
    yield "questions/s", _number(cell.questions_per_s)
    yield "question p50/p99 ms", f"{_number(cell.question_p50_ms)}/{_number(cell.question_p99_ms)}"
    yield "resync: known / told s", f"{_number(cell.resync_s)}/{_number(cell.resync_told_s)}"
    yield "sent MB", _number(cell.resync_sent_mb)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
