"""The sample of keys: who samples what, and how far off its estimates are."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmesh.core.sketch import EVERYTHING, MIN_THRESHOLD, SeenSketch, hash_all, key_hash, pack_hashes, unpack_hashes

KEYS = st.lists(st.integers(0, 500).map(lambda number: number.to_bytes(36, "big")), max_size=400)


@given(keys=KEYS)
def test_small_sets_are_counted_exactly(keys):
    """Below the limit every key is sampled, and only its first coming counts."""
    sketch = SeenSketch(1000)
    weights = [sketch.add(hashed) for hashed in hash_all(keys)]
    assert sum(weights) == len(set(keys)) == len(sketch) == sketch.estimate()
    assert sketch.rate == 1.0


@given(keys=KEYS, limit=st.integers(1, 50))
def test_the_size_is_bounded_and_the_sample_is_what_lies_below_the_threshold(keys, limit):
    """So two processes that were shown the same keys at the same threshold hold the same sample."""
    sketch = SeenSketch(limit)
    for key in keys:
        sketch.add(key_hash(key))
    assert len(sketch) <= limit
    assert set(sketch.hashes()) == {hashed for hashed in hash_all(keys) if hashed < sketch.threshold}


@given(left=KEYS, right=KEYS, limits=st.tuples(st.integers(1, 50), st.integers(1, 50)))
def test_samples_can_be_united(left, right, limits):
    """At the lower of both thresholds, the union of two samples is the sample of the union."""
    one, two = SeenSketch(limits[0]), SeenSketch(limits[1])
    for sketch, keys in ((one, left), (two, right)):
        for hashed in hash_all(keys):
            sketch.add(hashed)
    united = SeenSketch(10_000)
    for sketch in (one, two):
        united.lower(sketch.threshold)
    for sketch in (one, two):
        for hashed in sketch.hashes():
            united.add(hashed)
    assert set(united.hashes()) == {h for h in hash_all([*left, *right]) if h < united.threshold}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("limit", [256, 4096])
def test_estimates_are_as_close_as_the_size_promises(seed, limit):
    """100,000 different keys, many of them often: within four standard errors, for the estimate and for the weights."""
    source = random.Random(seed)
    sketch, total = SeenSketch(limit), 0.0
    different = 100_000
    for number in range(different):
        hashed = key_hash(f"{seed}-{number}".encode())
        total += sketch.add(hashed)
        if source.random() < 0.2:
            total += sketch.add(key_hash(f"{seed}-{source.randrange(number + 1)}".encode()))
    allowed = 4 * different / math.sqrt(limit * 0.75)
    assert abs(sketch.estimate() - different) < allowed
    assert abs(total - different) < allowed


def test_a_threshold_from_elsewhere_only_falls_and_never_to_nothing():
    sketch = SeenSketch(10)
    sketch.lower(EVERYTHING // 2)
    sketch.lower(EVERYTHING)
    assert sketch.threshold == EVERYTHING // 2
    sketch.lower(-5)
    assert sketch.threshold == MIN_THRESHOLD


@given(hashes=st.lists(st.integers(0, EVERYTHING - 1), max_size=50), tail=st.binary(max_size=7))
def test_hashes_travel(hashes, tail):
    assert unpack_hashes(pack_hashes(hashes) + tail) == hashes
