"""The commands as a newcomer meets them."""

from __future__ import annotations

from collections.abc import Iterator

import click
import pytest
import typer
from typer.testing import CliRunner

from kvmesh.cli.app import app

SELF_EXPLAINING = ("bench ", "model ")
"""Their commands work without any option."""


def commands(group: click.Command, path: str = "") -> Iterator[tuple[str, str]]:
    """All commands that do something: what is typed for them, and their help."""
    for name, command in getattr(group, "commands", {}).items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{path}{name} ")
        else:
            yield path + name, command.help or ""


@pytest.mark.parametrize(("name", "text"), list(commands(typer.main.get_command(app))))
def test_help_says_what_a_command_does_and_teaches_by_examples(name: str, text: str) -> None:
    """The examples are lines that can be typed."""
    said, _, examples = text.partition("For example:")
    assert said
    if name.startswith(SELF_EXPLAINING):
        return
    assert f"kvmesh {name}" in examples, f"kvmesh {name} --help has no example"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("bench ttft --lengths abc", "--lengths"),
        ("bench ttft --lengths 0", "--lengths"),
        ("bench transfer --methods telepathy", "'telepathy' is not one of"),
        ("bench transfer --batches 1,,2", "--batches"),
        ("bench directory --directories phonebook", "'phonebook' is not one of controller, redis"),
        ("bench gate --speeds fast", "--speeds"),
        ("bench holders --counts -1", "--counts"),
        ("bench trace trace.jsonl --instances many", "--instances"),
    ],
)
def test_a_value_that_means_nothing_is_a_wrong_command_line(line: str, said: str) -> None:
    """Exit status 2 and a sentence that names the option; nothing is measured and nothing is traced back."""
    result = CliRunner().invoke(app, line.split(), env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert said in result.output
