"""`kvmesh bench vllm-path`: what kvmesh costs vLLM's scheduler thread, and how soon peers know what is published.

Scheduler: vLLM with a model of next to no arithmetic, its engine core in the measured process (`vllm_path_engine.py`),
without a connector, with the host pool alone, and sharing, while others hold a million chunks. What the tier does is
timed call by call.

Publishing: two nodes and a controller, from the engine's `publish` (before the bytes are hashed) until the other
engine's lookup finds the chunk; and how late the event loops of both nodes are meanwhile.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec
import yaml
from rich.console import Console
from rich.table import Table

from kvmesh.bench.cluster import HOST, Controller, instance_config, tail, wait_healthy
from kvmesh.bench.output import result_console
from kvmesh.bench.stand_in import StandInEngine, make_key
from kvmesh.bench.streamed import percentile
from kvmesh.bench.vllm_path_engine import EngineOptions, EngineTimes
from kvmesh.bench.vllm_servers import NOT_SHARING
from kvmesh.bench.watched_node import WatchedHandle
from kvmesh.config import KVMeshConfig
from kvmesh.errors import StartupError
from kvmesh.models import TINY, make_tiny_llama

CHUNK_TOKENS = 256
LOOKUP_AIM_S = 5e-6
VISIBLE_AIM_S = (0.010, 0.050)
"""Median and 99th percentile, on an idle machine."""
PUBLISH_CHUNK_BYTES = 2 << 20
PUBLISH_SLOTS = 64
PUBLISH_PAUSE_S = 0.02
POLL_S = 0.0002
VISIBLE_TIMEOUT_S = 10.0
ENGINE_TIMEOUT_S = 900.0


@dataclass(frozen=True)
class PathPlan:
    """How much of it."""

    visible: int = 1_000_000
    requests: int = 26
    """The first two warm up."""
    prompt_tokens: int = 1500
    output_tokens: int = 64
    at_a_time: int = 8
    publishes: int = 300


@dataclass(frozen=True)
class PublishTimes:
    """Seconds."""

    visible_s: list[float]
    loop_late_s: dict[str, list[float]]
    """By node: how much later than asked a sleeping task was woken."""


def run_vllm_path(plan: PathPlan, *, as_json: bool, logs: Path | None) -> int:
    """Measure and print; returns the exit status: 1 when a lookup takes longer than it may.

    Raises:
        StartupError: something does not start, or a chunk never became visible.
    """
    console = Console(stderr=True)
    with contextlib.ExitStack() as stack:
        folder = logs or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvmesh-path-")))
        folder.mkdir(parents=True, exist_ok=True)
        controller = Controller(folder)
        stack.callback(controller.stop)
        controller.start()
        wait_healthy(controller, timeout_s=60)
        with console.status("publishing"):
            published = measure_publishing(controller, plan.publishes, folder)
        ways: dict[str, Mapping[str, object] | None] = {
            "no connector": None,
            "host pool alone": instance_config(1, controller, **dict(NOT_SHARING)),
            "sharing": instance_config(2, controller),
        }
        engines = {}
        for name, config in ways.items():
            with console.status(f"vLLM: {name}"):
                engines[name] = _measure_engine(plan, name, config, folder)
    if as_json:
        print(json.dumps(_record(plan, published, engines), indent=2))
    else:
        _show(plan, published, engines)
    return int(statistics.median(engines["sharing"].hit_s) > LOOKUP_AIM_S)


def _measure_engine(plan: PathPlan, name: str, config: Mapping[str, object] | None, folder: Path) -> EngineTimes:
    options = EngineOptions(
        model=str(make_tiny_llama(shape=TINY)),
        connector=config is not None,
        requests=plan.requests,
        prompt_tokens=plan.prompt_tokens,
        output_tokens=plan.output_tokens,
        at_a_time=plan.at_a_time,
        visible=plan.visible,
    )
    stem = name.replace(" ", "-")
    environment = {
        **os.environ,
        "VLLM_CPU_OMP_THREADS_BIND": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_HOST_IP": HOST,
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if config is not None:
        path = folder / f"{stem}.yaml"
        path.write_text(yaml.safe_dump(dict(config), sort_keys=False))
        environment["KVMESH_CONFIG_FILE"] = str(path)
    log_path = folder / f"{stem}.log"
    with log_path.open("wb") as log:
        done = subprocess.run(
            [sys.executable, "-m", "kvmesh.bench.vllm_path_engine"],
            input=msgspec.json.encode(options),
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            timeout=ENGINE_TIMEOUT_S,
            check=False,
        )
    try:
        return msgspec.json.decode(done.stdout, type=EngineTimes)
    except msgspec.MsgspecError:
        found = f"it ended with {done.returncode}\n{tail(log_path.read_text(errors='replace'))}"
        raise StartupError(f"vLLM, {name}", "an engine that measures itself", found) from None


def measure_publishing(controller: Controller, count: int, folder: Path) -> PublishTimes:
    """One engine publishes a chunk after the other, another one looks until it sees it."""
    with contextlib.ExitStack() as stack:
        engines: list[StandInEngine] = []
        for name in ("publisher", "reader"):
            config = KVMeshConfig(
                instance_id=name,
                host=HOST,
                enable_controller=True,
                controller_pull_url=f"tcp://{HOST}:{controller.pull_port}",
                controller_reply_url=f"tcp://{HOST}:{controller.reply_port}",
                log_level="warning",
            )
            engine = StandInEngine(config, slots=PUBLISH_SLOTS, chunk_bytes=PUBLISH_CHUNK_BYTES)
            engine.node.close()
            engine.node = WatchedHandle(config, engine.format, engine.ledger, engine.pool, folder / f"{name}.lag")
            engine.start()
            stack.callback(engine.close)
            engines.append(engine)
        publisher, reader = engines
        if not reader.wait_peers(1, VISIBLE_TIMEOUT_S):
            raise StartupError("reader", "the publisher as a peer", "no peer")
        publisher.put([make_key(f"first {index}") for index in range(PUBLISH_SLOTS)])  # maps the pool's pages
        visible_s = []
        for number in range(count):
            key = make_key(f"published {number}")
            time.sleep(PUBLISH_PAUSE_S)
            visible_s.append(_publish(publisher, reader, key))
    lates = {name: msgspec.json.decode((folder / f"{name}.lag").read_bytes()) for name in ("publisher", "reader")}
    return PublishTimes(visible_s, lates)


def _publish(publisher: StandInEngine, reader: StandInEngine, key: bytes) -> float:
    slot = publisher.fill(key)
    started_s = time.perf_counter()
    publisher.announce(key, slot)
    while not reader.node.is_visible(key):
        if time.perf_counter() - started_s > VISIBLE_TIMEOUT_S:
            raise StartupError("reader", f"a published chunk within {VISIBLE_TIMEOUT_S:g} s", "it never became visible")
        time.sleep(POLL_S)
    return time.perf_counter() - started_s


def _figures(values: Sequence[float]) -> dict[str, float]:
    return {
        "p50": percentile(values, 0.5),
        "p99": percentile(values, 0.99),
        "max": max(values, default=0.0),
        "mean": statistics.fmean(values or [0.0]),
    }


def _record(plan: PathPlan, published: PublishTimes, engines: Mapping[str, EngineTimes]) -> dict[str, object]:
    return {
        "plan": asdict(plan),
        "publish_to_visible_s": _figures(published.visible_s),
        "node_loop_late_s": {name: _figures(late) for name, late in published.loop_late_s.items()},
        "scheduler": {
            name: {
                "steps": times.steps,
                "step_s": _figures(times.step_s),
                "prefill_step_s": _figures(times.prefill_step_s),
                "tier_calls": {call.name: {"calls": len(call.each_s), **_figures(call.each_s)} for call in times.calls},
                "lookup_hit_s_per_chunk": _figures(times.hit_s),
                "lookup_miss_s_per_chunk": _figures(times.miss_s),
                "bare_set_s_per_chunk": _figures(times.set_s),
            }
            for name, times in engines.items()
        },
    }


def _show(plan: PathPlan, published: PublishTimes, engines: Mapping[str, EngineTimes]) -> None:
    out = result_console()
    steps = Table(
        title=f"Scheduler thread per step, µs: {plan.requests - 2} prompts of {plan.prompt_tokens} tokens, "
        f"{plan.output_tokens} tokens of answer, {plan.at_a_time} at a time",
        title_justify="left",
    )
    for heading in ("", "steps", "median", "p99", "mean", "mean of steps that begin a request"):
        steps.add_column(heading, justify="right" if heading else "left")
    for name, times in engines.items():
        figures, first = _figures(times.step_s), _figures(times.prefill_step_s)
        shown = (figures["p50"], figures["p99"], figures["mean"], first["mean"])
        steps.add_row(name, str(times.steps), *(f"{value * 1e6:.0f}" for value in shown))
    out.print(steps)
    sharing = engines["sharing"]
    calls = Table(title="Of it in the tier, sharing", title_justify="left")
    for heading in ("call", "calls", "median, µs", "p99, µs", "mean, µs", "µs per step"):
        calls.add_column(heading, justify="right" if heading != "call" else "left")
    for call in sorted(sharing.calls, key=lambda call: -sum(call.each_s)):
        each = _figures(call.each_s)
        shown = (each["p50"], each["p99"], each["mean"], sum(call.each_s) / sharing.steps)
        calls.add_row(call.name, str(len(call.each_s)), *(f"{value * 1e6:.1f}" for value in shown))
    total_s = sum(sum(call.each_s) for call in sharing.calls)
    calls.add_row("all", "", "", "", "", f"{total_s / sharing.steps * 1e6:.1f}")
    out.print(calls)
    hit, miss, bare = (_figures(values) for values in (sharing.hit_s, sharing.miss_s, sharing.set_s))
    out.print(
        f"Lookup with {plan.visible:,} visible chunks, µs per chunk: held by a peer {hit['p50'] * 1e6:.2f} "
        f"(p99 {hit['p99'] * 1e6:.2f}; at most {LOOKUP_AIM_S * 1e6:g}), by nobody, first of its request "
        f"{miss['p50'] * 1e6:.2f}; a bare set {bare['p50'] * 1e6:.2f}"
    )
    visible = _figures(published.visible_s)
    aims = "/".join(f"{aim * 1e3:g}" for aim in VISIBLE_AIM_S)
    out.print(
        f"Published until visible to a peer's lookup, {len(published.visible_s)} chunks of "
        f"{PUBLISH_CHUNK_BYTES >> 20} MiB: p50 {visible['p50'] * 1e3:.2f} ms, p99 {visible['p99'] * 1e3:.2f} ms "
        f"(aim on an idle machine {aims})"
    )
    for name, values in published.loop_late_s.items():
        late = _figures(values)
        out.print(
            f"Event loop of the {name}'s node late by: p50 {late['p50'] * 1e3:.2f} ms, p99 {late['p99'] * 1e3:.2f} ms, "
            f"max {late['max'] * 1e3:.2f} ms"
        )
