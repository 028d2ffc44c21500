"""What the page shows at one moment. Made once for all open pages, and only those parts that an open page shows."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cached_property

from kvmesh.controller import views
from kvmesh.controller.activity import FetchRecord
from kvmesh.controller.api import Context
from kvmesh.controller.formats import FormatPair, format_pairs
from kvmesh.controller.instances import FormatGroup, Instance
from kvmesh.controller.traffic import Route

REFRESH_S = 1.0
"""Pause between two updates of the open pages."""


class Moment:
    """The cluster at one moment. Its parts are made when somebody first asks for them."""

    def __init__(self, context: Context, now_s: float, epoch_offset_s: float) -> None:
        self.context = context
        self.registry = context.registry
        self.now_s = now_s
        self._epoch_offset_s = epoch_offset_s

    def milliseconds(self, at_s: float) -> int:
        """A time of the controller's clock as browsers count it, for ages that go on by themselves."""
        return int((at_s + self._epoch_offset_s) * 1000)

    @cached_property
    def health(self) -> views.HealthView:
        return self.context.health()

    @cached_property
    def totals(self) -> views.TotalsView:
        return views.totals_view(self.registry)

    @cached_property
    def instances(self) -> Sequence[Instance]:
        """All members, by id."""
        return [self.registry.instances[name] for name in sorted(self.registry.instances)]

    @cached_property
    def suspects(self) -> Sequence[Instance]:
        """Members that have fallen silent."""
        return [one for one in self.instances if self.registry.state(one, self.now_s) != "up"]

    @cached_property
    def corrupt(self) -> Sequence[Instance]:
        """Members that others have got wrong bytes from."""
        return [one for one in self.instances if one.corrupt_chunks]

    @cached_property
    def format_pairs(self) -> Sequence[FormatPair]:
        return format_pairs(self.registry.groups)

    @cached_property
    def split_models(self) -> Sequence[FormatPair]:
        """Formats of one model name: somebody expects their members to share."""
        return [pair for pair in self.format_pairs if pair.same_model]

    @cached_property
    def split_groups(self) -> frozenset[FormatGroup]:
        """The formats of `split_models`."""
        return frozenset(group for pair in self.split_models for group in (pair.ours, pair.theirs))

    @cached_property
    def routes(self) -> Sequence[Route]:
        """Busy ones first."""
        return self.registry.activity.traffic.routes(self.now_s)

    @cached_property
    def fetches(self) -> Sequence[FetchRecord]:
        """Newest first."""
        return list(reversed(self.registry.activity.recent))

    @cached_property
    def bytes_per_second(self) -> float:
        """What the cluster fetches now."""
        return sum(route.bytes_per_second for route in self.routes)


class Live:
    """Makes moments: a new one only when the last is older than half a refresh, however many pages are open."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._epoch_offset_s = time.time() - context.clock()
        self._moment: Moment | None = None

    def moment(self) -> Moment:
        """The present."""
        now_s = self._context.clock()
        if self._moment is None or now_s - self._moment.now_s > REFRESH_S / 2:
            self._moment = Moment(self._context, now_s, self._epoch_offset_s)
        return self._moment

    def forget(self) -> None:
        """Keep nothing while no page is open."""
        self._moment = None
