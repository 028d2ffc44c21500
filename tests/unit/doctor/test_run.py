"""All checks together, and the summary of misses."""

from __future__ import annotations

import contextlib

import msgspec
import pytest

from kvmesh.client import ControllerApi, ControllerTarget
from kvmesh.client.explanations import Summary
from kvmesh.doctor import examine, look, misses, run
from kvmesh.doctor.findings import Level, ok
from support.fake_controller import fake_controller
from unit.doctor.makers import make_cluster, make_situation, told


def test_a_check_that_breaks_down_does_not_hide_the_others(monkeypatch):
    def broken(_):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(run, "CHECKS", (("bad", broken), ("good", lambda _: [ok("good.one", "it", "well")])))
    found = list(examine(make_situation()))
    assert told(found) == [("bad.check", Level.PROBLEM), ("good.one", Level.OK)]
    assert "a bug" in found[0].message


def test_only_what_was_asked_for(monkeypatch):
    monkeypatch.setattr(run, "CHECKS", tuple((name, lambda _, name=name: [ok(name, "", "")]) for name in "abc"))
    assert [one.check for one in examine(make_situation(), ["c", "a"])] == ["a", "c"]


def test_nothing_known_is_no_problem():
    """On a machine without configuration, and without a controller being asked."""
    assert not [one for one in examine(make_situation()) if one.level is Level.PROBLEM]


def summary(**chunks: int) -> Summary:
    missed = sum(chunks.values())
    listed = [
        {"reason": reason, "chunks": count, "share": count / missed, "text": f"about {reason}", "change": "mend it"}
        for reason, count in chunks.items()
    ]
    shown = {"requests": 10, "chunks": 1000, "found": {"nowhere": missed}, "misses": listed}
    return msgspec.convert(shown, Summary)


@pytest.mark.parametrize(
    ("chunks", "expected"),
    [
        ({"gate_refused": 200, "not_published": 300}, [("misses.gate_refused", Level.WARNING)]),
        ({"evicted": 5}, [("misses.reasons", Level.OK)]),
        ({"not_published": 900}, [("misses.reasons", Level.OK)]),
    ],
)
def test_reasons_that_cost_a_notable_share_are_told(chunks, expected):
    cluster = make_cluster(summary=summary(**chunks))
    assert told(list(misses.check(make_situation(cluster=cluster)))) == expected


def test_a_summary_that_does_not_come_costs_only_itself():
    """As when a node is stopped, for which the controller waits."""
    with fake_controller() as controller:
        controller.refuse("/api/v1/explain/summary", 504, "deadline", "no answer")
        with contextlib.closing(ControllerApi(ControllerTarget.parse(controller.address))) as api:
            assert look(api).summary is None


def test_a_controller_that_does_not_summarise():
    assert told(list(misses.check(make_situation(cluster=make_cluster())))) == [("misses.reasons", Level.SKIPPED)]
