"""From "bytes complete" to "announced", in every order in which the engine's words and the hashing can come."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest
import xxhash
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvmesh.core.ledger import SlotLedger
from kvmesh.node import inventory as inventory_module
from kvmesh.node.inventory import Inventory
from kvmesh.transfer.pool import HostPool
from support.transfer_holder import key

SLOTS, CHUNK_BYTES = 4, 512
KEYS = [key(index) for index in range(6)]


class World:
    """An engine, a node's inventory, and a directory that hears of every change."""

    def __init__(self) -> None:
        self.pool, self.ledger = HostPool.create(SLOTS, CHUNK_BYTES), SlotLedger.create(SLOTS, CHUNK_BYTES)
        self.inventory = Inventory(self.pool, self.ledger, lambda: None)
        self.known: set[bytes] = set()

    def fill(self, slot: int, name: bytes) -> None:
        """As the engine does: take the slot back, write, publish."""
        self.ledger.retract(slot)
        self.pool.row(slot)[:] = name[:8] * (CHUNK_BYTES // 8)
        self.ledger.publish(slot, name)

    async def hashed(self) -> None:
        """All that was given to the hashing thread is done and announced."""
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self.inventory._hasher, lambda: None)
        await asyncio.sleep(0)

    def hear(self, limit: int = 1000) -> None:
        added, removed = self.inventory.take_changes(limit)
        assert set(removed) <= self.known, "what was never announced cannot be taken back"
        self.known = (self.known - set(removed)) | set(added)

    def close(self) -> None:
        self.inventory.close()
        self.inventory._hasher.shutdown()
        self.ledger.close()
        self.pool.close()


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.close()


class InventoryMachine(RuleBasedStateMachine):
    """The engine acts and its messages arrive later, in order; the directory takes changes bit by bit."""

    @initialize()
    def start(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.world = World()
        self.messages: list[tuple[str, list[int]]] = []

    @rule(slot=st.integers(0, SLOTS - 1), name=st.sampled_from(KEYS))
    def store(self, slot: int, name: bytes) -> None:
        held = {self.world.ledger.read(other).key for other in range(SLOTS) if self.world.ledger.read(other)}  # type: ignore[union-attr]
        if name in held:
            return  # engines hold a key once
        if self.world.ledger.generation(slot) & 1:
            self.evict(slot)
        self.world.fill(slot, name)
        self.messages.append(("published", [slot]))

    @rule(slot=st.integers(0, SLOTS - 1))
    def evict(self, slot: int) -> None:
        if self.world.ledger.generation(slot) & 1:
            self.world.ledger.retract(slot)
            self.messages.append(("retracted", [slot]))

    @rule(count=st.integers(1, 4))
    def arrive(self, count: int) -> None:
        async def deliver() -> None:
            for name, slots in self.messages[:count]:
                getattr(self.world.inventory, name)(slots)

        self.loop.run_until_complete(deliver())
        del self.messages[:count]

    @rule()
    def hash(self) -> None:
        self.loop.run_until_complete(self.world.hashed())

    @rule(limit=st.integers(1, 3))
    def take(self, limit: int) -> None:
        self.world.hear(limit)

    @rule()
    def snapshot(self) -> None:
        """As after a restart of the controller: everything at once, pending changes are part of it."""
        self.world.inventory.take_changes(1 << 30)
        self.world.known = set(self.world.inventory.keys())

    @invariant()
    def what_is_located_is_right(self) -> None:
        for name in KEYS:
            located = self.world.inventory.locate(name)
            if located is not None:
                row = self.world.pool.row(located.slot)
                assert bytes(row[:8]) == name[:8]
                assert located.checksum == xxhash.xxh3_128_digest(row)

    def teardown(self) -> None:
        """When all has arrived, the directory knows exactly what the ledger holds."""
        while self.messages:
            self.arrive(4)
        self.hash()
        while self.world.inventory.has_changes():
            self.take(2)
        held = {record.key for slot in range(SLOTS) if (record := self.world.ledger.read(slot)) is not None}
        assert self.world.known == held == set(self.world.inventory.keys())
        assert not self.world.inventory._added
        assert not self.world.inventory._removed
        self.world.close()
        self.loop.close()


TestInventory = InventoryMachine.TestCase
TestInventory.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


async def test_an_older_checksum_never_overwrites_a_newer_one(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slot is taken back and fetched into anew while its old contents are being hashed."""
    world.fill(0, KEYS[0])
    hashing, go_on = threading.Event(), threading.Event()
    real = xxhash.xxh3_128_digest

    def slow(data: memoryview) -> bytes:
        digest = real(data)
        hashing.set()
        go_on.wait(10)
        return digest

    monkeypatch.setattr(world.inventory, "_digest", slow)
    world.inventory.published([0])
    await asyncio.get_running_loop().run_in_executor(None, hashing.wait, 10)
    world.ledger.retract(0)
    world.inventory.retracted([0])
    digest = real(world.pool.row(0))
    world.inventory.filled(0, KEYS[1], digest)
    world.ledger.publish(0, KEYS[1])
    world.inventory.published([0], fetched=True)
    go_on.set()
    await world.hashed()
    assert world.inventory.locate(KEYS[1]).checksum == digest  # type: ignore[union-attr]
    assert world.inventory.keys() == [KEYS[1]]


async def test_a_large_pool_is_announced_bit_by_bit(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only when the last slot is hashed; and the end of the node does not wait for the rest."""
    monkeypatch.setattr(inventory_module, "HASH_BATCH_BYTES", CHUNK_BYTES)
    for slot in range(SLOTS):
        world.fill(slot, KEYS[slot])
    hashed, go_on = threading.Semaphore(0), threading.Semaphore(0)
    real = xxhash.xxh3_128_digest

    def slow(data: memoryview) -> bytes:
        hashed.release()
        go_on.acquire(timeout=10)
        return real(data)

    monkeypatch.setattr(world.inventory, "_digest", slow)
    world.inventory.republish()
    go_on.release()
    while not len(world.inventory):
        await asyncio.sleep(0)
    assert world.inventory.keys() == [KEYS[0]]
    world.inventory.close()
    for _ in range(SLOTS):
        go_on.release()
    world.inventory._hasher.shutdown()
    await asyncio.sleep(0)
    assert len(world.inventory) < SLOTS


async def test_what_a_fetch_left_behind_is_forgotten(world: World) -> None:
    """A slot that was fetched into and then computed anew: the checksum that came with the fetch is not used."""
    world.inventory.filled(0, KEYS[0], b"x" * 16)
    world.fill(0, KEYS[0])
    world.inventory.published([0], fetched=False)
    await world.hashed()
    assert world.inventory.locate(KEYS[0]).checksum == xxhash.xxh3_128_digest(world.pool.row(0))  # type: ignore[union-attr]
    assert not world.inventory._fetched


async def test_a_slot_that_has_moved_on_since_its_fetch_is_hashed(world: World) -> None:
    """Fetched, published, evicted and computed anew under the same key, all before the first word of it arrives: the
    bytes are others now, and so is their checksum.
    """
    world.inventory.filled(0, KEYS[0], b"x" * 16)
    world.ledger.publish(0, KEYS[0])
    world.fill(0, KEYS[0])
    world.inventory.published([0], fetched=True)
    await world.hashed()
    assert world.inventory.locate(KEYS[0]).checksum == xxhash.xxh3_128_digest(world.pool.row(0))  # type: ignore[union-attr]


async def test_changes_that_nobody_takes_are_bounded(world: World) -> None:
    """Without a directory, after any number of stores and evictions, not more than the pool is remembered."""
    for turn in range(300):
        world.fill(turn % SLOTS, key(turn))
        world.inventory.retracted([turn % SLOTS])
        world.inventory.published([turn % SLOTS])
        await world.hashed()
        if turn == 150:
            world.hear()
    assert len(world.inventory._added) <= SLOTS
    assert len(world.inventory._removed) <= SLOTS
