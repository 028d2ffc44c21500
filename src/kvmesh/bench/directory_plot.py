"""The growth of a directory's cost with the number of instances, as a picture (needs the `bench` extra)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvmesh.errors import StartupError

if TYPE_CHECKING:
    from kvmesh.bench.directory import Cell

FIGURES = (
    ("directory_rss_mb", "memory of the directory, MB"),
    ("directory_cpu_percent", "CPU of the directory, %"),
    ("node_rss_mb", "memory of a node, MB"),
    ("visible_p99_ms", "change visible (p99), ms"),
    ("question_p99_ms", "question answered (p99), ms"),
    ("resync_s", "everything known again after a restart, s"),
)


def draw(cells: Sequence[Cell], path: Path, machine: str) -> None:
    """Write one picture with six diagrams. Raises StartupError when matplotlib is missing."""
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - an extra
    except ModuleNotFoundError:
        raise StartupError("--plot", "the package matplotlib", "none", "pip install 'kvmesh[bench]'") from None
    figure: Any = Figure(figsize=(12, 7), layout="constrained")
    figure.suptitle(f"kvmesh bench directory: {machine}")
    for place, (name, title) in zip(figure.subplots(2, 3).flat, FIGURES, strict=True):
        place.set_title(title, fontsize=10)
        place.set_xlabel("instances")
        for kind, mode in dict.fromkeys((cell.directory, cell.mode) for cell in cells):
            points = [
                (cell.instances, getattr(cell, name))
                for cell in cells
                if (cell.directory, cell.mode) == (kind, mode) and getattr(cell, name) is not None
            ]
            if points:
                place.loglog(*zip(*points, strict=True), marker="o", label=f"{kind}, {mode}")
        if place.lines:
            place.legend(fontsize=8)
        place.grid(visible=True, which="major", alpha=0.3)
    figure.savefig(path)
