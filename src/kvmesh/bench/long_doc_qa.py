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

from kvmesh.bench.streamed import Streamed, ask, percentile

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
    prompt_tokens: int
    output_tokens: int

    @property
    def is_complete(self) -> bool:
        """Whether every request was answered."""
        return self.successes == self.prompts


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
    rounds = measure(plan, Console(stderr=True))
    if as_json:
        print(json.dumps({"plan": vars(plan), "rounds": [vars(one) for one in rounds]}, indent=2))
    else:
        print_rounds(*rounds)
    return 0 if all(one.is_complete for one in rounds) else 1


def measure(plan: LongDocQa, console: Console) -> tuple[Round, Round]:
    """The warm-up round and the query round."""
    documents = plan.documents()
    with Progress(console=console, transient=True) as progress:
        warm_up = asyncio.run(_run_round(plan, "Warmup", documents, progress))
        return warm_up, asyncio.run(_run_round(plan, "Query", plan.queries(documents), progress))


def print_rounds(warm_up: Round, query: Round) -> None:
    """The lines of LMCache's script, and percentiles below them."""
    _print_round(warm_up)
    print("=== BENCHMARK RESULTS ===")
    _print_round(query)


def _print_round(measured: Round) -> None:
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
    answers: list[Streamed] = []

    async with httpx.AsyncClient(base_url=plan.base_url) as client:

        async def send(prompt: str) -> None:
            async with gate:
                try:
                    answer = await ask(client, plan.model, prompt, plan.output_len)
                except (httpx.HTTPError, ValueError) as error:
                    progress.console.print(f"request failed: {error!r}", style="red")
                else:
                    answers.append(answer)
                progress.advance(task)

        started_s = time.perf_counter()
        await asyncio.gather(*(send(prompt) for prompt in prompts))
        seconds = time.perf_counter() - started_s
    ttfts = [answer.ttft_s for answer in answers]
    return Round(
        name=name,
        prompts=len(prompts),
        successes=len(answers),
        seconds=seconds,
        mean_ttft_s=statistics.fmean(ttfts or [0.0]),
        p50_ttft_s=percentile(ttfts, 0.5),
        p90_ttft_s=percentile(ttfts, 0.9),
        p99_ttft_s=percentile(ttfts, 0.99),
        slowest_ttft_s=max(ttfts, default=0.0),
        prompt_tokens=sum(answer.prompt_tokens for answer in answers),
        output_tokens=sum(answer.output_tokens for answer in answers),
    )
