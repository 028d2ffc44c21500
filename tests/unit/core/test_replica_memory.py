"""What a chunk of somebody else costs in memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import pytest

from kvmesh.core.keys import ChunkKey
from kvmesh.core.replica import Replica

CHUNKS = 50_000
FIRST_HOLDER_BYTES = 150
"""Most that a chunk may cost a node's replica."""
FURTHER_HOLDER_BYTES = 20
ENGINE_BYTES = 150
"""Most that it may cost the engine, which keeps the set of visible keys."""


@pytest.mark.parametrize("members", [3, 300])
def test_a_chunk_costs_little_however_many_members_there_are(members: int) -> None:
    """Three holders of the same chunks, each told with key objects of its own as they come off the wire."""
    replica = Replica()
    for number in range(members):
        replica.member_up(f"instance-{number}", "0" * 16)
    costs = [_cost(lambda name=f"instance-{members - 1 - number}": _announce(replica, name)) for number in range(3)]
    assert costs[0] <= FIRST_HOLDER_BYTES, costs
    assert max(costs[1:]) <= FURTHER_HOLDER_BYTES, costs


def test_an_inventory_that_changes_does_not_grow() -> None:
    """Chunks come and go, one at a time: what has gone takes at most a fraction of what is there."""
    replica = Replica()

    def live() -> None:
        replica.member_up("a", "0" * 16)
        _announce(replica, "a")
        for sequence in range(1, CHUNKS + 1):
            removed = [(sequence - 1).to_bytes(36, "little")]
            replica.apply_changes("a", "0" * 16, sequence, [(CHUNKS + sequence - 1).to_bytes(36, "little")], removed)

    assert _cost(live) <= 1.5 * FIRST_HOLDER_BYTES, "a dictionary that is written to may have doubled once"
    assert len(replica) == len(replica.keys_of("a")) == CHUNKS


def test_the_engines_set_is_small() -> None:
    """The engine has key objects of its own, and no holders."""
    visible: set[bytes] = set()
    assert _cost(lambda: visible.update(_keys())) <= ENGINE_BYTES
    assert len(visible) == CHUNKS


def _announce(replica: Replica, name: str) -> None:
    replica.apply_snapshot(name, "0" * 16, 0, _keys(), first=True, last=True)


def _keys() -> list[ChunkKey]:
    return [ChunkKey(number.to_bytes(36, "little")) for number in range(CHUNKS)]


def _cost(action: Callable[[], None]) -> float:
    """Bytes per chunk that stay when the action is done."""
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[0] / CHUNKS
    finally:
        tracemalloc.stop()
