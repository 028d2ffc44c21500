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
    """Write one picture with six diagrams, one colour for each directory and mode.

    Raises StartupError when matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - an extra
        from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator  # noqa: PLC0415 - an extra
    except ModuleNotFoundError:
        raise StartupError("--plot", "the package matplotlib", "none", "pip install 'kvmesh[bench]'") from None
    figure: Any = Figure(figsize=(12, 7.5), layout="constrained")
    figure.suptitle(f"kvmesh bench directory: {machine}")
    sizes = sorted({cell.instances for cell in cells})
    kinds = list(dict.fromkeys((cell.directory, cell.mode) for cell in cells))
    plain = FuncFormatter(lambda value, _: f"{value:,.10g}")
    drawn: dict[str, Any] = {}
    for place, (name, title) in zip(figure.subplots(2, 3).flat, FIGURES, strict=True):
        place.set_title(title, fontsize=10)
        place.set_xlabel("instances")
        shown: list[float] = []
        for number, (kind, mode) in enumerate(kinds):
            points = [
                (cell.instances, getattr(cell, name))
                for cell in cells
                if (cell.directory, cell.mode) == (kind, mode) and getattr(cell, name) is not None
            ]
            if points:
                (line,) = place.loglog(*zip(*points, strict=True), marker="o", color=f"C{number}")
                drawn[f"{kind}, {mode}"] = line
                shown += [value for _, value in points if value > 0]
        if not shown:  # of a mode that was not measured
            place.set_axis_off()
            place.set_title("")
            continue
        place.set_ylim(*_limits(shown))
        place.set_xticks(sizes)
        place.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        for axis in (place.xaxis, place.yaxis):
            axis.set_major_formatter(plain)
            axis.set_minor_locator(NullLocator())
        place.grid(visible=True, which="major", alpha=0.3)
    figure.legend(drawn.values(), drawn.keys(), loc="outside lower center", ncols=max(1, len(drawn)))
    figure.savefig(path)


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """Of a logarithmic axis: with some room, and a decade at least, so that small differences look small."""
    low, high = min(values) / 1.3, max(values) * 1.3
    widen = max(1.0, (10 * low / high) ** 0.5)
    return low / widen, high * widen
