"""`kvmesh router` and its benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvmesh.cli.lists import numbers
from kvmesh.errors import StartupError

SERVER, ENGINES, LIMITS, KV = "Address", "Engines", "Limits and time-outs", "Policy kv and other policies"


def register(app: typer.Typer, bench_app: typer.Typer, *, panel: str) -> None:
    """Add the commands of this file; `panel` is that of the router in the help."""
    app.command("router", rich_help_panel=panel)(router)
    bench_app.command("router")(bench_router)
    bench_app.command("trace")(bench_trace)


def router(
    config: Annotated[
        Path | None, typer.Option(help="YAML file with any of these, and more: docs/router.md. Flags go over it.")
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="Address to bind.  [default: localhost]", rich_help_panel=SERVER)
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="Port to bind; 0: any free one.  [default: 8080]", rich_help_panel=SERVER)
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            help="roundrobin (in turns), leastload (least work), session (the same engine for the same session), "
            "prefix (the engine that has seen a similar beginning), kv (by what the engines hold).  "
            "[default: roundrobin]"
        ),
    ] = None,
    backends: Annotated[
        str | None,
        typer.Option(
            help="Engines, separated by commas: http://a:8000,http://b:8000. For policy kv with their instance ids: "
            "a=http://a:8000,b=http://b:8000.",
            rich_help_panel=ENGINES,
        ),
    ] = None,
    kubernetes_selector: Annotated[
        str | None,
        typer.Option(help="Instead: all ready pods with these labels, as app=vllm.", rich_help_panel=ENGINES),
    ] = None,
    kubernetes_namespace: Annotated[
        str | None, typer.Option(help="Of the pods.  [default: the router's own]", rich_help_panel=ENGINES)
    ] = None,
    kubernetes_port: Annotated[
        str | None,
        typer.Option(help="The engines' port: number or name.  [default: 8000]", rich_help_panel=ENGINES),
    ] = None,
    kubernetes_api: Annotated[
        str | None, typer.Option(help="API server.  [default: the one that pods are told of]", rich_help_panel=ENGINES)
    ] = None,
    health_interval_s: Annotated[
        float | None,
        typer.Option("--health-interval", help="Seconds between health checks.  [default: 5]", rich_help_panel=ENGINES),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            help="Key with which the router asks engines for their models, if they want one. Requests carry the "
            "client's own key.",
            rich_help_panel=ENGINES,
        ),
    ] = None,
    retries: Annotated[
        int | None,
        typer.Option(help="Other engines tried before the first byte.  [default: 2]", rich_help_panel=LIMITS),
    ] = None,
    max_requests: Annotated[
        int | None, typer.Option(help="At a time; more get 503.  [default: 4096]", rich_help_panel=LIMITS)
    ] = None,
    max_requests_per_backend: Annotated[
        int | None, typer.Option(help="At a time; 0: no limit.  [default: 0]", rich_help_panel=LIMITS)
    ] = None,
    max_body_bytes: Annotated[
        int | None, typer.Option(help="Of a request; longer ones get 413.  [default: 64 MiB]", rich_help_panel=LIMITS)
    ] = None,
    first_byte_timeout_s: Annotated[
        float | None,
        typer.Option("--first-byte-timeout", help="Seconds.  [default: 600]", rich_help_panel=LIMITS),
    ] = None,
    idle_timeout_s: Annotated[
        float | None,
        typer.Option("--idle-timeout", help="Seconds between parts.  [default: 300]", rich_help_panel=LIMITS),
    ] = None,
    controller_url: Annotated[
        str | None,
        typer.Option(help="The controller's page, as http://controller:9000.", rich_help_panel=KV),
    ] = None,
    kv_fetch_cost: Annotated[
        float | None,
        typer.Option(
            help="Cost of pulling a token's KV from a peer, of computing it; 1 if they do not share.  [default: 0.3]",
            rich_help_panel=KV,
        ),
    ] = None,
    session_header: Annotated[
        str | None,
        typer.Option(
            help="Names a session; without it prompt_cache_key and user do.  [default: x-session-id]",
            rich_help_panel=KV,
        ),
    ] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning, error.  [default: info]")] = None,
) -> None:
    """Run one OpenAI-compatible address in front of many engines.

    For example:

    ```text
    kvmesh router --backends http://localhost:8000,http://localhost:8001
    kvmesh router --kubernetes-selector app=vllm --policy kv --controller-url http://controller:9000
    ```

    Streams without buffering, asks another engine when one fails before its first byte, and forgets pods as they go.
    Every path goes through, except its own: /healthz, /readyz, /health, /metrics, /kvmesh/backends, and /v1/models,
    which lists what all engines serve.
    """
    given = {name: value for name, value in locals().items() if name != "config"}
    flags = {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}
    try:
        from kvmesh.router.config import make_router_config
        from kvmesh.router.process import run_router
    except ModuleNotFoundError as error:
        raise StartupError(
            "router", "the packages of its extra", f"no module {error.name}", "pip install 'kvmesh[router]'"
        ) from None
    run_router(make_router_config(path=config, flags=flags))


def bench_router(
    seconds: Annotated[float, typer.Option(min=0.5, help="Length of each measurement.")] = 10.0,
    compare: Annotated[
        Path | None, typer.Option(help="Command of another router (PyPI vllm-router) to measure beside ours.")
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Request trace (JSON lines) for comparing the policies in a simulation.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Short measurements, part of the trace.")] = False,
) -> None:
    """What the router costs: requests per second and added latency, beside a direct connection in the same run.

    The router runs on one core, the engine (a program that only streams) and the client on the others. With `--trace`
    also what the policies make of a real workload.
    """
    from kvmesh.bench.router import run_router_benchmark

    raise typer.Exit(
        run_router_benchmark(
            seconds=2.0 if quick else seconds, compare=compare, trace=trace, as_json=as_json, quick=quick
        )
    )


def bench_trace(
    trace: Annotated[Path, typer.Argument(help="Request trace: JSON lines with timestamp, lengths and hash_ids.")],
    instances: Annotated[str, typer.Option(help="Numbers of instances, separated by commas.")] = "8",
    pool_gib: Annotated[str, typer.Option(help="Host pools in GiB per instance; 0: unlimited.")] = "50,0",
    policies: Annotated[
        str, typer.Option(help="Routing policies, separated by commas.")
    ] = "roundrobin,leastload,prefix,kv",
    link_gbit: Annotated[float, typer.Option(min=0.001, help="Link of an instance, in Gbit/s.")] = 25.0,
    prefill: Annotated[float, typer.Option(min=1, help="Prefill of an instance, in tokens/s.")] = 20_000.0,
    kv_bytes: Annotated[int, typer.Option(min=1, help="KV bytes per token.")] = 131_072,
    speed: Annotated[float, typer.Option(min=0.001, help="Replay so many times as fast.")] = 1.0,
    copies: Annotated[
        int, typer.Option(min=1, help="So many tenants with the same trace, each with its own text.")
    ] = 1,
    limit: Annotated[int, typer.Option(min=0, help="Only the first requests; 0: all.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="The first 2,000 requests, one pool size.")] = False,
) -> None:
    """Replay a request trace in a simulation: hit rates, bytes moved and time to the first token, sharing on and off.

    The clock is virtual; the routing policies are the router's own.
    """
    from kvmesh.bench.trace import TraceRun, run_trace

    run = TraceRun(
        path=trace,
        instances=numbers("--instances", instances, int, least=1),
        pool_gib=numbers("--pool-gib", pool_gib, float, least=0)[: 1 if quick else None],
        policies=policies.split(","),
        link_gbit=link_gbit,
        prefill_tokens_per_s=prefill,
        kv_bytes_per_token=kv_bytes,
        speed=speed,
        copies=copies,
        limit=2000 if quick else limit,
    )
    raise typer.Exit(run_trace(run, as_json=as_json))
