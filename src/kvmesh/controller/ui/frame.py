"""What is common to all pages: title bar with health, colours, width."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from nicegui import ui

from kvmesh.controller.ui.live import Moment
from kvmesh.controller.ui.units import duration

_STYLE = """
:root { --km-muted: #5b6472; --km-line: #0000001a; --km-ok: #1b7f4b; --km-warn: #b25b00; --km-bad: #b3261e; }
.body--dark { --km-muted: #9aa4b2; --km-line: #ffffff1f; --km-ok: #4cc38a; --km-warn: #f0a04b; --km-bad: #ff7b72; }
body { background: #f6f7f9; } body.body--dark { background: #101418; }
.nicegui-content { padding: 0; align-items: stretch; }
.km-card { background: #fff; border: 1px solid var(--km-line); border-radius: 10px; box-shadow: none; }
.body--dark .km-card { background: #171c22; }
.km-muted { color: var(--km-muted); }
.km-ok { color: var(--km-ok); } .km-warn { color: var(--km-warn); } .km-bad { color: var(--km-bad); }
.km-number { font-variant-numeric: tabular-nums; }
.km-card .q-table__card, .km-card .q-table { background: transparent; box-shadow: none; }
.km-card th { color: var(--km-muted); font-weight: 500; }
"""


class Frame:
    """The title bar of one open page."""

    def __init__(self) -> None:
        with ui.header().classes("items-center px-4 py-2 gap-3").style("background: #16324f"):
            ui.label("kvmesh").classes("text-lg font-semibold")
            ui.label("controller").classes("text-sm opacity-80 max-sm:hidden")
            ui.space()
            self._health = ui.label().classes("text-sm rounded-full px-3 py-0.5 text-white whitespace-nowrap")
            self._about = ui.label().classes("text-xs opacity-80 whitespace-nowrap")

    def update(self, moment: Moment) -> None:
        """Show health and age."""
        health = moment.health
        self._health.text = "healthy" if not health.problems else f"unhealthy: {len(health.problems)} problem(s)"
        self._health.style(f"background: {'#1b7f4b' if not health.problems else '#b3261e'}")
        self._about.text = f"v{health.version} · up {duration(health.uptime_s)}"


@contextmanager
def frame() -> Iterator[Frame]:
    """A page's body: what is built inside stands below the title bar, at most 1280 pixels wide."""
    ui.add_css(_STYLE)
    ui.colors(primary="#1f6feb")
    made = Frame()
    with ui.column().classes("w-full max-w-[1280px] mx-auto p-3 sm:p-4 gap-4"):
        yield made


@contextmanager
def card(title: str, note: str = "") -> Iterator[None]:
    """A titled box over the full width."""
    with ui.column().classes("km-card w-full p-3 sm:p-4 gap-2"):
        with ui.row().classes("items-baseline gap-2"):
            ui.label(title).classes("text-base font-semibold")
            if note:
                ui.label(note).classes("text-xs km-muted")
        yield
