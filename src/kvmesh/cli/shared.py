"""What the commands that ask a controller have in common: options, exit statuses, consoles."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from kvmesh.config.sources import CONTROLLER_CA_VARIABLE, CONTROLLER_VARIABLE

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from kvmesh.client import ControllerApi

EXIT_NO: Final = 1
"""The command worked, and the answer is no: problems found, nothing held, an operation failed; or any other error."""
EXIT_USAGE: Final = 2
"""A wrong command line, as Typer ends by itself."""
EXIT_UNREACHABLE: Final = 3
"""No controller answered."""
EXIT_REFUSED: Final = 4
"""The controller answered, and would not do it: unknown instance, missing or wrong cluster key."""

EXIT_STATUSES: Final = (
    "Exit status: 0 done, 1 the answer is no (or something failed), 2 wrong command line, 3 no controller answers, "
    "4 the controller refuses."
)

DEFAULT_CONTROLLER: Final = "127.0.0.1:9000"
WIDE: Final = 200
"""Columns of a table that goes into a file or a pipe: nothing is to be cut off there."""

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
ControllerOption = Annotated[
    str,
    typer.Option(
        "--controller",
        envvar=CONTROLLER_VARIABLE,
        metavar="HOST:PORT|URL",
        help="HTTP address of the controller; https:// in front where it has a certificate.",
    ),
]
CaOption = Annotated[
    Path | None,
    typer.Option(
        "--ca", envvar=CONTROLLER_CA_VARIABLE, metavar="FILE", help="CA of the controller's certificate (PEM)."
    ),
]
KeyOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="The cluster's key, for what changes something; or put it into KVMESH_CLUSTER_KEY."
    ),
]


@contextlib.contextmanager
def open_api(
    controller: str,
    ca: Path | None,
    key_file: Path | None = None,
    timeout_s: float | None = None,
    *,
    what: str = "controller",
) -> Iterator[ControllerApi]:
    """The controller (or a node's admin port) that the options name. Raises ConfigError; nothing is asked yet."""
    from kvmesh.cli.key import find_token
    from kvmesh.client import ControllerApi, ControllerTarget
    from kvmesh.client.http import TIMEOUT_S

    target = ControllerTarget.parse(controller, ca, what)
    api = ControllerApi(target, token=lambda: find_token(key_file), timeout_s=timeout_s or TIMEOUT_S)
    with contextlib.closing(api):
        yield api


def exit_status(error: Exception) -> int:
    """What the command ends with when this was raised."""
    from kvmesh.errors import ConfigError, DirectoryRefusedError, DirectoryUnavailableError

    if isinstance(error, ConfigError) and any(problem.key.startswith("--") for problem in error.problems):
        return EXIT_USAGE
    if isinstance(error, DirectoryUnavailableError):
        return EXIT_UNREACHABLE
    return EXIT_REFUSED if isinstance(error, DirectoryRefusedError) else EXIT_NO


def make_console(*, stderr: bool = False) -> Console:
    """Colours on terminals only (and never with NO_COLOR); elsewhere wide and plain."""
    from rich.console import Console

    console = Console(stderr=stderr, highlight=False, emoji=False, markup=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = WIDE
    return console


def make_table(*headings: str, right: Iterable[str] = ()) -> Table:
    """A table without lines, as wide as it has to be. `right`: headings of columns of numbers."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    numbers = set(right)
    for heading in headings:
        is_number = heading in numbers
        table.add_column(heading, overflow="fold", justify="right" if is_number else "left", no_wrap=is_number)
    return table


def tell(console: Console, text: Text | str, *, label: Text | str = "", indent: int = 0) -> None:
    """Print a sentence. On a terminal its further lines stand under its first one, `indent` columns from the left;
    elsewhere it stays one line, however long, for grep.
    """
    from rich.table import Table
    from rich.text import Text

    first = Text(label) if isinstance(label, str) else label
    first.pad_right(max(0, indent - first.cell_len))
    if not console.is_terminal:
        console.print(Text.assemble(first, text), soft_wrap=True)
        return
    grid = Table.grid(expand=True)
    grid.add_column(width=max(indent, first.cell_len), no_wrap=True)
    grid.add_column(ratio=1, overflow="fold")
    grid.add_row(first, text)
    console.print(grid)


def print_raw_json(text: bytes) -> None:
    """JSON as it came from the controller, indented."""
    import msgspec

    sys.stdout.write(msgspec.json.format(text, indent=2).decode() + "\n")


def print_json(value: object) -> None:
    """Structs, lists, mappings and plain values as JSON."""
    import msgspec

    print_raw_json(msgspec.json.encode(value))
