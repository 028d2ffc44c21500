"""The ledger is memory that another process writes: whatever stands there, readers go on and believe no nonsense."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from fuzz.effort import fuzz
from kvmesh.bench.stand_in import make_key
from kvmesh.core.keys import KEY_MAX_BYTES, KEY_MIN_BYTES
from kvmesh.core.ledger import SlotLedger
from kvmesh.node.inventory import Inventory
from kvmesh.transfer.pool import HostPool

SLOTS, CHUNK_BYTES = 6, 512
SIZE = SlotLedger.size_bytes(SLOTS)
scribbles = st.lists(
    st.tuples(
        st.integers(64, SIZE - 1),
        st.binary(min_size=1, max_size=24) | st.sampled_from([b"\xff" * 8, b"\0" * 8, (2**63).to_bytes(8, "little")]),
    ),
    max_size=12,
)


@pytest.fixture
def ledger() -> Iterator[SlotLedger]:
    made = SlotLedger.create(SLOTS, CHUNK_BYTES)
    yield made
    made.close()


def fill(ledger: SlotLedger, pool: HostPool) -> None:
    for slot in range(SLOTS):
        pool.row(slot)[:] = bytes([slot]) * CHUNK_BYTES
        generation = ledger.publish(slot, make_key(str(slot)))
        ledger.set_checksum(slot, generation, xxhash.xxh3_128_digest(pool.row(slot)))


@given(
    content=st.binary(max_size=SIZE), size=st.integers(0, 2 * SIZE), changes=st.lists(st.integers(0, 63), max_size=4)
)
@fuzz(150)
def test_attaching_to_anything(ledger: SlotLedger, content: bytes, size: int, changes: list[int]) -> None:
    """A file that is no whole ledger is refused; one that passes is one that can be read to its end."""
    data = bytearray(os.pread(ledger.fd, SIZE, 0))
    data[64 : 64 + len(content)] = content
    for at in changes:
        data[at] ^= 1 + at
    fd = os.memfd_create("changed")
    os.write(fd, data[:size].ljust(size if size > SIZE else 0, b"\0"))
    try:
        found = SlotLedger.attach(fd)
    except ValueError:
        os.close(fd)
        return
    found.statistics()
    for slot in range(found.slots):
        found.read(slot)
    found.close()


@given(scribbles=scribbles, again=scribbles)
@fuzz(100)
async def test_records_that_somebody_scribbled_over(
    scribbles: list[tuple[int, bytes]], again: list[tuple[int, bytes]]
) -> None:
    """Readers never raise, every key they return could be one, and what is served under a key is what stands there."""
    pool, ledger = HostPool.create(SLOTS, CHUNK_BYTES), SlotLedger.create(SLOTS, CHUNK_BYTES)
    fill(ledger, pool)
    inventory = Inventory(pool, ledger, lambda: None)
    inventory.republish()
    for turn in (scribbles, again):
        for offset, data in turn:
            os.pwrite(ledger.fd, data[: SIZE - offset], offset)
        inventory.retracted(range(SLOTS))
        inventory.published(range(SLOTS), fetched=bool(turn))
        await asyncio.get_running_loop().run_in_executor(inventory._hasher, lambda: None)
        await asyncio.sleep(0)
        for slot in range(SLOTS):
            record = ledger.read(slot)
            if record is not None:
                assert KEY_MIN_BYTES <= len(record.key) <= KEY_MAX_BYTES
                assert record.generation & 1
                checksum = ledger.checksum(slot, record.generation)
                assert checksum is None or len(checksum) == 16
        for key in list(inventory.keys()):
            located = inventory.locate(key)
            if located is not None:
                assert 0 <= located.slot < SLOTS
                assert ledger.is_current(located.slot, located.generation)
        inventory.take_changes(1000)
        ledger.statistics()
    inventory.close()
    ledger.retract_all()
    ledger.close()
    pool.close()


@given(length=st.integers(0, 2**64 - 1))
@fuzz(100)
def test_a_key_length_that_lies_makes_the_record_unreadable(ledger: SlotLedger, length: int) -> None:
    ledger.publish(2, make_key("a"))
    os.pwrite(ledger.fd, length.to_bytes(8, "little"), 64 + 2 * 96 + 8)
    record = ledger.read(2)
    assert (record is None) == (not KEY_MIN_BYTES <= length <= KEY_MAX_BYTES)


def test_a_ledger_cannot_be_cut_short_under_its_readers(ledger: SlotLedger) -> None:
    """That would end every process that has it mapped with SIGBUS."""
    with pytest.raises(PermissionError):
        os.ftruncate(ledger.fd, 64)
    with pytest.raises(PermissionError):
        os.ftruncate(ledger.fd, SIZE * 2)


def test_an_owner_survives_a_generation_that_somebody_scribbled(ledger: SlotLedger) -> None:
    """It is the engine's scheduler that would fall over."""
    ledger.publish(1, make_key("a"))
    os.pwrite(ledger.fd, b"\xff" * 8, 64 + 96)
    assert not ledger.retract(1) & 1
    assert ledger.publish(1, make_key("b")) & 1
    assert ledger.read(1).key == make_key("b")  # type: ignore[union-attr]
