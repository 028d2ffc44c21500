"""What needs a person: problems of the controller, and instances that ought to share but cannot."""

from __future__ import annotations

from collections.abc import Sequence

from nicegui import ui

from kvmesh.controller import views
from kvmesh.controller.ui.live import Moment

SHOWN = 10


class Warnings:
    """A red box that is there only when it has something to say."""

    def __init__(self) -> None:
        self._shown: tuple[str, ...] = ()
        self._box = ui.column().classes("w-full rounded-lg p-3 sm:p-4 gap-2 text-white").style("background: #b3261e")
        self._box.visible = False

    def update(self, moment: Moment) -> None:
        """Rebuild the box when its lines have changed."""
        lines = (*moment.health.problems, *incompatibility_lines(moment.incompatibilities))
        if lines == self._shown:
            return
        self._shown = lines
        self._box.visible = bool(lines)
        self._box.clear()
        with self._box:
            for line in lines[:SHOWN]:
                with ui.row().classes("items-start no-wrap gap-2 w-full"):
                    ui.icon("warning").classes("mt-0.5")
                    ui.label(line).classes("text-sm break-words min-w-0")
            if len(lines) > SHOWN:
                ui.label(f"and {len(lines) - SHOWN} more: GET /api/v1/incompatibilities").classes("text-sm")


def incompatibility_lines(pairs: Sequence[views.IncompatibilityView]) -> list[str]:
    """One sentence for each set of differing fields, naming the instances on both sides."""
    sides: dict[tuple[tuple[str, str, str], ...], tuple[set[str], set[str]]] = {}
    for pair in pairs:
        fields = tuple((one.field, one.ours, one.theirs) for one in pair.fields)
        turned = tuple((name, theirs, ours) for name, ours, theirs in fields)
        ours, theirs = pair.instance_id, pair.other_instance_id
        if turned in sides:
            fields, ours, theirs = turned, theirs, ours
        left, right = sides.setdefault(fields, (set(), set()))
        left.add(ours)
        right.add(theirs)
    return [
        f"{_names(left)} cannot share KV with {_names(right)}, though the model name is the same: "
        + "; ".join(f"{name} is {ours or 'empty'} here and {theirs or 'empty'} there" for name, ours, theirs in fields)
        for fields, (left, right) in sides.items()
    ]


def _names(ids: set[str]) -> str:
    listed = sorted(ids)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")
