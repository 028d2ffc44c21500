"""`kvmesh config check`: what an instance would run with, or everything that is wrong."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

from kvmesh.config import load_config
from kvmesh.errors import ConfigError


def check_file(file: Path, *, as_json: bool) -> int:
    """Check one YAML file together with the environment; returns the exit status (1 when it cannot be used)."""
    try:
        config = load_config(path=file)
    except ConfigError as error:
        if as_json:
            typer.echo(
                json.dumps({"ok": False, "problems": [dataclasses.asdict(one) for one in error.problems]}, indent=2)
            )
        else:
            typer.secho(str(error), fg="red", err=True)
        return 1
    rows = config.describe()
    if as_json:
        keys = [row._asdict() for row in rows]
        typer.echo(
            json.dumps({"ok": True, "directory": config.directory, "keys": keys, "warnings": config.warnings}, indent=2)
        )
        return 0
    table = Table(title=str(file), title_justify="left", show_lines=False)
    for heading in ("key", "value", "from"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(row.key, str(row.value), row.source, style=None if row.source != "default" else "dim")
    Console().print(table)
    for warning in config.warnings:
        typer.secho(f"warning: {warning}", fg="yellow", err=True)
    return 0
