"""Benchmarks that start real vLLM servers on this machine's CPUs: long-doc-pair, trace-vllm, vllm-path."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvmesh.cli.shared import JsonFlag

if TYPE_CHECKING:
    from kvmesh.models import TinyShape

LogsOption = Annotated[
    Path | None, typer.Option(help="Folder for log files and configuration.  [default: a temporary one]")
]
ShapeOption = Annotated[
    str, typer.Option(help="Random Llama: tiny, thin (8 KiB of KV per token in bfloat16) or bench (32 KiB).")
]
ChannelOption = Annotated[str, typer.Option(help="transfer_channel of the instances.")]


def register(bench_app: typer.Typer) -> None:
    """Make them commands of `kvmesh bench`."""
    bench_app.command("long-doc-pair")(bench_long_doc_pair)
    bench_app.command("trace-vllm")(bench_trace_vllm)
    bench_app.command("vllm-path")(bench_vllm_path)


def bench_long_doc_pair(
    urls: Annotated[
        str, typer.Option(help="Two servers that run already and share, separated by a comma; also give --model.")
    ] = "",
    model: Annotated[str, typer.Option(help="With --urls: the model's name as the servers know it.")] = "model",
    shape: ShapeOption = "thin",
    channel: ChannelOption = "auto",
    num_documents: Annotated[int, typer.Option(min=1)] = 10,
    document_length: Annotated[int, typer.Option(min=1, help="Tokens per document, about.")] = 4000,
    output_len: Annotated[int, typer.Option(min=1, help="Tokens per answer.")] = 10,
    repeat_count: Annotated[int, typer.Option(min=1, help="Queries per document.")] = 1,
    repeat_mode: Annotated[str, typer.Option(help="Order of the queries: tile, interleave or random.")] = "tile",
    max_inflight_requests: Annotated[int, typer.Option(min=1)] = 2,
    plot: Annotated[Path | None, typer.Option(help="Also draw it (needs the `bench` extra): a .png or .svg.")] = None,
    logs: LogsOption = None,
    as_json: JsonFlag = False,
    quick: Annotated[bool, typer.Option("--quick", help="Four documents of 2,000 tokens.")] = False,
) -> None:
    """long-doc-qa against instance 1, then instance 2, with sharing and without, and what the second one gains.

    Without --urls, two vLLM servers are started here on the CPU, twice. The exit status is 1 when a request failed, or
    when instance 2 pulled nothing although it shares.

    Examples: kvmesh bench long-doc-pair --plot gains.png
    or kvmesh bench long-doc-pair --urls http://a:8010,http://b:8011 --model meta-llama/Meta-Llama-3.1-8B-Instruct
    --num-documents 50 --document-length 10000 --output-len 100 --max-inflight-requests 4
    """
    from kvmesh.bench.long_doc_pair import run_long_doc_pair
    from kvmesh.bench.long_doc_qa import MODES, LongDocQa
    from kvmesh.bench.vllm_servers import ServerPlan
    from kvmesh.models import make_tiny_llama

    if repeat_mode not in MODES:
        raise typer.BadParameter(f"{repeat_mode!r} is not one of {', '.join(MODES)}", param_hint="--repeat-mode")
    running = [url.strip().rstrip("/") for url in urls.split(",") if url.strip()]
    if running and len(running) != 2:
        raise typer.BadParameter(f"{len(running)} URLs; two are compared", param_hint="--urls")
    length = 2000 if quick else document_length
    plan = LongDocQa(
        model=model,
        base_url="",
        num_documents=4 if quick else num_documents,
        document_length=length,
        output_len=output_len,
        repeat_count=repeat_count,
        repeat_mode=repeat_mode,
        max_inflight_requests=max_inflight_requests,
    )
    servers = None
    if not running:
        servers = ServerPlan(
            make_tiny_llama(shape=_shape(shape)),
            max_model_len=length + length // 8 + output_len + 64,
            config={"transfer_channel": channel, "max_local_cpu_size": 4},
        )
    raise typer.Exit(run_long_doc_pair(plan, servers, running, logs=logs, plot=plot, as_json=as_json))


def bench_trace_vllm(
    trace: Annotated[Path, typer.Argument(help="Request trace: JSON lines with timestamp, lengths and hash_ids.")],
    instances: Annotated[int, typer.Option(min=2, help="Servers.")] = 2,
    pool_gib: Annotated[float, typer.Option(min=0.01, help="Host pool of each, in GiB.")] = 2.0,
    one_of: Annotated[int, typer.Option(min=1, help="Of so many conversations, replay one.")] = 60,
    limit: Annotated[int, typer.Option(min=0, help="So many requests at most; 0: all.")] = 120,
    shrink: Annotated[int, typer.Option(help="Divide all lengths by this: 1, 2, 4, 8 or 16.")] = 8,
    speed: Annotated[float, typer.Option(min=0.001, help="Replay so many times as fast.")] = 20.0,
    shape: ShapeOption = "thin",
    channel: ChannelOption = "auto",
    logs: LogsOption = None,
    as_json: JsonFlag = False,
    quick: Annotated[bool, typer.Option("--quick", help="The first 30 requests.")] = False,
) -> None:
    """Replay a slice of a request trace on real vLLM servers on this machine's CPUs, with sharing and without.

    Prints what `kvmesh bench trace` prints of its simulation: hit rates, bytes moved, time to the first token; below it
    what the simulator says of the same slice at the rates that the servers measured. The exit status is 1 when a
    request failed.
    """
    from kvmesh.bench.trace_vllm import TraceSlice, run_trace_vllm
    from kvmesh.bench.vllm_servers import ServerPlan
    from kvmesh.models import make_tiny_llama

    chosen = _shape(shape)
    part = TraceSlice(trace, one_of=one_of, limit=30 if quick else limit, shrink=shrink, speed=speed)
    servers = ServerPlan(make_tiny_llama(shape=chosen), count=instances, config={"transfer_channel": channel})
    kv_bytes = chosen.kv_bytes_per_token(2)
    raise typer.Exit(run_trace_vllm(part, servers, pool_gib, kv_bytes, as_json=as_json, logs=logs))


def bench_vllm_path(
    visible: Annotated[int, typer.Option(min=1000, help="Chunks that others are made to hold.")] = 1_000_000,
    requests: Annotated[int, typer.Option(min=4, help="Prompts; the first two warm up.")] = 26,
    publishes: Annotated[int, typer.Option(min=10, help="Chunks published one after the other.")] = 300,
    logs: LogsOption = None,
    as_json: JsonFlag = False,
    quick: Annotated[bool, typer.Option("--quick", help="100,000 chunks, 8 prompts, 50 publications.")] = False,
) -> None:
    """What kvmesh costs vLLM's scheduler thread, per lookup and per step, and how soon peers know what is published.

    vLLM runs on this machine's CPU with a model of next to no arithmetic: without a connector, with the host pool alone
    and sharing. The exit status is 1 when a lookup takes more than 5 µs per chunk.
    """
    from kvmesh.bench.vllm_path import PathPlan, run_vllm_path

    plan = PathPlan(visible=visible, requests=requests, publishes=publishes)
    if quick:
        plan = PathPlan(visible=100_000, requests=8, publishes=50)
    raise typer.Exit(run_vllm_path(plan, as_json=as_json, logs=logs))


def _shape(name: str) -> TinyShape:
    from kvmesh.models import BENCH, THIN, TINY

    shapes = {"tiny": TINY, "thin": THIN, "bench": BENCH}
    if name not in shapes:
        raise typer.BadParameter(f"{name!r} is not one of {', '.join(shapes)}", param_hint="--shape")
    return shapes[name]
