"""Shows results as they come, as a table, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from kvmesh.bench.chaos.matrix import Result
from kvmesh.bench.output import result_console

progress = Console(stderr=True, highlight=False)


def show_progress(number: int, count: int, result: Result) -> None:
    """One line on standard error."""
    name = f"{result.transport}/{result.cell}"
    if result.not_run:
        verdict = f"[dim]not run: {result.not_run}[/]"
    elif result.failures:
        verdict = f"[red]FAILED[/] {'; '.join(result.failures)}"
    else:
        verdict = f"[green]ok[/] {result.sent} requests, healed after {result.recovery_s or 0.0:.2f} s"
    progress.print(
        f"{f'{number}/{count}' if count else number} {name:<28} {result.seconds:5.1f} s  {verdict}", soft_wrap=True
    )


def show_table(results: Sequence[Result]) -> None:
    """The matrix on standard output."""
    table = Table(title="Faults under load", title_justify="left")
    for heading in ("transport", "fault"):
        table.add_column(heading, no_wrap=True)
    numbers = ("sent", "answered", "wrong", "before", "during", "after", "late, s", "healed, s")
    for heading in numbers:
        table.add_column(heading, justify="right")
    table.add_column("reasons of misses")
    for result in results:
        if result.not_run:
            table.add_row(result.transport, result.cell, *[""] * len(numbers), f"not run: {result.not_run}")
            continue
        told = ", ".join(f"{reason} {count}" for reason, count in result.misses.items())
        if result.failures:
            told = f"FAILED: {'; '.join(result.failures)}. {told}"
        table.add_row(
            result.transport,
            result.cell,
            str(result.sent),
            str(result.answered),
            str(result.wrong),
            *(_percent(value) for value in (result.share_before, result.share_during, result.share_after)),
            f"{result.worst_delay_s:.1f}",
            "-" if result.recovery_s is None else f"{result.recovery_s:.2f}",
            told,
            style="red" if result.failures else None,
        )
    out = result_console()
    out.print(table)
    out.print(summary(results), highlight=False)


def summary(results: Iterable[Result]) -> str:
    """One sentence."""
    results = list(results)
    ran = [result for result in results if not result.not_run]
    return (
        f"{len(ran)} cells, {len(results) - len(ran)} not run, {sum(bool(result.failures) for result in ran)} failed; "
        f"{sum(result.sent for result in ran)} requests sent, {sum(result.answered for result in ran)} answered, "
        f"{sum(result.wrong for result in ran)} wrong chunks"
    )


def print_json(results: Sequence[Result], seed: int, seconds: float) -> None:
    """The matrix for scripts, on standard output."""
    ran = [result for result in results if not result.not_run]
    print(
        json.dumps(
            {
                "seed": seed,
                "seconds": round(seconds, 1),
                "requests": sum(result.sent for result in ran),
                "answered": sum(result.answered for result in ran),
                "wrong_chunks": sum(result.wrong for result in ran),
                "failed_cells": [f"{result.transport}/{result.cell}" for result in ran if result.failures],
                "cells": [asdict(result) for result in results],
            },
            indent=2,
        )
    )


def _percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{fraction:.0%}"
