"""Policy `kv`: overlap, load and what peers can supply, weighed in tokens."""

from __future__ import annotations

import random

from kvmesh.router.kv import Kv
from kvmesh.router.policies import Overlap, Query
from unit.router.fleets import backends


def query(
    prompt: int, held: dict[str, int], reachable: dict[str, int] | None = None, keys: tuple[int, ...] = ()
) -> Query:
    return Query(prompt, overlap=Overlap(prompt, held, held if reachable is None else reachable, keys, 256))


def test_the_holder_wins_when_peers_cannot_supply() -> None:
    """Without sharing the prompt would be computed anew elsewhere, unless the holder is busier by more than that."""
    policy, three = Kv(random.Random(0)), backends(3)
    choice = policy.choose(query(4096, {"b1": 4096}), three, 0.0)
    assert (choice.id, choice.reason, choice.work_tokens) == ("b1", "held", 0)
    three[1].load.start(2000, 0.0)
    assert policy.choose(query(4096, {"b1": 4096}), three, 0.0).id == "b1"
    three[1].load.start(8000, 0.0)
    busy = policy.choose(query(4096, {"b1": 4096}), three, 0.0)
    assert busy.id != "b1"
    assert (busy.reason, busy.work_tokens) == ("busy", 4096)


def test_the_least_loaded_wins_when_peers_can_supply() -> None:
    """Pulling is cheap, so a little load at the holder is enough to go elsewhere."""
    policy, three = Kv(random.Random(0), fetch_cost=0.1), backends(3)
    everywhere = {one.id: 4096 for one in three}
    three[0].load.start(300, 0.0)
    three[1].load.start(1000, 0.0)
    choice = policy.choose(query(4096, {"b1": 4096}, everywhere), three, 0.0)
    assert (choice.id, choice.reason) == ("b2", "peers")
    assert choice.work_tokens == 410
    assert choice.cached_tokens == 4096


def test_an_idle_holder_is_preferred_to_a_pull() -> None:
    """Nothing has to move when nobody is busy."""
    policy, three = Kv(random.Random(0), fetch_cost=0.1), backends(3)
    everywhere = {one.id: 4096 for one in three}
    assert policy.choose(query(4096, {"b1": 4096}, everywhere), three, 0.0).id == "b1"


def test_a_burst_with_one_new_prefix_stays_together() -> None:
    """Until the directory has heard of the chunks, the policy remembers whom it has given them."""
    policy, four = Kv(random.Random(1)), backends(4)
    nothing = query(4096, {}, keys=(1, 2, 3, 4, 5, 6, 7, 8))
    first = policy.choose(nothing, four, 0.0)
    assert first.reason == "nothing_held"
    again = policy.choose(nothing, four, 0.1)
    assert (again.id, again.reason, again.cached_tokens) == (first.id, "held", 2048)
    other = policy.choose(nothing, four, 1000.0)
    assert other.reason == "nothing_held", "an old guess is not believed"


def test_without_an_overlap_it_goes_by_load_and_says_why() -> None:
    """Loss of the directory, a prompt in pictures: the request is served all the same."""
    policy, two = Kv(random.Random(0)), backends(2)
    two[0].load.start(5000, 0.0)
    choice = policy.choose(Query(100, overlap_problem="no_directory"), two, 0.0)
    assert (choice.id, choice.reason, choice.work_tokens) == ("b1", "no_directory", 100)
