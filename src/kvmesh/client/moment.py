"""A cluster at one moment, and what has happened between two of them. The first half asks, the second is pure."""

from __future__ import annotations

import time
from typing import NamedTuple

from kvmesh.client.answers import Fetch, Health, HitRates, Incompatibility, Instance, Instances, Statistics, Totals
from kvmesh.client.http import ControllerApi


class Moment(NamedTuple):
    """What the controller said, within a few milliseconds."""

    at_s: float
    """time.monotonic() when it had answered."""
    health: Health
    members: Instances
    totals: Totals
    incompatibilities: list[Incompatibility]
    fetches: list[Fetch]
    """The last ones, newest first."""
    hit_rates: HitRates | None = None
    """None from a controller that does not tell."""


class Rates(NamedTuple):
    """Per second, over the time between two moments."""

    fetched_bytes: float = 0.0
    served_bytes: float = 0.0
    fetches: float = 0.0
    misses: float = 0.0
    """Chunks asked of peers that did not come."""


def take_moment(api: ControllerApi) -> Moment:
    """Ask for everything. Raises DirectoryError."""
    health = api.health()
    members = api.get("/api/v1/instances", Instances)
    totals = api.get("/api/v1/totals", Totals)
    incompatibilities = api.get("/api/v1/incompatibilities", list[Incompatibility])
    fetches = api.get("/api/v1/fetches", list[Fetch])
    hit_rates = api.get_if_known("/api/v1/hit-rates", HitRates)
    return Moment(time.monotonic(), health, members, totals, incompatibilities, fetches, hit_rates)


def rates_by_instance(before: Moment | None, now: Moment) -> dict[str, Rates]:
    """The rates of every member of `now`. One that has started anew since `before` counts from zero."""
    if before is None or now.at_s <= before.at_s:
        return {member.instance_id: Rates() for member in now.members.instances}
    seconds = now.at_s - before.at_s
    known = {(member.instance_id, member.incarnation): member for member in before.members.instances}
    return {
        member.instance_id: _rates(known.get((member.instance_id, member.incarnation)), member, seconds)
        for member in now.members.instances
    }


def sum_rates(rates: dict[str, Rates]) -> Rates:
    """Of the whole cluster."""
    return Rates(*(sum(values) for values in zip(*rates.values(), strict=True))) if rates else Rates()


def _rates(before: Instance | None, now: Instance, seconds: float) -> Rates:
    then = before.statistics if before is not None else Statistics() if now.member_for_s < seconds else now.statistics
    since = now.statistics
    return Rates(
        fetched_bytes=max(0, since.fetched_bytes - then.fetched_bytes) / seconds,
        served_bytes=max(0, since.served_bytes - then.served_bytes) / seconds,
        fetches=max(0, since.fetches - then.fetches) / seconds,
        misses=max(0, sum(since.misses.values()) - sum(then.misses.values())) / seconds,
    )
