"""Rates follow from two moments, and survive restarts."""

from __future__ import annotations

import msgspec
import pytest

from kvmesh.client import Health, Instance, Instances, Statistics, Totals
from kvmesh.client.moment import Moment, Rates, rates_by_instance, sum_rates
from support.fake_controller import instance


def member(name: str, incarnation: str = "0" * 16, member_for_s: float = 100.0, **statistics: object) -> Instance:
    shown = instance(name, incarnation=incarnation, member_for_s=member_for_s)
    found = msgspec.convert(shown, Instance)
    return msgspec.structs.replace(found, statistics=Statistics(**statistics))


def moment(at_s: float, *members: Instance) -> Moment:
    return Moment(at_s, Health("ok"), Instances(list(members)), Totals(), [], [])


def test_rates_are_differences_per_second():
    before = moment(10.0, member("a", fetched_bytes=100, fetches=1, misses={"evicted": 1}), member("b"))
    now = moment(12.0, member("a", fetched_bytes=300, fetches=5, misses={"evicted": 3, "stale": 2}), member("b"))
    rates = rates_by_instance(before, now)
    assert rates == {"a": Rates(100.0, 0.0, 2.0, 2.0), "b": Rates()}
    assert sum_rates(rates) == rates["a"]


@pytest.mark.parametrize(
    ("member_for_s", "expected"),
    [(1.0, 25.0), (50.0, 0.0)],  # started within the two seconds; or seen for the first time, counters of ages ago
)
def test_a_new_life_counts_from_zero(member_for_s, expected):
    before = moment(10.0, member("a", "1" * 16, fetched_bytes=1000))
    now = moment(12.0, member("a", "2" * 16, member_for_s, fetched_bytes=50))
    assert rates_by_instance(before, now)["a"].fetched_bytes == expected


def test_without_a_moment_before_there_are_none():
    now = moment(12.0, member("a", fetched_bytes=50))
    assert rates_by_instance(None, now) == {"a": Rates()}
    assert rates_by_instance(now, now) == {"a": Rates()}
    assert sum_rates({}) == Rates()
