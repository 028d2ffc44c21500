"""Who fetches from whom: a picture, a matrix, all routes, and the last fetches one by one."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import quote

from kvmesh.controller.activity import FetchRecord
from kvmesh.controller.traffic import Route
from kvmesh.controller.ui.frame import card, columns
from kvmesh.controller.ui.live import Moment
from kvmesh.controller.ui.open_pages import Update
from kvmesh.controller.ui.panel import Panel, Value
from kvmesh.controller.ui.tables import Cell, Column, Table, cell
from kvmesh.controller.ui.units import NOTHING, count, duration, rate, size

SHOWN_IN_PICTURE = 12
SHOWN_IN_MATRIX = 18
FEW_BYTES = 1.0

Seen = tuple[FetchRecord, Moment]
SeenRoute = tuple[Route, Moment]


class Flow(Panel, component="assets/kvmesh_flow.js"):
    """The busiest instances and what moves between them."""

    def __init__(self, *, with_matrix: bool, instances: int) -> None:
        super().__init__({"matrix": with_matrix, "empty": "Nothing has been fetched from a peer yet"})
        self._instances = instances

    def update_routes(self, routes: Sequence[Route]) -> None:
        """`routes` are sorted, busy ones first."""
        names: dict[str, int] = {}
        edges: list[Value] = []
        for route in routes:
            new = {route.receiver, route.holder} - names.keys()
            if len(names) + len(new) > self._instances:
                continue
            for name in sorted(new):
                names[name] = len(names)
            busy = rounded(route.bytes_per_second)
            edges.append(
                {
                    "from": names[route.holder],
                    "to": names[route.receiver],
                    "rate": busy,
                    "weight": busy or min(FEW_BYTES, route.bytes),
                    "text": size(busy) if busy else "",
                    "title": f"{route.receiver} fetches {rate(busy) if busy else 'nothing now'} from {route.holder}, "
                    f"{size(rounded(route.bytes))} in all",
                }
            )
        self.show(names=list[Value](names), edges=edges)


def rounded(number: float) -> float:
    """To two digits, so that what a person would not notice is not sent."""
    return float(f"{number:.1e}") if number >= 1 else 0.0


def build() -> Update:
    """Inside a frame."""
    with card("Who fetches from whom", "the busiest instances; arrows point to the one that fetches", level="h1"):
        flow = Flow(with_matrix=True, instances=SHOWN_IN_MATRIX)
    with columns():
        with card("Routes", "since this controller's start"):
            routes = routes_table(rows=12)
        with card("Fetches", "the last 200, as they end"):
            fetches = fetches_table(rows=12)

    def update(moment: Moment) -> None:
        flow.update_routes(moment.routes)
        routes.update_records([(route, moment) for route in moment.routes])
        fetches.update_records([(record, moment) for record in moment.fetches])

    return update


def routes_table(rows: int) -> Table[SeenRoute]:
    """One row per receiver and holder."""
    return Table[SeenRoute](
        [
            Column("route", "By ← from", lambda one: f"{one[0].receiver} ← {one[0].holder}", _route_name),
            Column("rate", "Now", lambda one: rate(rounded(one[0].bytes_per_second)), _route_rate, right=True),
            Column("bytes", "Bytes", lambda one: size(one[0].bytes), lambda one: one[0].bytes, right=True),
            Column("fetches", "Fetches", lambda one: count(one[0].fetches), lambda one: one[0].fetches, right=True),
            Column(
                "last",
                "Last",
                lambda one: cell(moment_ms=one[1].milliseconds(one[0].last_at_s)),
                _route_last,
                right=True,
            ),
        ],
        caption="Routes: who has fetched how much from whom",
        empty="Nothing has been fetched from a peer yet",
        key=lambda one: f"{one[0].receiver}\0{one[0].holder}",
        search=lambda one: f"{one[0].receiver} {one[0].holder}",
        search_label="Search instance",
        rows_per_page=rows,
    )


def _route_name(one: SeenRoute) -> tuple[str, str]:
    return one[0].receiver, one[0].holder


def _route_rate(one: SeenRoute) -> float:
    return one[0].bytes_per_second


def _route_last(one: SeenRoute) -> float:
    return one[0].last_at_s


def fetches_table(rows: int, *, searchable: bool = True) -> Table[Seen]:
    """One row per finished fetch."""
    return Table[Seen](
        [
            Column("route", "By ← from", _fetch_route, lambda one: one[0].report.instance_id, kind="state"),
            Column(
                "when",
                "When",
                lambda one: cell(moment_ms=one[1].milliseconds(one[0].reported_at_s)),
                _fetch_at,
                right=True,
            ),
            Column("chunks", "Chunks", _fetch_chunks, lambda one: one[0].report.chunks_fetched, right=True),
            Column("rate", "Rate", _fetch_rate, _fetch_speed, right=True),
            Column(
                "time",
                "Took",
                lambda one: duration(one[0].report.seconds),
                lambda one: one[0].report.seconds,
                right=True,
            ),
            Column("misses", "Missed", lambda one: missed(one[0]), kind="long"),
        ],
        caption="The last fetches, newest first",
        empty="No fetch has ended yet",
        key=lambda one: str(one[0].number),
        search=_fetch_words if searchable else None,
        search_label="Search instance, request, reason",
        rows_per_page=rows,
    )


def _fetch_words(one: Seen) -> str:
    report = one[0].report
    return " ".join((report.instance_id, *report.holders, report.request_id, report.transport, *report.misses))


def _fetch_at(one: Seen) -> float:
    return one[0].reported_at_s


def _fetch_route(one: Seen) -> Cell:
    report = one[0].report
    tone = "ok" if report.chunks_fetched == report.chunks_asked else "warn" if report.chunks_fetched else "bad"
    hint = f"request {report.request_id}, over {report.transport}"
    return cell(
        f"{report.instance_id} ← {', '.join(report.holders) or 'nobody'}",
        tone=tone,
        hint=hint,
        link=f"/explain?request={quote(report.request_id, safe='')}",
    )


def _fetch_chunks(one: Seen) -> Cell:
    report = one[0].report
    return cell(f"{report.chunks_fetched} of {report.chunks_asked}", hint=size(report.fetched_bytes))


def _fetch_speed(one: Seen) -> float:
    report = one[0].report
    return report.fetched_bytes / report.seconds if report.seconds > 0 else 0.0


def _fetch_rate(one: Seen) -> Cell:
    speed = _fetch_speed(one)
    return f"{speed / 1e9:.2f} GB/s" if speed else NOTHING


def missed(record: FetchRecord) -> str:
    """What was missed for which reason: `evicted 3, stale 1`."""
    return ", ".join(f"{reason} {chunks}" for reason, chunks in sorted(record.report.misses.items()))
