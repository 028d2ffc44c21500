"""Achieved and achievable hit rates out of what members report."""

from __future__ import annotations

import random

import pytest

from kvmesh.controller.hit_rates import HitRates
from kvmesh.core.sketch import SeenSketch, hash_all, pack_hashes
from kvmesh.wire.directory import UseReport


class Instance:
    """A member that is asked for keys and reports them."""

    def __init__(self, name: str, *, incarnation: str = "0" * 16, limit: int = 100_000) -> None:
        self.name, self.incarnation = name, incarnation
        self.sketch, self.fresh = SeenSketch(limit), []
        self.chunks = self.hits = 0
        self.new = 0.0

    def ask(self, keys, hits=0):
        self.chunks += len(keys)
        self.hits += hits
        for hashed in hash_all(keys):
            weight = self.sketch.add(hashed)
            if weight:
                self.new += weight
                self.fresh.append(hashed)

    def report(self, **changed):
        fields = {
            "instance_id": self.name,
            "incarnation": self.incarnation,
            "requests": self.chunks,
            "chunks": self.chunks,
            "device_chunks": 0,
            "own_chunks": self.hits,
            "peer_chunks": 0,
            "new_alone": self.new,
            "threshold": self.sketch.threshold - 1,
            "hashes": pack_hashes(self.fresh),
        } | changed
        self.fresh = []
        return UseReport(**fields)


def keys(*numbers):
    return [f"key-{number}".encode().rjust(36, b"k") for number in numbers]


@pytest.fixture
def rates():
    return HitRates()


def test_what_one_computed_the_other_could_have_had(rates):
    """Two instances asked for the same ten chunks: the first had to compute them, nobody else."""
    left, right = Instance("left"), Instance("right")
    for one in (left, right):
        rates.add(one.report(), "f", 0)
        one.ask(keys(*range(10)))
        rates.add(one.report(), "f", 1)
    usage = rates.of("left").total, rates.of("right").total, rates.cluster.total
    assert [one.achievable for one in usage] == [0.0, 1.0, 0.5]
    assert [one.achieved for one in usage] == [0.0, 0.0, 0.0]
    assert [one.achievable_alone for one in usage] == [0.0, 0.0, 0.0]


def test_formats_do_not_help_each_other(rates):
    for name, kv_format in (("left", "f"), ("right", "g")):
        one = Instance(name)
        rates.add(one.report(), kv_format, 0)
        one.ask(keys(*range(10)))
        rates.add(one.report(), kv_format, 1)
    assert rates.cluster.total.achievable == 0.0


def test_what_was_before_the_controllers_start_is_known_and_not_counted(rates):
    """A restarted controller gets whole samples first: chunks that were computed long ago are nobody's first."""
    one, other = Instance("one"), Instance("other")
    one.ask(keys(*range(10)))
    rates.add(one.report(), "f", 0)
    rates.add(other.report(), "f", 0)
    assert rates.cluster.total.chunks == 0
    other.ask(keys(*range(10)))
    rates.add(other.report(), "f", 1)
    assert rates.cluster.total.achievable == 1.0


def test_a_new_life_starts_at_its_own_counters(rates):
    one = Instance("one")
    rates.add(one.report(), "f", 0)
    one.ask(keys(1, 2))
    rates.add(one.report(), "f", 0)
    again = Instance("one", incarnation="1" * 16)
    again.ask(keys(3))
    rates.add(again.report(), "f", 0)
    again.ask(keys(1))
    rates.add(again.report(), "f", 0)
    assert (rates.cluster.total.chunks, rates.cluster.total.new_chunks) == (3, 2)


def test_a_member_that_leaves_stays_in_the_sums(rates):
    one = Instance("one")
    rates.add(one.report(), "f", 0)
    one.ask(keys(1, 2))
    rates.add(one.report(), "f", 0)
    rates.forget("one")
    assert rates.of("one") is None
    assert rates.cluster.total.chunks == 2


@pytest.mark.parametrize("seed", range(3))
def test_small_samples_come_close(seed):
    """Four instances with small samples, skewed keys: the estimate is within twice the error that it names itself."""
    source = random.Random(seed)
    rates = HitRates(sample_keys=1024)
    members = [Instance(f"m{number}", limit=512) for number in range(4)]
    for member in members:
        rates.add(member.report(), "f", 0)
    seen, asked = set(), 0
    for _ in range(200):
        member = source.choice(members)
        wanted = keys(*(int(source.paretovariate(0.6)) % 100_000 for _ in range(200)))
        member.ask(wanted)
        seen.update(wanted)
        asked += len(wanted)
        rates.add(member.report(), "f", 0)
    total = rates.cluster.total
    assert total.chunks == asked
    assert total.achievable_error is not None
    assert abs(total.achievable - (1 - len(seen) / asked)) < 2 * total.achievable_error


@pytest.mark.parametrize(
    "lie",
    [
        {"threshold": 0},
        {"hashes": b"\xff" * 80},
        {"hashes": b"abc"},
        {"chunks": 0, "own_chunks": 2**50},
        {"new_alone": 1e18},
    ],
)
def test_a_lie_costs_no_more_than_the_figures(rates, lie):
    one = Instance("one")
    rates.add(one.report(), "f", 0)
    one.ask(keys(*range(10)))
    rates.add(one.report(**lie), "f", 0)
    for usage in (rates.cluster.total, rates.of("one").total):
        for rate in (usage.achieved, usage.achievable, usage.achievable_alone):
            assert rate is None or 0 <= rate <= 1
    assert rates.sampled_keys() <= 10
