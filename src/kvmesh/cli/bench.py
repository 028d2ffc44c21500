"""`kvmesh bench`: what measures. Each command prints a table, or JSON with `--json`; `--quick` is for trying it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from kvmesh.cli.codec import bench_codec
from kvmesh.cli.lists import names, numbers
from kvmesh.cli.shared import JsonFlag

bench_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Measure: on this machine, with processes that are started for it and ended after it.\n\n"
    "`kvmesh bench ttft` is the table in the README. `--json` is for scripts, `--quick` for a first look. "
    "docs/benchmarks.md has the numbers of all of them, with the machine named.",
)
bench_app.command("codec")(bench_codec)


MIN_CHUNK_MIB = 4096 / (1 << 20)
"""A page: pools have no smaller slots."""


@bench_app.command("ttft")
def ttft(
    lengths: Annotated[str, typer.Option(help="Prompt lengths in tokens, separated by commas.")] = "4000,6000",
    repeats: Annotated[int, typer.Option(min=1, help="Prompts per length.")] = 5,
    channel: Annotated[
        str, typer.Option(help="transfer_channel of both instances: auto (shm within one host), tcp, shm or nixl.")
    ] = "auto",
    shape: Annotated[str, typer.Option(help="Random Llama: thin (8 KiB of KV per token) or bench (32 KiB).")] = "thin",
    as_json: JsonFlag = False,
    quick: Annotated[bool, typer.Option("--quick", help="One length, two prompts.")] = False,
) -> None:
    """Time to the first token on two real vLLM servers: cold, pulled from a peer, from the own host pool."""
    from kvmesh.bench.ttft import SHAPES, run_ttft

    if shape not in SHAPES:
        raise typer.BadParameter(f"{shape!r} is not one of {', '.join(SHAPES)}", param_hint="--shape")
    chosen = [2000] if quick else numbers("--lengths", lengths, int, least=1)
    raise typer.Exit(run_ttft(chosen, 2 if quick else repeats, channel, SHAPES[shape], as_json=as_json))


@bench_app.command("long-doc-qa")
def long_doc_qa(
    model: Annotated[str, typer.Option(help="Model name as the server knows it.")],
    num_documents: Annotated[int, typer.Option(min=1)] = 50,
    document_length: Annotated[int, typer.Option(min=1, help="Tokens per document, about.")] = 10_000,
    output_len: Annotated[int, typer.Option(min=1, help="Tokens per answer.")] = 100,
    repeat_count: Annotated[int, typer.Option(min=1, help="Queries per document.")] = 1,
    repeat_mode: Annotated[str, typer.Option(help="Order of the queries: tile, interleave or random.")] = "tile",
    port: Annotated[int, typer.Option(help="Port of the server on this machine.")] = 8000,
    max_inflight_requests: Annotated[int, typer.Option(min=1)] = 4,
    base_url: Annotated[str | None, typer.Option(help="Server elsewhere, such as http://host:8000.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Long documents, asked about once and then again: the benchmark of LMCache's P2P page, with its flags and lines.

    Run it against instance 1 and then, with the same flags, against instance 2: the warm-up round of the second shows
    what peers give.
    """
    from kvmesh.bench.long_doc_qa import MODES, LongDocQa, run_long_doc_qa

    if repeat_mode not in MODES:
        raise typer.BadParameter(f"{repeat_mode!r} is not one of {', '.join(MODES)}", param_hint="--repeat-mode")
    plan = LongDocQa(
        model=model,
        base_url=base_url or f"http://127.0.0.1:{port}",
        num_documents=num_documents,
        document_length=document_length,
        output_len=output_len,
        repeat_count=repeat_count,
        repeat_mode=repeat_mode,
        max_inflight_requests=max_inflight_requests,
    )
    raise typer.Exit(run_long_doc_qa(plan, as_json=as_json))


@bench_app.command("transfer")
def transfer(
    chunk_mb: Annotated[str, typer.Option(help="Chunk sizes in MiB, separated by commas.")] = "0.0625,1,2,8,32",
    batches: Annotated[str, typer.Option(help="Chunks per fetch, separated by commas.")] = "1,8,64",
    connections: Annotated[int, typer.Option(min=1, help="Connections per fetch, for tcp; threads, for shm.")] = 2,
    methods: Annotated[str, typer.Option(help="Only these, separated by commas.  [default: all]")] = "",
    links: Annotated[
        str, typer.Option(help="Also through rate-limited links of so many Mbit/s (root, iproute2).")
    ] = "1000,5000",
    plot: Annotated[Path | None, typer.Option(help="Write a chart as SVG into this file.")] = None,
    as_json: JsonFlag = False,
    quick: Annotated[bool, typer.Option("--quick", help="Two sizes, one batch, short turns, no links.")] = False,
) -> None:
    """Transports between two processes, beside a raw socket and a memory copy in the same run: GB/s and CPU per GB."""
    import msgspec
    from rich.console import Console

    from kvmesh.bench.transfer import METHODS, chart, run_transfer_benchmark

    sizes = [1.0, 8.0] if quick else numbers("--chunk-mb", chunk_mb, float, least=MIN_CHUNK_MIB)
    result = run_transfer_benchmark(
        chunk_sizes_bytes=[int(size * (1 << 20)) for size in sizes],
        batches=[8] if quick else numbers("--batches", batches, int, least=1),
        rounds=1 if quick else 3,
        connections=connections,
        methods=names("--methods", methods, METHODS) if methods else METHODS,
        links_mbit_s=[] if quick or not links else numbers("--links", links, float, least=1),
        console=None if as_json else Console(),
    )
    if plot is not None:
        plot.write_text(chart(result), encoding="utf-8")
    if as_json:
        typer.echo(msgspec.json.format(msgspec.json.encode(result)).decode())


@bench_app.command("idle")
def idle(
    seconds: Annotated[float, typer.Option(min=1, help="How long to watch.")] = 30.0,
    channel: Annotated[str, typer.Option(help="transfer_channel of both nodes.")] = "tcp",
    as_json: JsonFlag = False,
    quick: Annotated[bool, typer.Option("--quick", help="Five seconds.")] = False,
) -> None:
    """What an idle controller and two idle nodes cost: CPU and memory."""
    from kvmesh.bench.idle import run_idle

    raise typer.Exit(run_idle(5.0 if quick else seconds, channel, as_json=as_json))


@bench_app.command("controller")
def controller(
    instances: Annotated[int, typer.Option(min=2, help="Simulated instances.")] = 1000,
    chunks: Annotated[int, typer.Option(min=0, help="Chunks that each of them holds; all are different.")] = 3000,
    formats: Annotated[int, typer.Option(min=1, help="Formats: each instance hears of those of its own.")] = 20,
    events: Annotated[float, typer.Option(min=1, help="Publications and retractions per second, in all.")] = 5000.0,
    seconds: Annotated[float, typer.Option(min=1, help="How long.")] = 20.0,
    processes: Annotated[int, typer.Option(min=1, help="Processes of the swarm.")] = 2,
    pages: Annotated[int, typer.Option(min=0, help="Open web pages, where Playwright and Chromium are there.")] = 1,
    as_json: JsonFlag = False,
    quick: Annotated[bool, typer.Option("--quick", help="40 instances, 100 chunks, 200 events/s, 3 seconds.")] = False,
) -> None:
    """A controller with many simulated instances: memory, CPU, how soon news are visible, how quick API and page are.

    Each instance has real connections; an event is one message that publishes a chunk and retracts another.
    The exit status is 1 when a member was lost on the way.
    """
    from kvmesh.bench.controller import ControllerPlan, run_controller_benchmark
    from kvmesh.bench.swarm import SwarmPlan

    if quick:
        instances, chunks, formats, events, seconds, pages = 40, 100, 2, 200.0, 3.0, 0
    swarm = SwarmPlan(instances=instances, chunks=chunks, formats=min(formats, instances), processes=processes)
    plan = ControllerPlan(swarm, events, seconds, pages)
    raise typer.Exit(run_controller_benchmark(plan, as_json=as_json))


@bench_app.command("directory")
def directory(
    instances: Annotated[str, typer.Option(help="Numbers of simulated instances, with commas.")] = "10,100,1000",
    chunks: Annotated[int, typer.Option(min=1, help="Chunks that each of them holds; all are different.")] = 3000,
    formats: Annotated[int, typer.Option(min=1, help="Formats: an instance follows those of its own.")] = 20,
    events: Annotated[float, typer.Option(min=1, help="Changes per second, in all, at the largest number.")] = 10_000.0,
    seconds: Annotated[float, typer.Option(min=1, help="How long each is measured.")] = 5.0,
    directories: Annotated[str, typer.Option(help="controller, redis, or both with a comma.")] = "controller,redis",
    modes: Annotated[str, typer.Option(help="replica, query, or both with a comma.")] = "replica,query",
    plot: Annotated[
        Path | None, typer.Option(help="Also draw the growth (needs the `bench` extra): a .png file.")
    ] = None,
    as_json: JsonFlag = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="10 and 40 instances, 100 chunks, 200 changes/s, 2 s.")
    ] = False,
) -> None:
    """Controller and Redis, followed or asked, with more and more instances: memory, CPU, delays, full resync."""
    from kvmesh.bench.directory import DirectoryPlan, run_directory_benchmark

    sizes = tuple(numbers("--instances", instances, int, least=2))
    plan = DirectoryPlan(
        sizes=(10, 40) if quick else sizes,
        chunks=100 if quick else chunks,
        formats=2 if quick else formats,
        events_per_s=200.0 if quick else events,
        seconds=2.0 if quick else seconds,
        kinds=tuple(names("--directories", directories, ("controller", "redis"))),
        modes=tuple(names("--modes", modes, ("replica", "query"))),
    )
    raise typer.Exit(run_directory_benchmark(plan, as_json=as_json, plot=plot))


@bench_app.command("gate")
def gate(
    speeds: Annotated[str, typer.Option(help="Speeds of the link in Mbit/s, separated by commas.")] = "",
    requests: Annotated[int, typer.Option(min=3, help="Prompts per speed and way.")] = 12,
    as_json: JsonFlag = False,
    quick: Annotated[bool, typer.Option("--quick", help="Three speeds, few prompts.")] = False,
) -> None:
    """Fetch or compute: time to the end of prefill with the gate, always and never fetching, at each speed of a link.

    Needs root and iproute2. The exit status is 1 when the gate was more than 5 % slower than never fetching, or more
    than 10 % slower than the better of both, at any speed.
    """
    from kvmesh.bench.gate import SPEEDS_MBIT_S, run_gate

    wanted: Sequence[float] = [30, 80, 1000] if quick else SPEEDS_MBIT_S
    if speeds:
        wanted = numbers("--speeds", speeds, float, least=1)
    raise typer.Exit(run_gate(wanted, 6 if quick else requests, as_json=as_json))


@bench_app.command("holders")
def holders(
    counts: Annotated[str, typer.Option(help="Numbers of holders, separated by commas.")] = "1,2,4",
    mbit: Annotated[float, typer.Option(min=1, help="Speed of each holder's link in Mbit/s.")] = 400,
    repeats: Annotated[int, typer.Option(min=1, help="Fetches for each number.")] = 5,
    as_json: JsonFlag = False,
    quick: Annotated[bool, typer.Option("--quick", help="One and four holders, two fetches.")] = False,
) -> None:
    """One prompt from one holder and from several, each behind a link of its own. Needs root and iproute2."""
    from kvmesh.bench.holders import run_holders

    wanted = [1, 4] if quick else numbers("--counts", counts, int, least=1)
    raise typer.Exit(run_holders(wanted, mbit, 2 if quick else repeats, as_json=as_json))


@bench_app.command("chaos")
def chaos(
    quick: Annotated[bool, typer.Option("--quick", help="The most telling cells, in less than two minutes.")] = False,
    as_json: JsonFlag = False,
    only: Annotated[
        list[str] | None, typer.Option(help="Only this cell, such as link-cut or tcp/link-cut. May be repeated.")
    ] = None,
    channels: Annotated[str, typer.Option(help="Transports, separated by commas.")] = "tcp,nixl,shm",
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything that is random here.")] = 1,
    soak: Annotated[
        float | None, typer.Option(min=1, help="Instead: random faults for so many minutes, and nothing may grow.")
    ] = None,
    logs: Annotated[Path | None, typer.Option(help="Folder for log files.  [default: a temporary one]")] = None,
) -> None:
    """Do faults to real processes while requests run, for each transport: no wrong byte, no lost answer, all heals.

    The exit status is 1 when any cell failed. Cells that need root, iproute2 or NIXL say so where these are missing.
    """
    from kvmesh.bench.chaos import run_chaos, run_soak

    if soak is not None:
        raise typer.Exit(run_soak(minutes=soak, as_json=as_json, seed=seed, logs=logs))
    chosen = [channel.strip() for channel in channels.split(",")]
    raise typer.Exit(run_chaos(quick=quick, as_json=as_json, only=only or (), seed=seed, logs=logs, channels=chosen))
