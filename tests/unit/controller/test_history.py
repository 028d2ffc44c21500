"""The last hour in equal steps, decaying rates, routes, refusals: all bounded."""

from __future__ import annotations

import pytest

from kvmesh.controller.decaying import TIME_CONSTANT_S, Rate
from kvmesh.controller.history import History
from kvmesh.controller.refusals import MAX_REMEMBERED, Refusals
from kvmesh.controller.traffic import Traffic
from kvmesh.wire.directory import FetchReport


class TestHistory:
    def test_growth_per_step(self):
        """Counters that are sampled often give what they grew by in each step."""
        history = History(("done",), step_s=10.0, steps=3)
        for second in range(51):
            history.sample(100.0 + second, float(second))
        assert history.growth("done") == [10.0, 10.0, 10.0]

    def test_steps_that_nobody_sampled_are_empty(self):
        """A controller that slept for a while shows a hole, and no more steps than fit."""
        history = History(("done",), step_s=10.0, steps=4)
        history.sample(0.0, 0.0)
        history.sample(10.0, 5.0)
        history.sample(45.0, 6.0)
        assert history.growth("done") == [5.0, 1.0, 0.0, 0.0]
        history.sample(1_000_000.0, 7.0)
        assert history.growth("done") == [0.0, 0.0, 0.0, 0.0]

    def test_shares(self):
        """None where there was nothing to be a part of."""
        history = History(("part", "whole"), step_s=1.0)
        for at_s, part, whole in ((0.0, 0, 0), (1.0, 1, 4), (2.0, 1, 4), (3.0, 5, 8)):
            history.sample(at_s, part, whole)
        assert history.shares("part", "whole") == [0.25, None, 1.0]


class TestRate:
    def test_steady_amounts_give_their_rate(self):
        rate = Rate()
        for second in range(200):
            rate.add(50.0, float(second))
        assert rate.per_second(199.0) == pytest.approx(50.0, rel=0.05)

    def test_it_fades_to_nothing(self):
        rate = Rate()
        rate.add(1000.0, 0.0)
        assert rate.per_second(0.0) == pytest.approx(1000.0 / TIME_CONSTANT_S)
        assert 0 < rate.per_second(TIME_CONSTANT_S) < rate.per_second(0.0)
        assert rate.per_second(10 * TIME_CONSTANT_S) == 0.0


def test_routes_are_bounded():
    """The route that was used least recently is forgotten."""
    traffic = Traffic(max_routes=2)
    for now_s, holder in enumerate(("b", "c", "b", "d")):
        traffic.add(report("a", holder), float(now_s))
    assert {route.holder for route in traffic.routes(4.0)} == {"b", "d"}
    assert len(traffic) == 2


def test_a_fetch_of_nothing_is_no_route():
    traffic = Traffic()
    traffic.add(report("a", chunks=0), 0.0)
    traffic.add(report("a", "b", chunks=0), 0.0)
    assert not traffic.routes(0.0)


def test_refusals_are_counted_and_bounded():
    refusals = Refusals()
    for number in range(3 * MAX_REMEMBERED):
        refusals.add(f"10.0.0.{number}", "no key", 0.0)
        refusals.add("10.1.1.1", "no key", float(number))
    recent = refusals.recent(200.0)
    assert len(recent) == MAX_REMEMBERED
    assert recent[0].who == "10.1.1.1"
    assert recent[0].times == 3 * MAX_REMEMBERED
    assert refusals.recent(100_000.0) == []


def report(instance_id: str, *holders: str, chunks: int = 1) -> FetchReport:
    return FetchReport(
        instance_id=instance_id,
        incarnation="0" * 16,
        request_id="r",
        holders=holders,
        transport="tcp",
        chunks_asked=1,
        chunks_fetched=chunks,
        fetched_bytes=100 * chunks,
        seconds=0.1,
        misses={},
    )
