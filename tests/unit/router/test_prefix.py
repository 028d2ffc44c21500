"""Policy `prefix`, and the memory below it and below `kv`."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from kvmesh.router.policies import Query
from kvmesh.router.prefix import MAX_HOLDERS, Prefix, PrefixMemory
from unit.router.fleets import backends


def ask(policy: Prefix, blocks: list[int], fleet: list, now_s: float = 0.0):
    return policy.choose(Query(len(blocks) * 100, None, blocks, 100), fleet, now_s)


def test_a_conversation_returns_to_its_backend() -> None:
    """Growing prompts follow their beginning."""
    policy, four = Prefix(random.Random(3)), backends(4)
    first = ask(policy, [1, 2, 3, 4], four)
    again = ask(policy, [1, 2, 3, 4, 5, 6], four, 1.0)
    assert again.id == first.id
    assert (again.reason, again.cached_tokens, again.work_tokens) == ("prefix", 400, 400)


def test_a_busy_backend_is_left_when_that_is_cheaper() -> None:
    """Load outweighs a short overlap, and the newcomer is remembered too."""
    policy, two = Prefix(random.Random(3)), backends(2)
    first = ask(policy, [1, 2], two)
    next(one for one in two if one.id == first.id).load.start(50_000, 0.0)
    other = ask(policy, [1, 2, 3], two)
    assert other.id != first.id
    assert other.reason == "busy"


def test_a_forgotten_backend_is_nobody() -> None:
    """A backend that came back with an empty cache has no overlap."""
    policy, one = Prefix(random.Random(0)), backends(1)
    ask(policy, [1, 2], one)
    policy.forget("b0")
    assert ask(policy, [1, 2], one).cached_tokens == 0


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 9), max_size=6), st.sampled_from(["a", "b", "c"]), st.floats(0, 50)),
        max_size=40,
    )
)
def test_the_memory_is_bounded_and_never_invents(steps: list[tuple[list[int], str, float]]) -> None:
    """It holds no more than allowed, and names a backend for a prefix only if that backend was given it."""
    memory, now_s = PrefixMemory(max_entries=12, max_age_s=60.0), 0.0
    given: dict[str, list[list[int]]] = {"a": [], "b": [], "c": []}
    for keys, backend, pause_s in steps:
        now_s += pause_s
        # As chained hashes: a key stands for everything before it.
        chained = [hash(tuple(keys[: end + 1])) for end in range(len(keys))]
        for name, length in memory.match(chained, given, now_s).items():
            assert any(known[:length] == keys[:length] for known in given[name])
        memory.remember(chained, backend, now_s)
        given[backend].append(keys)
        assert len(memory) <= 12 + 1


def test_what_is_not_used_is_forgotten() -> None:
    """After twice the age nothing is left; what is used stays."""
    memory = PrefixMemory(100, max_age_s=10.0)
    memory.remember([1], "a", 0.0)
    memory.remember([2], "a", 0.0)
    for now_s in (8.0, 16.0, 24.0):
        assert memory.match([1], ["a"], now_s) == {"a": 1}
        memory.remember([1], "a", now_s)
    assert memory.match([2], ["a"], 40.0) == {}


def test_a_block_that_many_have_remembers_the_last_ones() -> None:
    """Holders per block are bounded."""
    memory = PrefixMemory(100, 10.0)
    names = [f"b{number}" for number in range(MAX_HOLDERS + 2)]
    for name in names:
        memory.remember([1], name, 0.0)
    assert sorted(memory.match([1], names, 0.0)) == sorted(names[-MAX_HOLDERS:])
