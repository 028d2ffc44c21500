"""`kvmesh bench chaos`: faults done to real processes while requests run. No wrong byte, no lost answer, all heals."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from kvmesh.bench.chaos.cells import TRANSPORTS
from kvmesh.bench.chaos.matrix import FULL, QUICK, Result, choose, run_matrix
from kvmesh.bench.chaos.report import print_json, progress, show_progress, show_table
from kvmesh.bench.chaos.soak import run_soak
from kvmesh.errors import StartupError

__all__ = ["run_chaos", "run_soak"]


def run_chaos(
    *,
    quick: bool,
    as_json: bool,
    only: Sequence[str],
    seed: int,
    logs: Path | None = None,
    channels: Sequence[str] = TRANSPORTS,
) -> int:
    """Run the matrix and print it; 1 when any cell failed, otherwise 0. Raises StartupError for an unknown cell or
    channel.
    """
    if unknown := set(channels).difference(TRANSPORTS):
        raise StartupError("--channels", expected=f"some of: {', '.join(TRANSPORTS)}", found=", ".join(sorted(unknown)))
    chosen = choose(only, quick=quick, channels=channels)
    if not chosen:
        known = ", ".join(sorted({cell.name for _, cell in choose((), quick=False)}))
        raise StartupError("--only", expected=f"one of: {known}", found=", ".join(only))
    started_s = time.monotonic()
    results: list[Result] = []
    with contextlib.ExitStack() as stack:
        folder = logs or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvmesh-chaos-")))
        for result in run_matrix(chosen, folder, pace=QUICK if quick else FULL, seed=seed):
            results.append(result)
            show_progress(len(results), len(chosen), result)
    if as_json:
        print_json(results, seed, time.monotonic() - started_s)
    else:
        show_table(results)
        progress.print(f"{time.monotonic() - started_s:.0f} s, seed {seed}")
    return int(any(result.failures for result in results))
