"""The planner: a plan is a usable prefix from usable holders, and it says why it stops."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvmesh.core.keys import ChunkKey
from kvmesh.core.plan import MAX_HOLDERS, PIECE_BYTES, FetchItem, Load, plan_fetch
from kvmesh.core.reasons import MissReason
from kvmesh.core.replica import Replica

HOLDERS = ["a", "b", "c"]
ITEMS = [FetchItem(ChunkKey(bytes([number]) * 36), number) for number in range(10)]


def make_replica(inventories: dict[str, set[int]]) -> Replica:
    replica = Replica()
    for name, numbers in inventories.items():
        replica.member_up(name, "0" * 16)
        replica.apply_snapshot(name, "0" * 16, 0, [ITEMS[number].key for number in numbers], True, True)
    return replica


@given(
    st.dictionaries(st.sampled_from(HOLDERS), st.sets(st.integers(0, 9))),
    st.sets(st.sampled_from(HOLDERS)),
    st.dictionaries(st.sampled_from(HOLDERS), st.integers(0, 100)),
)
def test_a_plan_is_the_longest_usable_prefix(
    inventories: dict[str, set[int]], broken: set[str], load: dict[str, int]
) -> None:
    """Runs are consecutive, each from a usable holder that has the chunk; what follows the first hole is refused with
    a reason.
    """
    replica = make_replica(inventories)
    plan = plan_fetch(
        ITEMS,
        replica,
        usable=lambda name: MissReason.BREAKER_OPEN if name in broken else None,
        load=lambda name: Load(load.get(name, 0), None),
        chunk_bytes=PIECE_BYTES // 2,
    )
    planned = [item for run in plan.runs for item in run.items]
    assert planned + [item for item, _ in plan.refused] == ITEMS
    for run in plan.runs:
        assert run.items
        assert run.holder not in broken
        assert all(run.holder in replica.holders(item.key) for item in run.items)
    for left, right in zip(plan.runs, plan.runs[1:], strict=False):
        assert left.holder != right.holder, "neighbouring runs of one holder are one run"
    asked = [(run.holder, [item.slot for item in run.items]) for run in plan.by_holder()]
    assert len({holder for holder, _ in asked}) == len(asked)
    assert all(slots == sorted(slots) for _, slots in asked), "each holder is asked in prefix order"
    if plan.refused:
        item, reason = plan.refused[0]
        holders = replica.holders(item.key)
        assert set(holders) <= broken
        assert reason is (MissReason.BREAKER_OPEN if holders else MissReason.NOT_PUBLISHED)
        assert all(reason is MissReason.TRUNCATED for _, reason in plan.refused[1:])


def plan_of(replica: Replica, items: list[FetchItem], loads: dict[str, Load] | None = None, chunk_bytes=PIECE_BYTES):
    plan = plan_fetch(
        items,
        replica,
        usable=lambda _: None,
        load=lambda name: (loads or {}).get(name, Load(0, None)),
        chunk_bytes=chunk_bytes,
    )
    return {run.holder: len(run.items) for run in plan.by_holder()}


def test_the_less_loaded_holder_is_chosen() -> None:
    """A short run goes to the holder with fewer bytes under way."""
    replica = make_replica({"a": set(range(10)), "b": set(range(10))})
    assert plan_of(replica, ITEMS, {"a": Load(5, None), "b": Load(1, None)}, chunk_bytes=1000) == {"b": 10}


def test_a_long_prefix_is_spread_over_all_its_holders_by_what_is_under_way() -> None:
    replica = make_replica({name: set(range(10)) for name in "abc"})
    assert sorted(plan_of(replica, ITEMS).values()) == [3, 3, 4]
    busy = {"a": Load(4 * PIECE_BYTES, None)}
    assert plan_of(replica, ITEMS, busy) == {"a": 1, "b": 5, "c": 4}


def test_each_holder_gets_what_it_can_deliver_in_the_same_time() -> None:
    """A slow one gets little or nothing; who has not been measured is taken to be like the others."""
    replica = make_replica({name: set(range(10)) for name in "abc"})
    loads = {"a": Load(0, 1e-9), "b": Load(0, 4e-9), "c": Load(0, 1e-6)}
    assert plan_of(replica, ITEMS, loads) == {"a": 8, "b": 2}
    assert plan_of(replica, ITEMS, {"a": Load(0, 1e-9)})["b"] == 3


def test_what_only_one_has_counts_for_its_load() -> None:
    """The first chunks are held by one; the rest goes to the other."""
    replica = make_replica({"a": set(range(10)), "b": set(range(4, 10))})
    assert plan_of(replica, ITEMS) == {"a": 5, "b": 5}


def test_a_fetch_is_spread_over_a_bounded_number_of_holders() -> None:
    items = [FetchItem(ChunkKey(bytes([number]) * 36), number) for number in range(99)]
    replica = Replica()
    for number in range(30):
        replica.member_up(f"n{number}", "0" * 16)
        replica.apply_snapshot(f"n{number}", "0" * 16, 0, [item.key for item in items], True, True)
    assert len(plan_of(replica, items)) == MAX_HOLDERS
