"""`kvmesh bench codec`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from kvmesh.cli.lists import numbers
from kvmesh.cli.shared import JsonFlag


def bench_codec(
    speeds: Annotated[str, typer.Option(help="Speeds of the link in Mbit/s, separated by commas; 0: no limit.")] = "",
    repeats: Annotated[int, typer.Option(min=1, help="Fetches that count, per speed and codec.")] = 8,
    prompts: Annotated[int, typer.Option(min=0, max=30, help="Prompts for the model; 0 leaves it out.")] = 20,
    model: Annotated[Path | None, typer.Option(help="Model folder instead of SmolLM2-135M.")] = None,
    links: Annotated[bool, typer.Option(help="Fetch over rate-limited links (root, iproute2).")] = True,
    as_json: JsonFlag = False,
    quick: Annotated[bool, typer.Option("--quick", help="Three speeds, three fetches, no model.")] = False,
) -> None:
    """The wire codec: fetches over slow and fast links raw, lossless and as `auto` chooses; then lossless and int8 with
    a real model on two vLLM CPU servers: ratio, speed, error, and how many answers stay the same.

    The exit status is 1 when auto was more than 5 % slower than raw, or an answer from lossless chunks differed.
    """
    from kvmesh.bench.codec import run_codec
    from kvmesh.bench.codec_links import SPEEDS_MBIT_S

    wanted: Sequence[float] = [10, 300, 0] if quick else SPEEDS_MBIT_S
    if speeds:
        wanted = numbers("--speeds", speeds, float, least=0)
    raise typer.Exit(
        run_codec(wanted if links else [], 3 if quick else repeats, 0 if quick else prompts, model, as_json=as_json)
    )
