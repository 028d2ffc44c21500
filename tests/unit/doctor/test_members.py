"""What the controller knows of its members, judged."""

from __future__ import annotations

import pytest

from kvmesh.client import Departed, Health
from kvmesh.doctor import clock, members
from kvmesh.doctor.findings import Level
from kvmesh.doctor.situation import Clock
from kvmesh.errors import DirectoryUnavailableError
from unit.doctor.makers import make_cluster, make_situation, member, told


def findings(*listed, **changed):
    return list(members.check(make_situation(cluster=make_cluster(*listed, **changed))))


def test_two_members_that_are_well():
    assert told(findings(member("a"), member("b"))) == [("member.present", Level.OK), ("member.heartbeat", Level.OK)]


def test_nobody_and_nobody_else():
    assert told(findings()) == [("member.present", Level.PROBLEM)]
    assert told(findings(member("a")))[0] == ("member.present", Level.WARNING)


def test_a_silent_member_is_named():
    found = findings(member("a"), member("b", state="suspect", last_contact_age_s=4.2))
    silent = next(one for one in found if one.check == "member.heartbeat")
    assert (silent.level, silent.about) == (Level.PROBLEM, "b")
    assert "silent for 4.2 s" in silent.message


def test_a_member_that_timed_out_is_told_until_it_is_back():
    gone = [Departed("c", "0" * 16, "10.0.0.3:8200", "timeout", 30.0), Departed("d", "0" * 16, "x:1", "left", 9.0)]
    assert ("member.heartbeat", Level.WARNING) in told(findings(member("a"), member("b"), departed=gone))
    back = findings(member("a"), member("c"), departed=gone)
    assert ("member.heartbeat", Level.WARNING) not in told(back)


@pytest.mark.parametrize(
    ("changed", "check", "level"),
    [
        ({"chunks": 1000, "pool_use": 1.0}, "pool.full", Level.WARNING),
        ({"corrupt_chunks": 2}, "member.corrupt", Level.PROBLEM),
        ({"behind_bytes": 5 << 20}, "member.behind", Level.WARNING),
        ({"inventory_known": False}, "member.inventory", Level.WARNING),
    ],
)
def test_trouble_of_one_member(changed, check, level):
    found = findings(member("a"), member("b", **changed))
    assert told(found)[2:] == [(check, level)]
    assert found[2].about == "b"
    assert found[2].advice


def test_a_member_that_has_just_come_may_still_owe_its_inventory():
    found = findings(member("a"), member("b", inventory_known=False, member_for_s=1.0))
    assert len(found) == 2


def test_the_controller_itself():
    well = make_situation(cluster=make_cluster())
    ill = make_situation(cluster=make_cluster(health=Health("unhealthy", problems=["a task has died"])))
    error = DirectoryUnavailableError("controller at http://x:1", "an answer", "refused", "start one")
    away = make_situation(cluster_error=error)
    assert told(list(members.controller(well))) == [("controller.answers", Level.OK)]
    assert told(list(members.controller(ill))) == [
        ("controller.answers", Level.OK),
        ("controller.health", Level.PROBLEM),
    ]
    assert told(list(members.controller(away))) == [("controller.answers", Level.PROBLEM)]
    assert told(list(members.controller(make_situation()))) == [("controller.answers", Level.SKIPPED)]


@pytest.mark.parametrize(
    ("controller_s", "level"),
    [(1000.0, Level.OK), (999.0, Level.OK), (1002.0, Level.OK), (990.0, Level.WARNING), (1010.0, Level.WARNING)],
)
def test_clocks_are_apart_only_when_rounding_does_not_explain_it(controller_s, level):
    assert clock.skew(Clock(controller_s, before_s=1000.5, after_s=1000.6)).level is level


def test_an_unknown_time_is_no_finding():
    assert told(list(clock.check(make_situation(cluster=make_cluster())))) == [("clock.skew", Level.SKIPPED)]
