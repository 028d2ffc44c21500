"""Policies that know nothing of prompts: turns, load, sessions."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmesh.router.kv import Kv
from kvmesh.router.policies import LeastLoad, Overlap, Policy, Query, RoundRobin, Session, cheapest
from kvmesh.router.prefix import Prefix
from unit.router.fleets import FakeBackend, backends

POLICIES = {
    "roundrobin": lambda rng: RoundRobin(),
    "leastload": LeastLoad,
    "session": Session,
    "prefix": Prefix,
    "kv": Kv,
}


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_every_policy_chooses_a_candidate(name: str, data: st.DataObject) -> None:
    """Whatever comes and goes, the choice is one of those that are there, and the tokens add up."""
    policy: Policy = POLICIES[name](random.Random(0))
    everybody = backends(5)
    now_s = 0.0
    for _ in range(data.draw(st.integers(1, 12))):
        present = data.draw(st.lists(st.sampled_from(everybody), min_size=1, unique_by=lambda one: one.id))
        now_s += data.draw(st.floats(0, 100))
        tokens = data.draw(st.integers(0, 5000))
        chunks = data.draw(st.lists(st.integers(0, 3), max_size=4))
        held = data.draw(st.dictionaries(st.sampled_from([one.id for one in everybody]), st.integers(0, 6000)))
        overlap = None if data.draw(st.booleans()) else Overlap(tokens, held, held, chunks, 256)
        query = Query(tokens, data.draw(st.sampled_from([None, "a", "b"])), chunks, 256, overlap)
        choice = policy.choose(query, present, now_s)
        assert choice.id in [one.id for one in present]
        assert 0 <= choice.cached_tokens <= tokens
        assert 0 <= choice.work_tokens <= tokens
        next(one for one in present if one.id == choice.id).load.start(choice.work_tokens, now_s)
        if data.draw(st.booleans()):
            policy.forget(data.draw(st.sampled_from([one.id for one in everybody])))


def test_round_robin_takes_turns() -> None:
    """Everybody once before anybody twice."""
    policy, three = RoundRobin(), backends(3)
    order = [policy.choose(Query(), three, 0.0).id for _ in range(6)]
    assert order == ["b0", "b1", "b2", "b0", "b1", "b2"]


def test_round_robin_stays_fair_when_backends_change() -> None:
    """One that is away for a while does not get all the turns that it has missed."""
    policy, three = RoundRobin(), backends(3)
    for _ in range(100):
        policy.choose(Query(), three[:2], 0.0)
    counts = Counter(policy.choose(Query(), three, 0.0).id for _ in range(30))
    assert set(counts.values()) == {10}


def test_least_load_prefers_the_idle_one() -> None:
    """A backend with work waiting gets nothing while another is idle."""
    policy, two = LeastLoad(random.Random(1)), backends(2)
    two[0].load.start(10_000, 0.0)
    assert {policy.choose(Query(), two, 0.0).id for _ in range(20)} == {"b1"}


def test_least_load_does_not_herd() -> None:
    """Many short requests, each over before the next comes, are spread: recent work counts."""
    policy, four = LeastLoad(random.Random(1)), backends(4)
    for number in range(400):
        choice = policy.choose(Query(prompt_tokens=100), four, number * 0.001)
        next(one for one in four if one.id == choice.id).load.start(100, number * 0.001).end()
    counts = [one.load.assigned for one in four]
    assert max(counts) <= 1.2 * min(counts)


def test_equal_costs_are_broken_at_random() -> None:
    """Routers with the same view do not all choose the same backend."""
    rng = random.Random(2)
    assert len({cheapest([5.0, 5.0, 5.0, 9.0], rng) for _ in range(50)}) == 3
    assert cheapest([0.0, 1.0], rng) == 0


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(min_size=1), min_size=1, max_size=30, unique=True), st.integers(0, 7))
def test_sessions_stay_when_another_backend_goes(sessions: list[str], gone: int) -> None:
    """Only the sessions of the backend that went move, and they come back with it."""
    policy, eight = Session(random.Random(0)), backends(8)
    before = {session: policy.choose(Query(session=session), eight, 0.0).id for session in sessions}
    rest = [one for one in eight if one.id != f"b{gone}"]
    for session in sessions:
        moved = policy.choose(Query(session=session), rest, 0.0).id
        assert moved == before[session] or before[session] == f"b{gone}"
        assert policy.choose(Query(session=session), eight, 0.0).id == before[session]


def test_sessions_are_spread_and_agreed_upon() -> None:
    """A thousand sessions over eight backends: no one has twice its share, and another router decides the same."""
    eight = backends(8)
    first, second = Session(random.Random(1)), Session(random.Random(2))
    chosen = [first.choose(Query(session=f"s{number}"), eight, 0.0).id for number in range(1000)]
    assert chosen == [second.choose(Query(session=f"s{number}"), eight[::-1], 0.0).id for number in range(1000)]
    assert max(Counter(chosen).values()) < 2 * 1000 / 8


def test_a_request_without_a_session_goes_by_load() -> None:
    """And says so."""
    two = backends(2)
    two[0].load.start(10_000, 0.0)
    choice = Session(random.Random(0)).choose(Query(), two, 0.0)
    assert (choice.id, choice.reason) == ("b1", "no_session")


def test_a_lone_surrogate_in_a_session_does_no_harm() -> None:
    """JSON can name a session that is no valid text."""
    assert Session(random.Random(0)).choose(Query(session="\ud800"), [FakeBackend("x")], 0.0).id == "x"
