"""The gains of long-doc-qa's second instance as a picture (needs the `bench` extra)."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvmesh.bench.long_doc_qa import Round
from kvmesh.errors import StartupError


def draw(runs: Sequence[tuple[bool, Round, Round]], path: Path, title: str) -> None:
    """Write a picture of warm-up rounds: mean TTFT and round time, instance 1 beside instance 2.

    Args:
        runs: with sharing or without, the first and the second instance's warm-up round.
        path: the file; its suffix says which kind.
        title: above both diagrams.

    Raises:
        StartupError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - an extra
    except ModuleNotFoundError:
        raise StartupError("--plot", "the package matplotlib", "none", "pip install 'kvmesh[bench]'") from None
    figure: Any = Figure(figsize=(10, 4.2), layout="constrained")
    figure.suptitle("\n".join(textwrap.wrap(title, 110)), fontsize=10)
    figures = (("mean TTFT of the warm-up round, s", "mean_ttft_s"), ("time of the warm-up round, s", "seconds"))
    labels = ["sharing" if sharing else "not sharing" for sharing, _, _ in runs]
    for place, (heading, name) in zip(figure.subplots(1, 2), figures, strict=True):
        place.set_title(heading, fontsize=10)
        for offset, instance in ((-0.2, 1), (0.2, 2)):
            values = [getattr(run[instance], name) for run in runs]
            bars = place.bar([index + offset for index in range(len(runs))], values, 0.38, label=f"instance {instance}")
            place.bar_label(bars, fmt="%.2f", fontsize=8)
        place.set_xticks(range(len(runs)), labels)
        place.legend(fontsize=8)
        place.grid(visible=True, axis="y", alpha=0.3)
    figure.savefig(path)
