"""The first page: is all well, what is it worth, what is going on."""

from __future__ import annotations

from collections.abc import Sequence

from kvmesh.controller.activity import Saved
from kvmesh.controller.history import STEPS
from kvmesh.controller.ui.attention import Attention
from kvmesh.controller.ui.explain import Questions, missed_table
from kvmesh.controller.ui.frame import card, columns
from kvmesh.controller.ui.live import Moment
from kvmesh.controller.ui.open_pages import Update
from kvmesh.controller.ui.panel import Panel, Value
from kvmesh.controller.ui.traffic import Flow, fetches_table, rounded
from kvmesh.controller.ui.units import NOTHING, count, duration, rate, share, size, some
from kvmesh.core.usage import BUCKET_S, Usage, UsageLog

SPARK_POINTS = 60
SHOWN_INSTANCES = 10
SHOWN_MINUTES = 15
"""At least; soon after a start most of them are empty."""


class Figures(Panel, component="assets/kvmesh_figures.js"):
    """Figures in boxes."""

    def show_figures(self, *figures: dict[str, Value]) -> None:
        """As made by `figure`."""
        self.show(figures=list[Value](figures))


def figure(name: str, value: str, note: str, *, tone: str = "", points: Sequence[float] = ()) -> dict[str, Value]:
    """One box. A value of a number and a unit is split, so that the unit stands back."""
    number, _, unit = value.partition(" ")
    return {
        "name": name,
        "value": number,
        "unit": unit,
        "note": note,
        "tone": tone,
        "points": [float(f"{point:.3g}") for point in points],
    }


class Chart(Panel, component="assets/kvmesh_chart.js"):
    """Hit rates of the last hour."""

    def update_usage(self, log: UsageLog, now_s: float) -> None:
        """Achieved, and what unlimited pools and perfect sharing would have given."""
        minutes, hour = log.minutes(now_s), log.over(3600.0, now_s)
        padded = [Usage()] * (SHOWN_MINUTES - len(minutes)) + minutes
        series: list[Value] = [
            {
                "name": name,
                "tone": tone,
                "filled": filled,
                "now": share(of_hour) or NOTHING,
                "points": [None if point is None else round(point, 3) for point in points],
            }
            for name, tone, filled, of_hour, points in (
                ("found", "accent", True, hour.achieved, [one.achieved for one in padded]),
                ("could have been found", "second", False, hour.achievable, [one.achievable for one in padded]),
            )
        ]
        note = f"{some(hour.chunks, 'chunk')} of {some(hour.requests, 'request')} in the last hour"
        self.show(series=series, note=note, step=BUCKET_S)


def build(questions: Questions) -> Update:
    """Inside a frame."""
    attention = Attention()
    figures = Figures()
    with columns(wide_left=True):
        with card("Hit rate", "whole chunks of prompts, minute by minute"):
            chart = Chart()
        with card("Why we missed", "in the last hour", more=("Explain", "/explain")):
            missed = missed_table(brief=True)
    with columns():
        with card("Who fetches from whom", "the busiest instances", more=("Traffic", "/traffic")):
            flow = Flow(with_matrix=False, instances=SHOWN_INSTANCES)
        with card("Fetches", "as they end", more=("All", "/traffic")):
            fetches = fetches_table(rows=9, searchable=False)

    def update(moment: Moment) -> None:
        attention.update_moment(moment)
        figures.show_figures(*figures_of(moment))
        chart.update_usage(moment.registry.hit_rates.cluster, moment.now_s)
        of_hour = questions.missed.look()
        missed.update_records(of_hour.shares[:6] if of_hour else [])
        flow.update_routes(moment.routes)
        fetches.update_records([(record, moment) for record in moment.fetches[:9]])

    return update


def figures_of(moment: Moment) -> list[dict[str, Value]]:
    """What sharing is worth, and how full the pools are."""
    totals, history = moment.totals, moment.registry.activity.history
    now = rounded(moment.bytes_per_second)
    saved = moment.registry.activity.saved
    use = totals.entries / totals.slots if totals.slots else None
    copies = totals.entries / totals.chunks if totals.chunks else 0.0
    return [
        figure(
            "Bytes not computed again",
            size(totals.fetched_bytes),
            f"{some(totals.chunks_fetched, 'chunk')} pulled from peers",
            points=thinned(history.growth("fetched_bytes")),
        ),
        figure(
            "Fetching now",
            rate(now) if now else "0 B/s",
            f"{some(totals.fetches, 'fetch', 'fetches')} so far",
            points=thinned(history.growth("fetches")),
        ),
        figure("Prefill not done again", f"{count(saved.tokens)} tokens", prefill_note(saved)),
        figure(
            "Fetched of asked",
            share(totals.chunks_fetched / totals.chunks_asked) if totals.chunks_asked else NOTHING,
            worst(totals.misses) if totals.chunks_asked else "no fetch yet",
        ),
        figure(
            "Pools in use",
            share(use) or NOTHING,
            f"{count(totals.entries)} of {some(totals.slots, 'slot')}, {copies:.1f} holders per chunk",
        ),
    ]


def prefill_note(saved: Saved) -> str:
    """In seconds, as far as engines have told how fast they prefill."""
    if not saved.seconds:
        return "no engine has told how fast it prefills" if saved.tokens else "nothing pulled yet"
    part = saved.timed_tokens / saved.tokens
    return f"about {duration(saved.seconds)} of prefill" + (f" ({share(part)} of them timed)" if part < 1 else "")


def worst(misses: dict[str, int]) -> str:
    """What most chunks were missed for."""
    if not misses:
        return "nothing missed"
    reason = max(misses, key=lambda one: misses[one])
    return f"most missed: {reason}, {some(misses[reason], 'chunk')}"


def thinned(points: Sequence[float]) -> list[float]:
    """At most SPARK_POINTS points with the same sum, of the hour's steps."""
    step = STEPS // SPARK_POINTS
    first = len(points) % step
    parts = [points[:first]] if first else []
    parts += [points[start : start + step] for start in range(first, len(points), step)]
    return [sum(part) for part in parts]
