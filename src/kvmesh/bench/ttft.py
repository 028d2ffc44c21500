"""`kvmesh bench ttft`: what a peer hit is worth. Time to the first token of the same prompt: computed, pulled from a
peer, from the own pool.

Two vLLM CPU servers with a random Llama (8 or 32 KiB of KV per token in bfloat16), no prefix caching, so that the host
pool is the only cache. A request is sent when both servers are idle. Printed beside the speed-up is the ratio of fetch
rate to the rate at which prefill produces KV: small models on CPUs overstate what a large model on a GPU gains.
"""

from __future__ import annotations

import contextlib
import json
import random
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kvmesh.bench.cluster import Completion, Controller, Instance, complete, instance_config, metric, wait_healthy
from kvmesh.bench.output import result_console
from kvmesh.models import BENCH, THIN, TinyShape, make_tiny_llama

CHUNK_TOKENS = 256
SHAPES = {"thin": THIN, "bench": BENCH}


@dataclass(frozen=True)
class TtftRow:
    """Medians for one prompt length. Times in seconds, rates in GB/s."""

    prompt_tokens: int
    repeats: int
    cold_s: float
    peer_s: float
    local_s: float
    slowest_peer_s: float
    fastest_cold_s: float
    pulled_share: float
    """Chunks pulled, of the whole chunks of the prompts."""
    fetch_gb_per_s: float
    kv_production_gb_per_s: float
    identical: bool
    """Pulled and local hits gave the same texts: the same computation, on what must be the same bytes."""
    as_cold: int
    """Hits whose text was also the cold run's. A cold run computes in other batches, which in bfloat16 can round to
    another token; in float32 it does not, and the end-to-end tests look at that.
    """

    @property
    def peer_of_cold(self) -> float:
        return self.peer_s / self.cold_s

    @property
    def peer_of_local(self) -> float:
        return self.peer_s / self.local_s


def run_ttft(lengths: Sequence[int], repeats: int, channel: str, shape: TinyShape, *, as_json: bool) -> int:
    """Measure and print; returns the exit status: 1 when a text differed or nothing was pulled."""
    console = Console(stderr=True)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvmesh-ttft-")))
        status = stack.enter_context(console.status("starting two vLLM servers on the CPU"))
        controller = Controller(folder)
        stack.callback(controller.stop)
        controller.start()
        wait_healthy(controller)
        instances = []
        for number in (1, 2):
            instance = Instance(
                f"instance-{number}",
                make_tiny_llama(shape=shape),
                folder,
                instance_config(number, controller, transfer_channel=channel, max_local_cpu_size=4),
                core=number - 1,
                dtype="bfloat16",
                max_model_len=max(lengths) + 64,
                arguments=("--no-enable-prefix-caching",),
            )
            stack.callback(instance.stop)
            instance.start()
            instances.append(instance)
        wait_healthy(*instances)
        first, second = instances
        second.wait_peers(1)
        rows = []
        for length in lengths:
            status.update(f"{length} tokens")
            _measure(first, second, length, 2, shape, seed=0)  # warm-up: compiled kernels, first connections
            rows.append(_measure(first, second, length, repeats, shape, seed=1))
    if as_json:
        print(
            json.dumps(
                [{**asdict(row), "peer_of_cold": row.peer_of_cold, "peer_of_local": row.peer_of_local} for row in rows],
                indent=2,
            )
        )
    else:
        result_console().print(_table(rows, channel))
    return 0 if all(row.identical and row.pulled_share > 0 for row in rows) else 1


def _measure(first: Instance, second: Instance, length: int, repeats: int, shape: TinyShape, *, seed: int) -> TtftRow:
    cold_s, peer_s, local_s = [], [], []
    before = _fetched(second)
    identical, as_cold = True, 0
    instances = (first, second)
    for repeat in range(repeats):
        chosen = random.Random(f"{length} {seed} {repeat}")
        prompt = [chosen.randrange(10, 1000) for _ in range(length)]
        known = int(metric(second.admin_url, "kvmesh_node_replica_chunks"))
        cold = _complete(first, prompt, instances)
        second.wait_visible(known + length // CHUNK_TOKENS)
        peer = _complete(second, prompt, instances)
        local = _complete(second, prompt, instances)
        cold_s.append(cold.ttft_s)
        peer_s.append(peer.ttft_s)
        local_s.append(local.ttft_s)
        identical &= peer.text == local.text
        as_cold += cold.text == peer.text
    chunks, fetched_bytes, seconds = (after - then for after, then in zip(_fetched(second), before, strict=True))
    return TtftRow(
        prompt_tokens=length,
        repeats=repeats,
        cold_s=statistics.median(cold_s),
        peer_s=statistics.median(peer_s),
        local_s=statistics.median(local_s),
        slowest_peer_s=max(peer_s),
        fastest_cold_s=min(cold_s),
        pulled_share=chunks / (repeats * (length // CHUNK_TOKENS)),
        fetch_gb_per_s=fetched_bytes / seconds / 1e9 if seconds else 0.0,
        kv_production_gb_per_s=length * shape.kv_bytes_per_token(2) / statistics.median(cold_s) / 1e9,
        identical=identical,
        as_cold=as_cold,
    )


def _complete(instance: Instance, prompt: Sequence[int], instances: Sequence[Instance]) -> Completion:
    """One request while nobody else computes: on a real cluster the other instance has cores of its own."""
    for other in instances:
        other.wait_idle()
    return complete(instance.url, prompt)


def _fetched(instance: Instance) -> tuple[float, float, float]:
    names = ("kvmesh_fetched_chunks_total", "kvmesh_fetched_bytes_total", "kvmesh_fetch_seconds_sum")
    chunks, fetched_bytes, seconds = (metric(instance.url, name) for name in names)
    return chunks, fetched_bytes, seconds


def _table(rows: Sequence[TtftRow], channel: str) -> Table:
    table = Table(title=f"Time to first token, medians of {rows[0].repeats}, {channel}", title_justify="left")
    for heading in (
        "tokens",
        "cold",
        "peer hit",
        "local hit",
        "peer/cold",
        "peer/local",
        "slowest peer",
        "pulled",
        "fetch GB/s",
        "fetch/produce",
    ):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            str(row.prompt_tokens),
            f"{row.cold_s:.3f} s",
            f"{row.peer_s:.3f} s",
            f"{row.local_s:.3f} s",
            f"{row.peer_of_cold:.3f}",
            f"{row.peer_of_local:.2f}",
            f"{row.slowest_peer_s:.3f} s",
            f"{row.pulled_share:.0%}",
            f"{row.fetch_gb_per_s:.2f}",
            f"{row.fetch_gb_per_s / row.kv_production_gb_per_s:.1f}",
        )
    return table
