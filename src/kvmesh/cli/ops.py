"""`kvmesh ops`: the operations, one command each. What they have in common is in `operations`."""

from __future__ import annotations

from typing import Annotated

import typer

from kvmesh.cli.chunks import (
    KeysFileOption,
    KeysOption,
    SaltOption,
    TextFileOption,
    TextOption,
    TokensFileOption,
    chosen_chunks,
)
from kvmesh.cli.complete import complete_instance
from kvmesh.cli.node_drain import ANSWER_S, drain_node
from kvmesh.cli.operations import (
    ask_first,
    follow,
    list_operations,
    parse_duration,
    show_operation,
    start,
)
from kvmesh.cli.shared import (
    DEFAULT_CONTROLLER,
    CaOption,
    ControllerOption,
    JsonFlag,
    KeyOption,
    open_api,
)

ops_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Operate the cluster: clear, pin, unpin, warm, move, drain, resume; and look after what is under way.\n\n"
    "Each command starts an operation at the controller and, unless told otherwise, follows it to its end. Ctrl-C ends "
    "the following, not the operation. Exit status: 0 done (or, with `--no-wait`, accepted), 1 partly done or failed, "
    "3 no controller answers, 4 the controller refuses.",
)

InstanceArgument = Annotated[
    str, typer.Argument(metavar="INSTANCE", help="Id of a member.", autocompletion=complete_instance)
]
InstanceOption = Annotated[
    str | None,
    typer.Option(metavar="ID", help="Only this instance.  [default: all]", autocompletion=complete_instance),
]
WaitFlag = Annotated[bool, typer.Option("--wait/--no-wait", help="Follow it to its end.")]
WithinOption = Annotated[str, typer.Option("--within", metavar="TIME", help="Give up after so long: 90s, 10m, 1h.")]
YesFlag = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask first.")]
StateOption = Annotated[str | None, typer.Option(help="Only pending, running, done, partly or failed ones.")]


@ops_app.command()
def clear(
    instance: InstanceOption = None,
    keys: KeysOption = None,
    keys_file: KeysFileOption = None,
    tokens_file: TokensFileOption = None,
    text: TextOption = None,
    text_file: TextFileOption = None,
    cache_salt: SaltOption = None,
    yes: YesFlag = False,
    within: WithinOption = "2m",
    wait: WaitFlag = True,
    controller: ControllerOption = DEFAULT_CONTROLLER,
    ca: CaOption = None,
    cluster_key_file: KeyOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Drop chunks from one instance or from all: named ones, or everything.

    For example:

    ```text
    kvmesh ops clear --instance engine-a
    kvmesh ops clear --text-file old-prompt.txt --yes
    kvmesh ops clear                                  # everything, everywhere: asks first
    ```

    KV that is gone is computed again; no request fails. Chunks that are being read at this moment stay ("busy").
    """
    chunks = chosen_chunks(keys, keys_file, tokens_file, text, text_file, cache_salt)
    ask_first(f"clear {'some chunks' if chunks else 'everything'} on {instance or 'every instance'}?", yes=yes)
    with open_api(controller, ca, cluster_key_file) as api:
        body = {"kind": "clear", "instance": instance, **chunks}
        raise typer.Exit(start(api, body, within, wait=wait, as_json=as_json))


@ops_app.command()
def pin(
    instance: InstanceOption = None,
    keys: KeysOption = None,
    keys_file: KeysFileOption = None,
    tokens_file: TokensFileOption = None,
    text: TextOption = None,
    text_file: TextFileOption = None,
    cache_salt: SaltOption = None,
    hold: Annotated[str, typer.Option("--for", metavar="TIME", help="How long: 90s, 10m, 1h, 7d.")] = "1h",
    within: WithinOption = "2m",
    wait: WaitFlag = True,
    controller: ControllerOption = DEFAULT_CONTROLLER,
    ca: CaOption = None,
    cluster_key_file: KeyOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Keep chunks from being evicted for a time.

    For example:

    ```text
    kvmesh ops pin --text-file system-prompt.txt --for 8h
    kvmesh ops pin --instance engine-a --keys-file keys.txt --for 30m
    ```
    """
    chunks = chosen_chunks(keys, keys_file, tokens_file, text, text_file, cache_salt)
    if not chunks:
        raise typer.BadParameter("say which chunks: --keys, --keys-file, --tokens-file, --text or --text-file")
    seconds = parse_duration(hold, "--for")
    with open_api(controller, ca, cluster_key_file) as api:
        body = {"kind": "pin", "instance": instance, "seconds": seconds, **chunks}
        raise typer.Exit(start(api, body, within, wait=wait, as_json=as_json))


@ops_app.command()
def unpin(
    instance: InstanceOption = None,
    keys: KeysOption = None,
    keys_file: KeysFileOption = None,
    tokens_file: TokensFileOption = None,
    text: TextOption = None,
    text_file: TextFileOption = None,
    cache_salt: SaltOption = None,
    within: WithinOption = "2m",
    wait: WaitFlag = True,
    controller: ControllerOption = DEFAULT_CONTROLLER,
    ca: CaOption = None,
    cluster_key_file: KeyOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Let pinned chunks be evicted again: named ones, or all.

    For example:

    ```text
    kvmesh ops unpin --text-file system-prompt.txt
    ```
    """
    chunks = chosen_chunks(keys, keys_file, tokens_file, text, text_file, cache_salt)
    with open_api(controller, ca, cluster_key_file) as api:
        body = {"kind": "unpin", "instance": instance, **chunks}
        raise typer.Exit(start(api, body, within, wait=wait, as_json=as_json))


@ops_app.command()
def warm(
    instance: InstanceArgument,
    hottest: Annotated[
        int | None, typer.Option(min=1, metavar="CHUNKS", help="The most used chunks of the others.")
    ] = None,
    source: Annotated[
        list[str] | None,
        typer.Option(
            "--from",
            metavar="ID",
            help="Where --hottest looks. May be repeated.  [default: everywhere]",
            autocompletion=complete_instance,
        ),
    ] = None,
    keys: KeysOption = None,
    keys_file: KeysFileOption = None,
    tokens_file: TokensFileOption = None,
    text: TextOption = None,
    text_file: TextFileOption = None,
    cache_salt: SaltOption = None,
    within: WithinOption = "10m",
    wait: WaitFlag = True,
    controller: ControllerOption = DEFAULT_CONTROLLER,
    ca: CaOption = None,
    cluster_key_file: KeyOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Have an instance pull chunks from the others before it takes traffic.

    For example:

    ```text
    kvmesh ops warm engine-c --hottest 2000
    kvmesh ops warm engine-c --hottest 500 --from engine-a
    kvmesh ops warm engine-c --text-file system-prompt.txt --within 1h
    ```
    """
    chunks = chosen_chunks(keys, keys_file, tokens_file, text, text_file, cache_salt)
    if bool(chunks) == (hottest is not None):
        raise typer.BadParameter("say which chunks: either --hottest, or keys, tokens or text")
    if source and hottest is None:
        raise typer.BadParameter("--from goes with --hottest")
    body: dict[str, object] = {"kind": "warm", "instance": instance, **chunks}
    body |= {} if hottest is None else {"hottest": hottest}
    body |= {"sources": source} if source else {}
    with open_api(controller, ca, cluster_key_file) as api:
        raise typer.Exit(start(api, body, within, wait=wait, as_json=as_json))


@ops_app.command()
def move(
    giver: Annotated[str, typer.Argument(metavar="FROM", help="Who gives.", autocompletion=complete_instance)],
    taker: Annotated[str, typer.Argument(metavar="TO", help="Who takes.", autocompletion=complete_instance)],
    keys: KeysOption = None,
    keys_file: KeysFileOption = None,
    tokens_file: TokensFileOption = None,
    text: TextOption = None,
    text_file: TextFileOption = None,
    cache_salt: SaltOption = None,
    within: WithinOption = "10m",
    wait: WaitFlag = True,
    controller: ControllerOption = DEFAULT_CONTROLLER,
    ca: CaOption = None,
    cluster_key_file: KeyOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Move chunks from one instance to another: the one pulls them, then the other clears them.

    For example:

    ```text
    kvmesh ops move engine-a engine-b
    kvmesh ops move engine-a engine-b --text-file tenant-prompt.txt --cache-salt tenant-7
    ```
    """
    chunks = chosen_chunks(keys, keys_file, tokens_file, text, text_file, cache_salt)
    with open_api(controller, ca, cluster_key_file) as api:
        body = {"kind": "move", "from": giver, "to": taker, **chunks}
        raise typer.Exit(start(api, body, within, wait=wait, as_json=as_json))


@ops_app.command()
def drain(
    instance: InstanceArgument,
    hand_over: Annotated[
        int | None,
        typer.Option(min=0, metavar="CHUNKS", help="Most hot chunks that others take over; 0: none."),
    ] = None,
    stay: Annotated[bool, typer.Option("--stay", help="Do not leave the cluster (see resume).")] = False,
    node: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="Without a controller: the admin port of the instance's own node, which does it all."
        ),
    ] = None,
    yes: YesFlag = False,
    within: WithinOption = "10m",
    wait: WaitFlag = True,
    controller: ControllerOption = DEFAULT_CONTROLLER,
    ca: CaOption = None,
    cluster_key_file: KeyOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Take an instance out: it stops publishing and fetching, others take over its hot chunks, then it leaves.

    For example:

    ```text
    kvmesh ops drain engine-a --yes && kubectl delete pod engine-a
    kvmesh ops drain engine-a --stay      # kvmesh ops resume engine-a undoes it
    kvmesh ops drain engine-a --yes --node http://127.0.0.1:8500     # with Redis or static_peers as the directory
    ```

    Its engine goes on serving requests from its own pool.
    """
    ask_first(f"drain {instance}" + ("?" if stay else ", and have it leave?"), yes=yes)
    if node is not None:
        with open_api(node, ca, cluster_key_file, parse_duration(within, "--within") + ANSWER_S, what="node") as api:
            raise typer.Exit(drain_node(api, instance, hand_over, within, leave=not stay, as_json=as_json))
    body: dict[str, object] = {"kind": "drain", "instance": instance, "leave": not stay}
    body |= {} if hand_over is None else {"hand_over": hand_over}
    with open_api(controller, ca, cluster_key_file) as api:
        raise typer.Exit(start(api, body, within, wait=wait, as_json=as_json))


@ops_app.command()
def resume(
    instance: InstanceArgument,
    within: WithinOption = "2m",
    wait: WaitFlag = True,
    controller: ControllerOption = DEFAULT_CONTROLLER,
    ca: CaOption = None,
    cluster_key_file: KeyOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Undo `drain --stay`: the instance publishes and fetches again.

    For example:

    ```text
    kvmesh ops resume engine-a
    ```
    """
    with open_api(controller, ca, cluster_key_file) as api:
        body: dict[str, object] = {"kind": "resume", "instance": instance}
        raise typer.Exit(start(api, body, within, wait=wait, as_json=as_json))


@ops_app.command("list")
def list_(
    state: StateOption = None,
    kind: Annotated[str | None, typer.Option(help="Only these: clear, pin, warm, ...")] = None,
    limit: Annotated[int, typer.Option(min=1, max=500)] = 20,
    controller: ControllerOption = DEFAULT_CONTROLLER,
    ca: CaOption = None,
    as_json: JsonFlag = False,
) -> None:
    """List operations, newest first.

    For example:

    ```text
    kvmesh ops list --state running
    kvmesh ops list --json | jq '.operations[] | select(.state == "failed").id'
    ```
    """
    with open_api(controller, ca) as api:
        list_operations(api, state, kind, limit, as_json=as_json)


@ops_app.command()
def show(
    operation_id: Annotated[str, typer.Argument(metavar="ID", help="Id of an operation.")],
    wait: Annotated[bool, typer.Option("--wait", help="Follow it to its end.")] = False,
    controller: ControllerOption = DEFAULT_CONTROLLER,
    ca: CaOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Show one operation, instance by instance.

    For example:

    ```text
    kvmesh ops show 9f2c4e0d
    kvmesh ops show 9f2c4e0d --wait && echo done
    ```
    """
    with open_api(controller, ca) as api:
        if wait:
            raise typer.Exit(follow(api, operation_id, as_json=as_json))
        raise typer.Exit(show_operation(api, operation_id, as_json=as_json))


@ops_app.command()
def cancel(
    operation_id: Annotated[str, typer.Argument(metavar="ID", help="Id of an operation.")],
    controller: ControllerOption = DEFAULT_CONTROLLER,
    ca: CaOption = None,
    cluster_key_file: KeyOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Give up what an operation has not done yet. What it has done stays.

    For example:

    ```text
    kvmesh ops cancel 9f2c4e0d
    ```
    """
    with open_api(controller, ca, cluster_key_file) as api:
        raise typer.Exit(show_operation(api, operation_id, as_json=as_json, cancel=True))
