"""`kvmesh bench long-doc-pair`: long-doc-qa against instance 1 and then against instance 2, with sharing and without.

Nothing of the documents is in instance 2's own cache when its turn comes, so its warm-up round shows what peers give.
Without URLs, two vLLM CPU servers are started here, twice: once sharing, once each for itself. Small models on CPUs
overstate what a large one on a GPU gains, so the ratio of the fetch rate to the rate at which prefill produces KV is
printed beside the gains.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import httpx
from rich.console import Console

from kvmesh.bench.cluster import metric
from kvmesh.bench.long_doc_plot import draw
from kvmesh.bench.long_doc_qa import LongDocQa, Round, measure, print_rounds
from kvmesh.bench.vllm_servers import Fetched, ServerPlan, running_servers
from kvmesh.errors import StartupError

CHUNK_TOKENS = 256
WORDS = 200
"""Of a text of the documents' kind whose tokens are counted."""


class Gain(NamedTuple):
    """What the second instance's warm-up round saves of the first one's; shares of 1."""

    ttft: float
    round_time: float


@dataclass(frozen=True)
class PairRun:
    """Both instances, one after the other. What was fetched is the second one's."""

    sharing: bool
    first: tuple[Round, Round]
    second: tuple[Round, Round]
    fetched_tokens: int = 0
    fetched_bytes: int = 0
    fetch_gb_per_s: float = 0.0
    production_gb_per_s: float = 0.0
    """KV that prefill makes, at the rate that the first instance has measured of itself."""

    @property
    def gain(self) -> Gain:
        cold, warm = self.first[0], self.second[0]
        return Gain(1 - warm.mean_ttft_s / cold.mean_ttft_s, 1 - warm.seconds / cold.seconds)

    @property
    def is_complete(self) -> bool:
        return all(one.is_complete for one in (*self.first, *self.second))

    def sentence(self) -> str:
        """What LMCache's page says at its end, with the figures of this run."""
        cold, warm, gain = self.first[0], self.second[0], self.gain
        with_what = "With KVMesh P2P sharing enabled" if self.sharing else "Without sharing"
        return (
            f"{with_what}, the time to first token (TTFT) {_changed(gain.ttft)}, from "
            f"{cold.mean_ttft_s:.3f} s to {warm.mean_ttft_s:.3f} s, with a {abs(gain.round_time):.1%} "
            f"{'reduction' if gain.round_time >= 0 else 'growth'} in total inference time "
            f"({cold.seconds:.3f} s → {warm.seconds:.3f} s)."
        )


def run_long_doc_pair(
    plan: LongDocQa,
    servers: ServerPlan | None,
    urls: Sequence[str] = (),
    *,
    logs: Path | None = None,
    plot: Path | None = None,
    as_json: bool,
) -> int:
    """Measure and print; returns the exit status: 1 when a request failed or, sharing, nothing was fetched.

    Args:
        plan: the workload. With `servers`, document_length is in tokens; its model and URL are filled in.
        servers: what to start here.
        urls: instead: two servers that run already and share.
        logs: folder for log files and configuration; None: a temporary one.
        plot: a picture of it (needs the `bench` extra).
        as_json: print JSON instead of text.

    Raises:
        StartupError: a server does not start, or there is no matplotlib for `plot`.
    """
    console = Console(stderr=True)
    if servers is None:
        runs = [_run(plan, urls, None, console)]
    else:
        with contextlib.ExitStack() as stack:
            folder = logs or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvmesh-long-doc-")))
            runs = [_run_here(plan, servers, folder, console, sharing=sharing) for sharing in (True, False)]
    if as_json:
        print(json.dumps({"plan": asdict(plan), "runs": [_record(run) for run in runs]}, indent=2))
    else:
        _print(runs)
    if plot is not None:
        draw([(run.sharing, run.first[0], run.second[0]) for run in runs], plot, runs[0].sentence())
    pulled = servers is None or runs[0].fetched_tokens > 0
    return 0 if pulled and all(run.is_complete for run in runs) else 1


def _run_here(plan: LongDocQa, servers: ServerPlan, folder: Path, console: Console, *, sharing: bool) -> PairRun:
    word = "sharing" if sharing else "each for itself"

    def say(line: str) -> None:
        console.print(f"  {line} ({word})", style="dim", highlight=False)

    with running_servers(servers, folder / ("on" if sharing else "off"), sharing=sharing, say=say) as instances:
        first, second = instances
        words = round(plan.document_length * WORDS / _tokens(first.url, " ".join(["hi"] * WORDS)))
        here = replace(plan, model="model", document_length=words)
        before = Fetched.of([second]) if sharing else None

        def settled() -> None:
            for instance in instances:
                instance.wait_idle()

        run = _run(here, [one.url for one in instances], settled, console)
        if before is None:
            return replace(run, sharing=False)
        got = Fetched.of([second]).since(before)
        tokens = got.chunks * CHUNK_TOKENS
        per_token = got.size_bytes / tokens if tokens else 0.0
        return replace(
            run,
            fetched_tokens=tokens,
            fetched_bytes=got.size_bytes,
            fetch_gb_per_s=got.gb_per_s,
            production_gb_per_s=metric(first.url, "kvmesh_prefill_tokens_per_second") * per_token / 1e9,
        )


def _run(plan: LongDocQa, urls: Sequence[str], settle: Callable[[], None] | None, console: Console) -> PairRun:
    rounds = []
    for number, url in enumerate(urls, start=1):
        console.print(f"  instance {number}: {url}", style="dim", highlight=False)
        rounds.append(measure(replace(plan, base_url=url), console))
        if settle is not None:
            settle()
    return PairRun(True, rounds[0], rounds[1])


def _tokens(url: str, text: str) -> int:
    answer = httpx.post(f"{url}/tokenize", json={"model": "model", "prompt": text, "add_special_tokens": False})
    try:
        return int(answer.raise_for_status().json()["count"])
    except (httpx.HTTPError, KeyError, ValueError) as error:
        raise StartupError(url, "an answer from /tokenize", repr(error)) from None


def _changed(gain: float) -> str:
    return f"is reduced by {gain:.1%}" if gain >= 0 else f"grows by {-gain:.1%}"


def _print(runs: Sequence[PairRun]) -> None:
    for run in runs:
        for name, rounds in (("First", run.first), ("Second", run.second)):
            print(f"{name} instance metrics{'' if run.sharing else ', without sharing'}:")
            print_rounds(*rounds)
            print()
    for run in runs:
        print(run.sentence())
    shared = runs[0]
    if shared.fetched_tokens:
        print(
            f"Instance 2 pulled {shared.fetched_tokens} of {shared.second[0].prompt_tokens} tokens, "
            f"{shared.fetched_bytes / 1e6:.0f} MB, at {shared.fetch_gb_per_s:.2f} GB/s: "
            f"{shared.fetch_gb_per_s / max(shared.production_gb_per_s, 1e-12):.0f} times the rate at which this "
            f"engine's prefill makes KV ({shared.production_gb_per_s * 1e3:.0f} MB/s)."
        )


def _record(run: PairRun) -> dict[str, object]:
    return {**asdict(run), "gain": run.gain._asdict(), "sentence": run.sentence()}
