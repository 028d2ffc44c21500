"""The table of the last fetches: who from whom, how much, how fast."""

from __future__ import annotations

from kvmesh.controller import views
from kvmesh.controller.ui.frame import card
from kvmesh.controller.ui.live import SHOWN_FETCHES, Moment
from kvmesh.controller.ui.tables import Column, LiveTable
from kvmesh.controller.ui.units import age, duration, size


class Fetches:
    """One line per finished fetch, newest first."""

    def __init__(self) -> None:
        with card("Fetches", f"the last {SHOWN_FETCHES}, newest first"):
            self._table = LiveTable(
                [
                    Column("route", "By, from"),
                    Column("age", "When", right=True),
                    Column("chunks", "Chunks", right=True),
                    Column("bytes", "Size", right=True),
                    Column("time", "Time", right=True),
                    Column("rate", "Rate", right=True),
                    Column("transport", "Transport"),
                    Column("misses", "Misses"),
                ],
                row_key="number",
                empty="No fetch has been reported yet",
                rows_per_page=10,
            )

    def update(self, moment: Moment) -> None:
        """Show the last fetches."""
        self._table.update([fetch_row(fetch) for fetch in moment.fetches])


def fetch_row(fetch: views.FetchView) -> dict[str, object]:
    """One fetch as the table shows it."""
    part = "warn" if fetch.chunks_fetched else "bad"
    tone = "ok" if fetch.chunks_fetched == fetch.chunks_asked else part
    return {
        "number": fetch.number,
        "tone": tone,
        "route": f"{fetch.instance_id} ← {', '.join(fetch.holders) or 'nobody'}",
        "age": fetch.age_s,
        "age_text": age(fetch.age_s),
        "chunks": fetch.chunks_fetched,
        "chunks_text": f"{fetch.chunks_fetched} of {fetch.chunks_asked}",
        "bytes": fetch.fetched_bytes,
        "bytes_text": size(fetch.fetched_bytes),
        "time": fetch.seconds,
        "time_text": duration(fetch.seconds),
        "rate": fetch.bytes_per_second or 0.0,
        "rate_text": f"{fetch.bytes_per_second / 1e9:.2f} GB/s" if fetch.bytes_per_second else "-",
        "transport": fetch.transport,
        "misses": ", ".join(f"{reason} {chunks}" for reason, chunks in sorted(fetch.misses.items())),
    }
