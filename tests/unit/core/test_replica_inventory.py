"""Inventories and masks of one replica: the lists are a superset of what is held, and nobody can tell."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvmesh.core import replica_inventory
from kvmesh.core.keys import ChunkKey
from kvmesh.core.replica_inventory import Holders, Inventory

KEYS = [bytes([number]) * 36 for number in range(12)]
LIMIT = 8
MEMBERS = st.integers(0, 2)
SOME_KEYS = st.lists(st.sampled_from(KEYS), max_size=6)


class InventoryMachine(RuleBasedStateMachine):
    """Three members take up and let go of keys; a model of plain sets says what must come of it."""

    @initialize(stale_keys=st.sampled_from([0, 3, 64]))
    def start(self, stale_keys: int) -> None:
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(replica_inventory, "STALE_KEYS", stale_keys)
        self.patch.setattr(replica_inventory, "MAX_SHARED_MASKS", 2)
        self.holders = Holders()
        self.inventories = [Inventory(self.holders, 1 << 40 + number) for number in range(3)]
        self.held: list[set[bytes]] = [set(), set(), set()]
        self.unused: list[set[bytes]] = [set(), set(), set()]

    def teardown(self) -> None:
        if hasattr(self, "patch"):
            self.patch.undo()

    def used(self) -> set[bytes]:
        return set().union(*(held - unused for held, unused in zip(self.held, self.unused, strict=True)))

    @rule(member=MEMBERS, keys=SOME_KEYS)
    def add(self, member: int, keys: list[bytes]) -> None:
        before = self.used()
        appeared = self.inventories[member].add([bytes(bytearray(key)) for key in keys], LIMIT)
        for key in keys:
            if key in self.held[member] or len(self.held[member]) < LIMIT:
                self.held[member].add(key)
                self.unused[member].discard(key)
        assert sorted(appeared) == sorted(self.used() - before)

    @rule(member=MEMBERS, keys=SOME_KEYS)
    def remove(self, member: int, keys: list[bytes]) -> None:
        before = self.used()
        vanished = self.inventories[member].remove(keys)
        self.held[member] -= set(keys)
        self.unused[member] -= set(keys)
        assert sorted(vanished) == sorted(before - self.used())

    @rule(member=MEMBERS, key=st.sampled_from(KEYS))
    def quarantine(self, member: int, key: bytes) -> None:
        before = self.used()
        vanished = self.inventories[member].quarantine(ChunkKey(key))
        if key in self.held[member]:
            self.unused[member].add(key)
        assert vanished == sorted(before - self.used())

    @rule(member=MEMBERS)
    def go(self, member: int) -> None:
        before = self.used()
        vanished = self.inventories[member].remove_all()
        self.held[member], self.unused[member] = set(), set()
        assert sorted(vanished) == sorted(before - self.used())

    @rule(member=MEMBERS)
    def look(self, member: int) -> None:
        """Each key once, although the list may have it more often."""
        assert sorted(self.inventories[member]) == sorted(self.held[member])
        assert self.inventories[member] == self.held[member]

    @invariant()
    def all_agree(self) -> None:
        assert set(self.holders.masks) == self.used()
        for number, inventory in enumerate(self.inventories):
            assert inventory.check_integrity() == self.held[number] - self.unused[number]
            assert len(inventory) == len(self.held[number])
            assert inventory.quarantined == self.unused[number]
            for key in KEYS:
                assert (key in inventory) == (key in self.held[number])
                is_used = key in self.held[number] - self.unused[number]
                assert bool(self.holders.masks.get(key, 0) & inventory.bit) == is_used


TestInventory = InventoryMachine.TestCase


def test_equal_keys_and_equal_masks_are_one_object() -> None:
    """Whoever announces a chunk, its key is stored once; so is the mask of those who hold the same."""
    holders = Holders()
    first, second = Inventory(holders, 1 << 100), Inventory(holders, 1 << 101)
    for inventory in (first, second):
        inventory.add([bytes(bytearray(key)) for key in KEYS], LIMIT)
    stored = {key: key for key in holders.masks}
    assert all(key is stored[key] for inventory in (first, second) for key in inventory)
    assert len({id(mask) for mask in holders.masks.values()}) == 1
