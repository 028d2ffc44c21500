"""`kvmesh bench trace-vllm`: a slice of a request trace replayed on real vLLM CPU servers, with sharing and without.

A slice is one of so many conversations (with all their turns, so that what a turn shares with the one before stays in
it), with all lengths divided by a factor, replayed faster by another. Requests go to the servers in turns. The same
slice then runs through the simulator (`simulator.py`) with the rates that the servers have measured of themselves: what
it says stands in the table beside what happened.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import tempfile
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import httpx
from rich.console import Console

from kvmesh.bench.cluster import Instance, metric
from kvmesh.bench.output import result_console
from kvmesh.bench.simulator import Fleet, Outcome, SimRequest, Simulator
from kvmesh.bench.streamed import Streamed, ask
from kvmesh.bench.trace import BLOCK_TOKENS, outcome_record, outcome_table, read_trace
from kvmesh.bench.vllm_servers import Fetched, ServerPlan, running_servers
from kvmesh.errors import StartupError

SHRINKS = (1, 2, 4, 8, 16)
"""A block of a trace becomes a chunk, and vLLM's smallest block on CPUs has 32 tokens."""
BLOCK_TOKENS_ON_CPU = 128
TOKENS = range(10, 1000)
"""Those that every model has: what is in a prompt does not matter, only what is equal."""
POLICY = "roundrobin"


@dataclass(frozen=True)
class TraceSlice:
    """What to replay of a trace, and how."""

    path: Path
    one_of: int = 60
    """Conversations: of so many, one."""
    limit: int = 120
    """Requests at most; 0: all."""
    shrink: int = 8
    """Divides all lengths."""
    speed: float = 20.0
    max_output_tokens: int = 16

    @property
    def chunk_tokens(self) -> int:
        return BLOCK_TOKENS // self.shrink

    def requests(self) -> list[SimRequest]:
        """Those of the slice, with the times and lengths of the replay. Raises StartupError."""
        if self.shrink not in SHRINKS:
            raise StartupError("--shrink", ", ".join(map(str, SHRINKS)), str(self.shrink))
        chosen = [
            request._replace(
                prompt_tokens=max(1, request.prompt_tokens // self.shrink),
                output_tokens=max(1, min(self.max_output_tokens, request.output_tokens // self.shrink)),
            )
            for request in read_trace(self.path, speed=self.speed)
            if zlib.crc32(request.session.encode()) % self.one_of == 0
        ]
        if not chosen:
            raise StartupError(f"trace {self.path}", f"a conversation in one of {self.one_of}", "none")
        chosen = chosen[: self.limit or None]
        return [request._replace(at_s=request.at_s - chosen[0].at_s) for request in chosen]


def prompt_of(request: SimRequest, number: int, chunk_tokens: int) -> list[int]:
    """Tokens for a request: equal chunks have equal tokens, and what is behind the last whole chunk is its own."""
    tokens: list[int] = []
    for chunk in request.chunks:
        tokens += random.Random(f"chunk {chunk}").choices(TOKENS, k=chunk_tokens)
    rest = request.prompt_tokens - len(tokens)
    return tokens + random.Random(f"rest {number}").choices(TOKENS, k=max(0, rest))


class Rates(NamedTuple):
    """What servers have measured of themselves."""

    prefill_tokens_per_s: float
    fetch_bytes_per_s: float


def run_trace_vllm(
    part: TraceSlice, servers: ServerPlan, pool_gib: float, kv_bytes_per_token: int, *, as_json: bool, logs: Path | None
) -> int:
    """Replay and print; returns the exit status: 1 when a request failed.

    Args:
        part: what to replay.
        servers: what to start.
        pool_gib: host pool of each.
        kv_bytes_per_token: of the model.
        as_json: print JSON instead of text.
        logs: folder for log files; None: a temporary one.

    Raises:
        StartupError: the trace cannot be read, or a server does not start.
    """
    console = Console(stderr=True)
    requests = part.requests()
    chunk_bytes = part.chunk_tokens * kv_bytes_per_token
    plan = replace(
        servers,
        max_model_len=max(request.prompt_tokens + request.output_tokens for request in requests) + 16,
        config={"chunk_size": part.chunk_tokens, "max_local_cpu_size": pool_gib, **servers.config},
        arguments=(
            "--no-enable-prefix-caching",  # the pool is the only cache, as in the simulator
            "--enable-prompt-tokens-details",
            *("--block-size", str(min(part.chunk_tokens, BLOCK_TOKENS_ON_CPU))),
            *servers.arguments,
        ),
    )
    pool_chunks = int(pool_gib * 2**30 / chunk_bytes)
    outcomes, failed = [], 0
    rates = Rates(0.0, 0.0)
    with contextlib.ExitStack() as stack:
        folder = logs or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvmesh-trace-")))
        for sharing in (True, False):
            console.print(
                f"[dim]{len(requests)} requests over {requests[-1].at_s:.0f} s, "
                f"sharing {'on' if sharing else 'off'}[/dim]"
            )
            with running_servers(plan, folder / ("on" if sharing else "off"), sharing=sharing) as instances:
                before = _Peers.of(instances, part.chunk_tokens) if sharing else _Peers()
                started_s = time.perf_counter()
                answers = asyncio.run(_replay(instances, requests, part.chunk_tokens, console))
                duration_s = time.perf_counter() - started_s
                peers = _Peers.of(instances, part.chunk_tokens).since(before) if sharing else before
                if sharing:
                    rates = _rates(instances, Fetched.of(instances))
            failed += answers.count(None)
            outcomes.append(
                replace(
                    _outcome(answers, peers, plan.count, rates, duration_s), sharing=sharing, pool_chunks=pool_chunks
                )
            )
    fleet = Fleet(
        instances=plan.count,
        pool_chunks=pool_chunks,
        chunk_tokens=part.chunk_tokens,
        kv_bytes_per_token=kv_bytes_per_token,
        prefill_tokens_per_s=rates.prefill_tokens_per_s or Fleet.prefill_tokens_per_s,
        link_bytes_per_s=rates.fetch_bytes_per_s or Fleet.link_bytes_per_s,
    )
    foretold = [Simulator(fleet, POLICY, sharing=sharing).run(requests) for sharing in (True, False)]
    shown = [*outcomes, *(replace(one, policy=f"{POLICY}, simulated") for one in foretold)]
    if as_json:
        records = [outcome_record(one, chunk_bytes) for one in shown]
        print(json.dumps({"trace": part.path.name, "rates": rates._asdict(), "outcomes": records}, indent=2))
    else:
        title = (
            f"{part.path.name}: one of {part.one_of} conversations, lengths / {part.shrink}, {part.speed:g} times as "
            f"fast; vLLM on CPU, {rates.prefill_tokens_per_s:,.0f} prefill tokens/s, fetches at "
            f"{rates.fetch_bytes_per_s / 1e9:.2f} GB/s, {kv_bytes_per_token:,} KV bytes per token"
        )
        out = result_console()
        (out if out.is_terminal else Console(width=200)).print(outcome_table(title, shown, chunk_bytes))
    return int(failed > 0)


async def _replay(
    instances: Sequence[Instance], requests: Sequence[SimRequest], chunk_tokens: int, console: Console
) -> list[tuple[int, Streamed] | None]:
    """Send each request when its time has come, whatever has become of those before; None for one that failed."""
    async with contextlib.AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(httpx.AsyncClient(base_url=instance.url, limits=_NO_LIMITS))
            for instance in instances
        ]
        prompts = [prompt_of(request, number, chunk_tokens) for number, request in enumerate(requests)]
        started_s = time.monotonic()

        async def send(number: int) -> tuple[int, Streamed] | None:
            request, turn = requests[number], number % len(clients)
            await asyncio.sleep(max(0.0, started_s + request.at_s - time.monotonic()))
            try:
                return turn, await ask(clients[turn], "model", prompts[number], request.output_tokens)
            except (httpx.HTTPError, ValueError) as error:
                console.print(f"request {number} failed: {error!r}", style="red")
                return None

        return list(await asyncio.gather(*(send(number) for number in range(len(requests)))))


_NO_LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=None)


def _rates(instances: Sequence[Instance], fetched: Fetched) -> Rates:
    measured = [metric(one.url, "kvmesh_prefill_tokens_per_second") for one in instances]
    return Rates(sum(measured) / len(measured), fetched.gb_per_s * 1e9)


class _Peers(NamedTuple):
    """What came from peers, and what could have."""

    tokens: int = 0
    size_bytes: int = 0
    gated_tokens: int = 0
    """At least: of a request that was not fetched for, the first chunk is counted."""

    @classmethod
    def of(cls, instances: Sequence[Instance], chunk_tokens: int) -> _Peers:
        fetched = Fetched.of(instances)
        gated = sum(metric(one.url, "kvmesh_lookup_chunks_total", reason="gate_refused") for one in instances)
        return cls(fetched.chunks * chunk_tokens, fetched.size_bytes, int(gated) * chunk_tokens)

    def since(self, before: _Peers) -> _Peers:
        return _Peers(*(now - then for now, then in zip(self, before, strict=True)))


def _outcome(
    answers: Sequence[tuple[int, Streamed] | None], peers: _Peers, instances: int, rates: Rates, duration_s: float
) -> Outcome:
    """In the simulator's terms. How busy an instance was is what it computed, at the rate that it has measured."""
    good = [answer for answer in answers if answer is not None]
    computed = [0] * instances
    for turn, answer in good:
        computed[turn] += answer.prompt_tokens - answer.cached_tokens
    busy_s = sum(computed) / rates.prefill_tokens_per_s if rates.prefill_tokens_per_s else 0.0
    return Outcome(
        policy=POLICY,
        sharing=True,
        instances=instances,
        pool_chunks=0,
        requests=len(good),
        prompt_tokens=sum(answer.prompt_tokens for _, answer in good),
        local_tokens=max(0, sum(answer.cached_tokens for _, answer in good) - peers.tokens),
        peer_tokens=peers.tokens,
        moved_bytes=peers.size_bytes,
        gated_tokens=peers.gated_tokens,
        ttft_s=[answer.ttft_s for _, answer in good],
        busiest_of_mean=max(computed) / max(1e-9, sum(computed) / instances),
        utilisation=busy_s / instances / duration_s,
        duration_s=duration_s,
    )
