"""Where benchmarks print their results."""

from __future__ import annotations

import os

from rich.console import Console

WIDE = 200
"""Columns, where the output is a file or a pipe: rich takes 80 there, and cuts tables off."""


def result_console() -> Console:
    """Standard output. Where it is no terminal, tables are as wide as they have to be."""
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = WIDE
    return console
