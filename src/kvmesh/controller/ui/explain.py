"""Why requests were not served from what others had computed: the last hour by reason, recent requests, one request."""

from __future__ import annotations

import math
from typing import NamedTuple
from urllib.parse import quote

from nicegui import ui

from kvmesh.controller.api import Context
from kvmesh.controller.inquiries import Inquiries, Unanswered
from kvmesh.controller.request_views import (
    ExplanationView,
    FoundView,
    MissShareView,
    RecentRequestView,
    explanation_view,
    join_summaries,
    recent_view,
    summary_view,
)
from kvmesh.controller.ui.asked import Asked
from kvmesh.controller.ui.frame import card, text
from kvmesh.controller.ui.live import Moment
from kvmesh.controller.ui.members import instance_link
from kvmesh.controller.ui.open_pages import Update
from kvmesh.controller.ui.panel import Panel, Value
from kvmesh.controller.ui.tables import Cell, Column, Table, cell
from kvmesh.controller.ui.units import count, listed, share, some

SUMMARY_HOURS = 1.0
SUMMARY_EVERY_S = 20.0
RECENT_EVERY_S = 5.0
SHOWN_REQUESTS = 100


class Missed(NamedTuple):
    """The last hour."""

    requests: int
    hit_rate: float | None
    shares: list[MissShareView]
    unanswered: list[Unanswered]


class Recent(NamedTuple):
    """Recent requests, and when they were asked for."""

    requests: list[RecentRequestView]
    at_s: float
    unanswered: list[Unanswered]


class Found(NamedTuple):
    """What the instances know of one request."""

    explanations: list[ExplanationView]
    unanswered: list[Unanswered]


class Questions:
    """What the pages ask the instances, once for all pages."""

    def __init__(self, context: Context) -> None:
        self._registry = context.registry
        self._clock = context.clock
        self._inquiries = Inquiries(context.registry, context.feed.asks)
        self.missed = Asked(self._ask_missed, SUMMARY_EVERY_S)
        self.recent = Asked(self._ask_recent, RECENT_EVERY_S)

    def request(self, name: str) -> Asked[Found]:
        """One request; asked for once."""

        async def ask() -> Found:
            found, unanswered = await self._inquiries.explain(sorted(self._registry.instances), name)
            return Found([explanation_view(one) for one in found], unanswered)

        return Asked(ask, math.inf)

    async def _ask_missed(self) -> Missed:
        parts, unanswered = await self._inquiries.why_missed(sorted(self._registry.instances), SUMMARY_HOURS)
        joined = summary_view(join_summaries(parts))
        return Missed(joined.requests, joined.hit_rate, joined.misses, unanswered)

    async def _ask_recent(self) -> Recent:
        at_s = self._clock()
        lines, unanswered = await self._inquiries.recent(sorted(self._registry.instances), SHOWN_REQUESTS)
        return Recent([recent_view(line) for line in lines], at_s, unanswered)


class Explained(Panel, component="assets/kvmesh_explanation.js"):
    """All about one request."""

    def __init__(self, request: str) -> None:
        super().__init__()
        self._request = request

    def update_answer(self, asked: Asked[Found]) -> None:
        """Show what has come."""
        found = asked.look()
        if found is None:
            problem = "" if asked.error is None else f"The instances could not be asked: {asked.error}"
            self.show(request=self._request, explanations=[], unanswered=[], problem=problem)
            return
        unanswered: list[Value] = [{"instance_id": one.instance_id, "code": one.error.code} for one in found.unanswered]
        problem = (
            ""
            if found.explanations
            else (
                "No instance remembers a request of this name. An instance remembers its last 1,000 requests since its "
                "start; the id is the engine's, the one in the response, or the X-Request-Id that was sent."
            )
        )
        explanations: list[Value] = [one.model_dump(mode="json") for one in found.explanations]
        self.show(request=self._request, explanations=explanations, unanswered=unanswered, problem=problem)


def build(questions: Questions, request: str) -> Update:
    """Inside a frame. `request` names the one to explain; empty: none."""
    explained: Explained | None = None
    asked: Asked[Found] | None = None
    if request:
        explained, asked = Explained(request), questions.request(request)
    with card("Why was my request computed?", "any id of it", level="h2" if request else "h1"):
        _request_form(request)
    with card("Why we missed", "chunks of prompts in the last hour, by the first reason"):
        said = text("", "p", "km-muted")
        missed = missed_table()
    with card("Requests", "the newest of all instances"):
        recent = recent_table()

    def update(moment: Moment) -> None:
        if explained is not None and asked is not None:
            explained.update_answer(asked)
        of_hour = questions.missed.look()
        missed.update_records(of_hour.shares if of_hour else [])
        _say(said, summary_of(of_hour))
        newest = questions.recent.look()
        offset_ms = moment.milliseconds(newest.at_s) if newest else 0
        recent.update_records([(one, offset_ms) for one in newest.requests] if newest else [])

    return update


def summary_of(missed: Missed | None) -> str:
    """One sentence."""
    if missed is None:
        return "Asking the instances ..."
    words = f"{some(missed.requests, 'request')}"
    if missed.hit_rate is not None:
        words += f", {share(missed.hit_rate)} of their chunks found somewhere"
    if missed.unanswered:
        words += f". Did not answer: {listed([one.instance_id for one in missed.unanswered])}"
    return words


def _say(element: ui.element, words: str) -> None:
    if element._text != words:  # noqa: SLF001 - as in `frame.text`
        element._text = words  # noqa: SLF001 - as above
        element.update()


def _request_form(request: str) -> None:
    with ui.element("form").classes("km-tools").props('action="/explain" method="get" role="search"'):
        ui.element("input").classes("km-input km-fill").props(
            'name="request" type="search" aria-label="Request id" autocomplete="off" required maxlength=256 '
            'placeholder="cmpl-..., X-Request-Id, or the engine\'s id"'
        ).props["value"] = request
        with ui.element("button").classes("km-button km-primary").props('type="submit"'):
            text("Explain", "span")


def missed_table(*, brief: bool = False) -> Table[MissShareView]:
    """One row per reason; in brief without words."""
    words: list[Column[MissShareView]] = [
        Column("text", "Why", lambda one: one.text, kind="long"),
        Column("change", "What to change", lambda one: one.change, kind="long"),
    ]
    return Table[MissShareView](
        [
            Column("reason", "Reason", lambda one: cell(one.reason, hint=one.text), lambda one: one.reason),
            Column("share", "Share", _missed_share, lambda one: one.share or 0.0, right=True),
            Column("chunks", "Chunks", lambda one: count(one.chunks), lambda one: one.chunks, right=True),
            Column("requests", "Requests", lambda one: count(one.requests), lambda one: one.requests, right=True),
            *([] if brief else words),
        ],
        caption="Why chunks were missed in the last hour",
        empty="Nothing was missed",
        key=lambda one: one.reason,
    )


def _missed_share(one: MissShareView) -> Cell:
    return cell(share(one.share), share=round(one.share or 0.0, 3))


def recent_table() -> Table[tuple[RecentRequestView, int]]:
    """One row per request; the number is the moment at which it was asked for, in ms."""
    return Table[tuple[RecentRequestView, int]](
        [
            Column("request", "Request", _request_cell, lambda one: one[0].request_id, kind="state"),
            Column("instance", "Instance", _instance_cell, lambda one: one[0].instance_id),
            Column("age", "When", _age_cell, lambda one: -one[0].age_s, right=True),
            Column("tokens", "Tokens", lambda one: count(one[0].prompt_tokens), _tokens, right=True),
            Column("found", "Found", _found_cell, lambda one: found_share(one[0].found), right=True),
            Column("reason", "First reason", lambda one: one[0].reason or "", lambda one: one[0].reason or ""),
            Column("summary", "In words", lambda one: one[0].summary, kind="long"),
        ],
        caption="Recent requests of all instances",
        empty="No instance has told of a request yet",
        key=lambda one: f"{one[0].instance_id}\0{one[0].request_id}",
        search=lambda one: f"{one[0].request_id} {one[0].instance_id} {one[0].reason} {one[0].summary}",
        search_label="Search request, instance, reason",
        rows_per_page=20,
    )


def found_share(found: FoundView) -> float:
    """Of all whole chunks, 0 to 1."""
    there = found.device + found.own_pool + found.peer
    return there / (there + found.nowhere) if there + found.nowhere else 0.0


def _request_cell(one: tuple[RecentRequestView, int]) -> Cell:
    request = one[0]
    tone = "ok" if request.reason is None else "warn" if found_share(request.found) else "bad"
    return cell(request.request_id, link=f"/explain?request={quote(request.request_id, safe='')}", tone=tone)


def _instance_cell(one: tuple[RecentRequestView, int]) -> Cell:
    return cell(one[0].instance_id, link=instance_link(one[0].instance_id))


def _age_cell(one: tuple[RecentRequestView, int]) -> Cell:
    # To half a second, so that the same request has the same moment in the next answer.
    return cell(moment_ms=int((one[1] - one[0].age_s * 1000) // 500 * 500))


def _tokens(one: tuple[RecentRequestView, int]) -> int:
    return one[0].prompt_tokens


def _found_cell(one: tuple[RecentRequestView, int]) -> Cell:
    found = one[0].found
    hint = f"device {found.device}, own pool {found.own_pool}, peers {found.peer}, computed {found.nowhere}"
    part = found_share(found)
    return cell(share(part), share=round(part, 3), hint=hint)
