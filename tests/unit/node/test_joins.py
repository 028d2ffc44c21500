"""One fetch per key: whoever waits for another job's chunk hears of its end, whatever that is."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence

import pytest

from kvmesh.core.keys import ChunkKey
from kvmesh.core.plan import FetchItem
from kvmesh.core.reasons import MissReason
from kvmesh.node.joins import UnderWay
from kvmesh.transfer.base import ChunkOutcome
from kvmesh.transfer.pool import HostPool
from support.transfer_holder import key

FOR_EVER_S = 1e9
KEY = ChunkKey(key(0))


class BrokenCopies(UnderWay):
    def _copy(self, source: int, slots: Sequence[int]) -> None:
        raise ValueError(f"no slot {source}")


@pytest.fixture
def pool() -> Iterator[HostPool]:
    made = HostPool.create(4, 4096)
    yield made
    made.close()


def hit(slot: int) -> ChunkOutcome:
    return ChunkOutcome(FetchItem(KEY, slot), None, bytes(16))


async def test_a_failed_copy_is_a_miss_for_those_who_wait(pool: HostPool) -> None:
    """They can ask themselves; the job that fetched the chunk has it all the same, and its key is free again."""
    under_way = BrokenCopies(pool)
    under_way.claim([FetchItem(KEY, 0)])
    _, joiners = under_way.claim([FetchItem(KEY, 1), FetchItem(KEY, 2)])
    waits = asyncio.gather(*(under_way.wait(joiner, FOR_EVER_S) for joiner in joiners))
    await under_way.settle([hit(0)])
    assert await waits == [ChunkOutcome(FetchItem(KEY, slot), MissReason.PEER_LOST, None) for slot in (1, 2)]
    assert under_way.joined_chunks == 0
    own, others = under_way.claim([FetchItem(KEY, 1)])
    assert (len(own), len(others)) == (1, 0)


async def test_a_job_may_settle_before_the_one_that_joined_it_takes_another_step(pool: HostPool) -> None:
    """Claimed is joined: between the claim and the wait the loop may run whatever it likes."""
    under_way = UnderWay(pool)
    under_way.claim([FetchItem(KEY, 0)])
    _, (joiner,) = under_way.claim([FetchItem(KEY, 1)])
    pool.row(0)[:] = bytes([7]) * 4096
    await under_way.settle([hit(0)])
    assert await under_way.wait(joiner, FOR_EVER_S) == hit(1)
    assert bytes(pool.row(1)) == bytes(pool.row(0))


async def test_nobody_writes_into_the_slot_of_who_has_left(pool: HostPool) -> None:
    under_way = UnderWay(pool)
    under_way.claim([FetchItem(KEY, 0)])
    _, (leaver, late) = under_way.claim([FetchItem(KEY, 1), FetchItem(KEY, 2)])
    under_way.leave(leaver)
    outcome = await under_way.wait(late, time.monotonic())
    assert outcome.reason is MissReason.DEADLINE
    pool.row(0)[:] = bytes([7]) * 4096
    await under_way.settle([hit(0)])
    assert not any(bytes(pool.row(1)))
    assert not any(bytes(pool.row(2)))
    assert under_way.joined_chunks == 0
