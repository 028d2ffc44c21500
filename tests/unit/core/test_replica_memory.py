"""What a chunk of somebody else costs in memory."""

from __future__ import annotations

import tracemalloc

from kvmesh.core.keys import ChunkKey
from kvmesh.core.replica import Replica

CHUNKS = 50_000
LIMIT_BYTES = 300
"""Per chunk and holder: replica in the node and visible set in the engine together."""


def test_a_chunk_costs_at_most_300_bytes_per_holder() -> None:
    """Three holders of the same chunks, as the node keeps them, and the engine's set of visible keys."""
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        replica = Replica()
        visible: set[bytes] = set()
        costs = []
        for holder in range(3):
            name = f"instance-{holder}"
            replica.member_up(name, "0" * 16)
            keys = [ChunkKey(number.to_bytes(36, "little")) for number in range(CHUNKS)]
            applied = replica.apply_snapshot(name, "0" * 16, 0, keys, first=True, last=True)
            visible.update(bytes(bytearray(key)) for key in applied.appeared)  # the engine has objects of its own
            del keys, applied
            now, _ = tracemalloc.get_traced_memory()
            costs.append((now - before) / CHUNKS)
            before = now
    finally:
        tracemalloc.stop()
    assert len(visible) == CHUNKS
    assert max(costs) <= LIMIT_BYTES, costs
    assert costs[1] < costs[0] / 2, "a second holder of known chunks costs little"
