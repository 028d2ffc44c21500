"""The planner: a plan is a usable prefix from usable holders, and it says why it stops."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvmesh.core.keys import ChunkKey
from kvmesh.core.plan import FetchItem, plan_fetch
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
        load_bytes=lambda name: load.get(name, 0),
    )
    planned = [item for run in plan.runs for item in run.items]
    assert planned + [item for item, _ in plan.refused] == ITEMS
    for run in plan.runs:
        assert run.items
        assert run.holder not in broken
        assert all(run.holder in replica.holders(item.key) for item in run.items)
    for left, right in zip(plan.runs, plan.runs[1:], strict=False):
        assert left.holder != right.holder, "neighbouring runs of one holder are one run"
    if plan.refused:
        item, reason = plan.refused[0]
        holders = replica.holders(item.key)
        assert set(holders) <= broken
        assert reason is (MissReason.BREAKER_OPEN if holders else MissReason.NOT_PUBLISHED)
        assert all(reason is MissReason.TRUNCATED for _, reason in plan.refused[1:])


def test_the_less_loaded_holder_is_chosen() -> None:
    """With two holders of everything, the one with fewer bytes under way gets the run."""
    replica = make_replica({"a": set(range(10)), "b": set(range(10))})
    plan = plan_fetch(ITEMS, replica, usable=lambda _: None, load_bytes={"a": 5, "b": 1}.__getitem__)
    assert [run.holder for run in plan.runs] == ["b"]
