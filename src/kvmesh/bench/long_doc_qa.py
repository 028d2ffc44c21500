"""`kvmesh bench long-doc-qa`: many long documents, asked about once and then again.

The warm-up round sends each document once; the query round sends them again, `repeat_count` times each, in the order
of `repeat_mode`. Run against instance 1 and then against instance 2, the warm-up round of the second shows what peers
give: nothing of its documents is in its own cache. (LMCache's `benchmarks/long_doc_qa` takes the same flags and prints
the same lines.)
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import httpx
from rich.console import Console
from rich.progress import Progress

REQUEST_TIMEOUT_S = 3600.0
MODES = ("tile", "interleave", "random")


@dataclass(frozen=True)
class Round:
    """One round's figures. Times in seconds; percentiles of the time to the first token."""

    name: str
    prompts: int
    successes: int
    seconds: float
    mean_ttft_s: float
    p50_ttft_s: float
    p90_ttft_s: float
    p99_ttft_s: float
    slowest_ttft_s: float
    output_tokens: int


@dataclass(frozen=True)
class LongDocQa:
    """What is asked for; the flags of the command."""

    model: str
    base_url: str
    num_documents: int
    document_length: int
    output_len: int
    repeat_count: int
    repeat_mode: str
    max_inflight_requests: int
    seed: int = 0

    def documents(self) -> list[str]:
        """Texts of about `document_length` tokens that differ from the first token on."""
        return [f"{number} " + " ".join(["hi"] * self.document_length) for number in range(self.num_documents)]

    def queries(self, documents: Sequence[str]) -> list[str]:
        """The query round: each document `repeat_count` times; list after list, each in a row, or shuffled."""
        if self.repeat_mode == "interleave":
            return [document for document in documents for _ in range(self.repeat_count)]
        repeated = [document for _ in range(self.repeat_count) for document in documents]
        if self.repeat_mode == "random":
            random.Random(self.seed).shuffle(repeated)
        return repeated


def run_long_doc_qa(plan: LongDocQa, *, as_json: bool) -> int:
    """Measure both rounds and print them; returns the exit status: 1 when a request failed."""
    console = Console(stderr=True)
    documents = plan.documents()
    with Progress(console=console, transient=True) as progress:
        warm_up = asyncio.run(_run_round(plan, "Warmup", documents, progress))
        query = asyncio.run(_run_round(plan, "Query", plan.queries(documents), progress))
    if as_json:
        print(json.dumps({"plan": vars(plan), "rounds": [vars(warm_up), vars(query)]}, indent=2))
    else:
        _print_round(warm_up)
        print("=== BENCHMARK RESULTS ===")
        _print_round(query)
    return 0 if warm_up.successes == warm_up.prompts and query.successes == query.prompts else 1


def _print_round(measured: Round) -> None:
    """The seed's lines, and percentiles below them."""
    name = measured.name
    print(f"{name} round mean TTFT: {measured.mean_ttft_s:.3f}s")
    print(f"{name} round time: {measured.seconds:.3f}s")
    print(f"{name} round prompt count: {measured.prompts}")
    print(f"{name} round successful prompt count: {measured.successes}")
    print(
        f"{name} round TTFT p50: {measured.p50_ttft_s:.3f}s  p90: {measured.p90_ttft_s:.3f}s  "
        f"p99: {measured.p99_ttft_s:.3f}s  max: {measured.slowest_ttft_s:.3f}s"
    )


async def _run_round(plan: LongDocQa, name: str, prompts: Sequence[str], progress: Progress) -> Round:
    task = progress.add_task(f"{name} round", total=len(prompts))
    gate = asyncio.Semaphore(plan.max_inflight_requests)
    ttfts: list[float] = []
    tokens = 0

    async with httpx.AsyncClient(base_url=plan.base_url, timeout=REQUEST_TIMEOUT_S) as client:

        async def ask(prompt: str) -> None:
            nonlocal tokens
            async with gate:
                try:
                    ttft_s, count = await _ask(client, plan, prompt)
                except (httpx.HTTPError, ValueError) as error:
                    progress.console.print(f"request failed: {error!r}", style="red")
                else:
                    ttfts.append(ttft_s)
                    tokens += count
                progress.advance(task)

        started_s = time.perf_counter()
        await asyncio.gather(*(ask(prompt) for prompt in prompts))
        seconds = time.perf_counter() - started_s
    ordered = sorted(ttfts) or [0.0]
    return Round(
        name=name,
        prompts=len(prompts),
        successes=len(ttfts),
        seconds=seconds,
        mean_ttft_s=statistics.fmean(ordered),
        p50_ttft_s=_percentile(ordered, 0.5),
        p90_ttft_s=_percentile(ordered, 0.9),
        p99_ttft_s=_percentile(ordered, 0.99),
        slowest_ttft_s=ordered[-1],
        output_tokens=tokens,
    )


async def _ask(client: httpx.AsyncClient, plan: LongDocQa, prompt: str) -> tuple[float, int]:
    """One streamed request; returns the time to the first token and how many came."""
    body = {
        "model": plan.model,
        "prompt": prompt,
        "max_tokens": plan.output_len,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
    }
    started_s = time.perf_counter()
    first_s, count = 0.0, 0
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code != httpx.codes.OK:
            text = (await answer.aread()).decode(errors="replace")
            raise ValueError(f"{answer.status_code}: {text[:300]}")
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                first_s = first_s or time.perf_counter() - started_s
                count += 1
    if not count:
        raise ValueError("the answer had no tokens")
    return first_s, count


def _percentile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
