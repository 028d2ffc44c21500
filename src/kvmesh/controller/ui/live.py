"""What all sections of the page show at one moment. Made once for all open pages."""

from __future__ import annotations

from typing import NamedTuple

from kvmesh.controller import views
from kvmesh.controller.api import Context
from kvmesh.controller.formats import incompatibilities

REFRESH_S = 2.0
"""Pause between two updates of an open page."""
SHOWN_FETCHES = 50


class Moment(NamedTuple):
    """The cluster at one moment."""

    health: views.HealthView
    totals: views.TotalsView
    members: views.InstancesView
    incompatibilities: list[views.IncompatibilityView]
    """Only those of one model name, which somebody expects to share."""
    fetches: list[views.FetchView]
    """Newest first."""


class Live:
    """Makes moments, at most one per half refresh however many pages are open."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._moment: Moment | None = None
        self._made_at_s = 0.0

    def moment(self) -> Moment:
        """The present."""
        now_s = self._context.clock()
        if self._moment is None or now_s - self._made_at_s > REFRESH_S / 2:
            self._moment, self._made_at_s = self._make(now_s), now_s
        return self._moment

    def _make(self, now_s: float) -> Moment:
        registry = self._context.registry
        recent = list(registry.activity.recent)[-SHOWN_FETCHES:]
        return Moment(
            self._context.health(),
            views.totals_view(registry),
            views.instances_view(registry, now_s),
            views.incompatibility_views([pair for pair in incompatibilities(registry.groups) if pair.same_model]),
            [views.fetch_view(record, now_s) for record in reversed(recent)],
        )
