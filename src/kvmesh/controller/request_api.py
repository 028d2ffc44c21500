"""The HTTP API's part on requests and hit rates: `/api/v1/explain`, `/api/v1/hit-rates`. `docs/explain.md` explains."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Annotated

from fastapi import APIRouter, Query

from kvmesh.controller import request_views as views
from kvmesh.controller.asks import Asks
from kvmesh.controller.errors import ApiError, unknown_instance
from kvmesh.controller.inquiries import Inquiries, Unanswered
from kvmesh.controller.registry import Registry
from kvmesh.wire.explain import MAX_HOURS, MAX_ID, MAX_RECENT

ENDPOINTS = (
    "GET /api/v1/explain",
    "GET /api/v1/explain/summary",
    "GET /api/v1/explain/{request}",
    "GET /api/v1/hit-rates",
)
_Instance = Annotated[str | None, Query(description="Only this instance.")]


def make_router(registry: Registry, asks: Asks, clock: Callable[[], float] = time.monotonic) -> APIRouter:
    """The calls, to be put under `/api/v1`."""
    router = APIRouter(tags=["requests"])
    inquiries = Inquiries(registry, asks)

    def chosen(instance: str | None) -> list[str]:
        if instance is None:
            return sorted(registry.instances)
        if instance not in registry.instances:
            raise unknown_instance(instance)
        return [instance]

    @router.get("/explain")
    async def recent(
        instance: _Instance = None, limit: Annotated[int, Query(ge=1, le=MAX_RECENT)] = 50
    ) -> views.RecentRequestsView:
        """Recent requests, newest first: what of each was found where, and the first reason why not the rest."""
        lines, unanswered = await inquiries.recent(chosen(instance), limit)
        return views.RecentRequestsView(requests=list(map(views.recent_view, lines)), unanswered=_views(unanswered))

    @router.get("/explain/summary")
    async def summary(
        hours: Annotated[float, Query(ge=1 / 60, le=MAX_HOURS)] = 1.0, instance: _Instance = None
    ) -> views.WhyMissedView:
        """Why we missed: shares by reason, for the cluster and for each instance."""
        parts, unanswered = await inquiries.why_missed(chosen(instance), hours)
        return views.WhyMissedView(
            hours=hours,
            cluster=views.summary_view(views.join_summaries(parts)),
            instances=list(map(views.summary_view, parts)),
            unanswered=_views(unanswered),
        )

    @router.get("/explain/{request:path}")
    async def explain(request: str, instance: _Instance = None) -> views.ExplanationsView:
        """All about one request, named by its engine's id, by the id in its response or by X-Request-Id."""
        found, unanswered = await inquiries.explain(chosen(instance), request)
        if not found:
            raise _unknown_request(request, unanswered)
        return views.ExplanationsView(
            request=request, explanations=list(map(views.explanation_view, found)), unanswered=_views(unanswered)
        )

    @router.get("/hit-rates")
    async def hit_rates(minutes: Annotated[int, Query(ge=1, le=60)] = 60) -> views.HitRatesView:
        """Hit rates achieved, beside what unlimited pools and perfect sharing would have given."""
        rates = registry.hit_rates
        logs = [(name, log) for name in rates.instances() if (log := rates.of(name)) is not None]
        return views.hit_rates_view(rates.cluster, logs, minutes * 60.0, clock())

    return router


def _views(unanswered: Sequence[Unanswered]) -> list[views.UnansweredView]:
    return [views.unanswered_view(one.instance_id, one.error) for one in unanswered]


def _unknown_request(request: str, unanswered: Sequence[Unanswered]) -> ApiError:
    hint = (
        "nodes remember their last 1,000 requests since their start; kvmesh explain, or GET /api/v1/explain, lists them"
    )
    if unanswered:
        hint += "; not answering: " + ", ".join(one.instance_id for one in unanswered[:20])
    return ApiError(404, "unknown_request", f"no instance remembers a request named {request[:MAX_ID]!r}", hint)
