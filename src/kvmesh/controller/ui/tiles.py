"""The row of figures on top: the cluster at a glance."""

from __future__ import annotations

from nicegui import ui

from kvmesh.controller.ui.live import Moment
from kvmesh.controller.ui.units import count, share, size


class Tiles:
    """Instances, chunks, pool use, fetched bytes, fetch success."""

    def __init__(self) -> None:
        with ui.element("div").classes("grid grid-cols-2 sm:grid-cols-3 lg:grid-cols-5 gap-3 w-full"):
            self._instances = _Tile("Instances")
            self._chunks = _Tile("Chunks")
            self._pool = _Tile("Pool use")
            self._fetched = _Tile("Fetched")
            self._found = _Tile("Fetch success", "max-sm:col-span-2")

    def update(self, moment: Moment) -> None:
        """Show the sums of this moment."""
        totals = moment.totals
        suspect = sum(1 for instance in moment.members.instances if instance.state != "up")
        formats = f"{totals.formats} format{'s' if totals.formats != 1 else ''}"
        if suspect:
            self._instances.show(count(totals.instances), f"{suspect} suspect, {formats}", "km-warn")
        else:
            self._instances.show(count(totals.instances), f"all up, {formats}" if totals.instances else "none yet")
        copies = totals.entries / totals.chunks if totals.chunks else 0
        self._chunks.show(count(totals.chunks), f"{copies:.2f} holders each" if totals.chunks else "nothing published")
        use = totals.entries / totals.slots if totals.slots else None
        self._pool.show(share(use) or "-", f"{count(totals.entries)} of {count(totals.slots)} slots")
        rate = f"{size(totals.fetched_bytes / totals.fetch_seconds)}/s" if totals.fetch_seconds else ""
        fetches = f"{count(totals.fetches)} fetch{'es' if totals.fetches != 1 else ''}"
        self._fetched.show(size(totals.fetched_bytes), f"{fetches}, {rate}" if rate else fetches)
        if not totals.chunks_asked:
            self._found.show("-", "no fetch reported yet")
            return
        worst = max(totals.misses, key=lambda reason: totals.misses[reason], default="")
        missed = f"most misses: {worst}" if worst else "no misses"
        self._found.show(share(totals.chunks_fetched / totals.chunks_asked), missed)


class _Tile:
    def __init__(self, title: str, classes: str = "") -> None:
        with ui.column().classes(f"km-card p-3 gap-0 min-w-0 {classes}"):
            ui.label(title).classes("text-xs km-muted")
            self._value = ui.label().classes("text-2xl font-semibold km-number leading-tight")
            self._note = ui.label().classes("text-xs km-muted break-words")

    def show(self, value: str, note: str, tone: str = "") -> None:
        self._value.text = value
        self._note.text = note
        self._note.classes(replace=f"text-xs break-words {tone or 'km-muted'}")
