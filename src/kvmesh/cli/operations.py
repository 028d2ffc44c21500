"""Starting operations, following them to their end, and showing them."""

from __future__ import annotations

import re
import secrets
import sys
import time
from typing import TYPE_CHECKING, Final
from urllib.parse import quote

import typer

from kvmesh.cli.shared import EXIT_NO, make_console, make_table, print_raw_json

if TYPE_CHECKING:
    from rich.console import Console, Group

    from kvmesh.client import ControllerApi
    from kvmesh.client.operations import Operation

PATH: Final = "/api/v1/operations"
WAIT_S: Final = 1.0
"""So long the controller may hold one answer back: the progress shown is at most so old."""
RETRY_S: Final = 1.0
PATIENCE_S: Final = 60.0
"""A controller that does not answer for so long while an operation is followed is given up."""
EXIT_INTERRUPTED: Final = 130
"""As shells have it for Ctrl-C."""
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_STYLES = {"done": "green", "partly": "yellow", "failed": "bold red"}


def parse_duration(text: str, option: str) -> int:
    """Seconds in `90s`, `10m`, `1h`, `7d` or `90`. Raises typer.BadParameter."""
    match = re.fullmatch(r"(\d{1,9})\s*([smhd]?)", text.strip())
    if match is None or int(match[1]) == 0:
        raise typer.BadParameter(f"{text!r}: expected a time such as 90s, 10m, 1h or 7d", param_hint=option)
    return int(match[1]) * _UNITS[match[2] or "s"]


def ask_first(question: str, *, yes: bool) -> None:
    """Have a person confirm; a script has to say --yes. Raises typer.Exit or typer.BadParameter."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise typer.BadParameter(f"{question} nobody is there to answer: say --yes")
    if not typer.confirm(question):
        raise typer.Exit(EXIT_NO)


def start(api: ControllerApi, body: dict[str, object], within: str, *, wait: bool, as_json: bool) -> int:
    """Start an operation and, with `wait`, follow it; returns the exit status. Raises KVMeshError."""
    from kvmesh.client.operations import Operation

    sent = {name: value for name, value in body.items() if value is not None}
    sent["timeout_s"] = parse_duration(within, "--within")
    raw = api.change("POST", PATH, sent, idempotency_key=secrets.token_hex(16))
    operation = api.decode(raw, Operation)
    if wait:
        return follow(api, operation.id, as_json=as_json, known=operation)
    if as_json:
        print_raw_json(raw)
    else:
        console = make_console()
        console.print(f"{operation.id} {operation.state}: {operation.summary or operation.kind}")
        console.print(f"kvmesh ops show {operation.id} --wait")
    return EXIT_NO if operation.state == "failed" else 0


def follow(api: ControllerApi, operation_id: str, *, as_json: bool, known: Operation | None = None) -> int:
    """Show progress until it has ended; returns the exit status. Raises KVMeshError.

    Progress is drawn on standard error, and only on a terminal, so that standard output has the result alone.
    """
    import contextlib

    from rich.live import Live

    console = make_console(stderr=True)
    operation = known or _get(api, operation_id)
    live = Live(console=console, transient=True, auto_refresh=False) if console.is_terminal else None
    try:
        with live or contextlib.nullcontext():
            while not operation.has_ended:
                if live is not None:
                    live.update(_progress(operation), refresh=True)
                operation = _get_patiently(api, operation_id)
    except KeyboardInterrupt:
        typer.echo(f"\nit goes on; to follow it: kvmesh ops show {operation_id} --wait", err=True)
        typer.echo(f"to end it: kvmesh ops cancel {operation_id}", err=True)
        return EXIT_INTERRUPTED
    return show_operation(api, operation_id, as_json=as_json)


def show_operation(api: ControllerApi, operation_id: str, *, as_json: bool, cancel: bool = False) -> int:
    """Print one operation, after ending it with `cancel`; returns the exit status. Raises KVMeshError."""
    from kvmesh.client.operations import Operation

    path = _path(operation_id)
    raw = api.change("DELETE", path) if cancel else api.get_raw(path)
    operation = api.decode(raw, Operation)
    if as_json:
        print_raw_json(raw)
    else:
        _print(make_console(), operation)
    return EXIT_NO if operation.state in {"partly", "failed"} and not cancel else 0


def list_operations(api: ControllerApi, state: str | None, kind: str | None, limit: int, *, as_json: bool) -> None:
    """Print the last operations. Raises KVMeshError."""
    from rich.text import Text

    from kvmesh.client.operations import Operations
    from kvmesh.units import age

    raw = api.get_raw(PATH, state=state, kind=kind, limit=limit)
    if as_json:
        print_raw_json(raw)
        return
    console = make_console()
    listed = api.decode(raw, Operations).operations
    if not listed:
        console.print("no operations")
        return
    table = make_table("id", "kind", "state", "started", "chunks", "summary", right=("chunks",))
    for one in listed:
        table.add_row(
            one.id,
            one.kind,
            Text(one.state, style=_STYLES.get(one.state, "")),
            age(one.created_age_s),
            f"{one.chunks_done}/{one.chunks_total}",
            one.error.message if one.error else one.summary,
        )
    console.print(table)


def _get(api: ControllerApi, operation_id: str, wait_s: float | None = None) -> Operation:
    from kvmesh.client.operations import Operation

    return api.get(_path(operation_id), Operation, wait_s=wait_s)


def _get_patiently(api: ControllerApi, operation_id: str) -> Operation:
    """The next state. A controller that is silent for a while does not end the following; one that has forgotten the
    operation (because it was restarted) does. Raises KVMeshError.
    """
    from kvmesh.errors import DirectoryUnavailableError

    since_s = time.monotonic()
    while True:
        try:
            return _get(api, operation_id, WAIT_S)
        except DirectoryUnavailableError:  # noqa: PERF203 - each try is an answer of up to a second
            if time.monotonic() - since_s > PATIENCE_S:
                raise
            time.sleep(RETRY_S)


def _path(operation_id: str) -> str:
    return f"{PATH}/{quote(operation_id, safe='')}"


def _progress(operation: Operation) -> Group:
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    from kvmesh.units import size

    grid = Table.grid(padding=(0, 1))
    for part in operation.instances:
        grid.add_row(
            part.instance_id,
            part.action,
            ProgressBar(total=max(part.chunks_total, 1), completed=part.chunks_done, width=30),
            f"{part.chunks_done}/{part.chunks_total}",
            size(part.bytes_done) if part.bytes_done else "",
            Text(part.note or part.state, style="dim"),
        )
    return Group(Text(operation.summary or f"{operation.kind}: {operation.state}", style="bold"), grid)


def _print(console: Console, operation: Operation) -> None:
    from rich.text import Text

    from kvmesh.units import age, size

    line = Text(f"{operation.kind} ", style="bold")
    line.append(operation.state, style=_STYLES.get(operation.state, ""))
    moved = f", {size(operation.bytes_done)}" if operation.bytes_done else ""
    line.append(
        f": {operation.chunks_done} of {operation.chunks_total} chunks{moved}; started {age(operation.created_age_s)}, "
        f"id {operation.id}",
        style="not bold",
    )
    console.print(line)
    for part in operation.instances:
        told = ", ".join(f"{outcome} {chunks}" for outcome, chunks in part.outcomes.items())
        line = Text(f"  {part.instance_id}: {part.action} ")
        line.append(part.state, style=_STYLES.get(part.state, ""))
        line.append("".join(f"; {text}" for text in (told, part.note) if text))
        console.print(line)
        if part.error is not None:
            console.print(Text(f"    {part.error.message}", style="red"))
            if part.error.hint:
                console.print(f"    {part.error.hint}")
    told_already = {part.error.message for part in operation.instances if part.error is not None}
    if operation.error is not None and operation.error.message not in told_already:
        console.print(Text(f"  {operation.error.message}", style="red"))
        if operation.error.hint:
            console.print(f"  {operation.error.hint}")
