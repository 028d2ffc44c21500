"""`kvmesh bench codec`: what the wire codecs gain over slow links, and what they do to a model's KV and its answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kvmesh.bench.codec_links import ALLOWED_OVER_RAW, LinkRow, measure_link
from kvmesh.bench.codec_model import CODECS, ModelRow, measure_model
from kvmesh.bench.output import result_console


def run_codec(speeds_mbit_s: Sequence[float], repeats: int, prompts: int, model: Path | None, *, as_json: bool) -> int:
    """Measure and print. Returns 1 when `auto` was slower than raw by more than it may, or lossless changed a text.

    Args:
        speeds_mbit_s: of the link; 0 is no limit. Empty: links are left out.
        repeats: fetches that count, per speed and codec.
        prompts: for the model; 0 leaves it out.
        model: its folder; SmolLM2 when None.
        as_json: print JSON.

    Raises StartupError.
    """
    progress = Console(stderr=True)
    links = [measure_link(speed, repeats) for speed in speeds_mbit_s]
    models = [measure_model(codec, prompts, model, progress.print) for codec in CODECS] if prompts else []
    if as_json:
        shown = [asdict(row) | {"auto_over_raw": row.auto_over_raw} for row in links]
        print(json.dumps({"links": shown, "model": [asdict(row) for row in models]}, indent=2))
    else:
        _show(links, models)
    for row in links:
        if not row.is_kept:
            progress.print(f"{row.link}: auto took {row.auto_over_raw:.2f} of raw, allowed {ALLOWED_OVER_RAW:g}")
    is_exact = all(row.same_texts == row.prompts for row in models if row.codec == "lossless")
    return int(not (is_exact and all(row.is_kept for row in links)))


def _show(links: Sequence[LinkRow], models: Sequence[ModelRow]) -> None:
    out = result_console()
    if links:
        table = Table(title="A fetch over a link, seconds", title_justify="left")
        for heading in ("link, Mbit/s", "MiB", "raw", "lossless", "auto", "auto/raw"):
            table.add_column(heading, justify="right")
        for row in links:
            table.add_row(
                row.link,
                f"{row.fetch_bytes / (1 << 20):.0f}",
                *(f"{seconds:.3f}" for seconds in (row.none_s, row.lossless_s, row.auto_s)),
                f"{row.auto_over_raw:.3f}",
            )
        out.print(table)
    if models:
        table = Table(title="A model's KV", title_justify="left")
        for heading in (
            "codec",
            "pulled, MB",
            "wire/raw",
            "encode, GB/s",
            "decode, GB/s",
            "same answers",
            "agree up to",
        ):
            table.add_column(heading, justify="right")
        for model in models:
            table.add_row(
                model.codec,
                f"{model.pulled_bytes / 1e6:.1f}",
                f"{model.ratio:.3f}",
                f"{model.encode_gb_per_s:.2f}",
                f"{model.decode_gb_per_s:.2f}",
                f"{model.same_texts} of {model.prompts}",
                f"{model.same_characters:.0%}",
            )
        out.print(table)
        for model in models:
            if model.int8_error is not None:
                out.print(f"Error of int8 in these chunks: {model.int8_error:.2%} of the numbers (root mean square)")
