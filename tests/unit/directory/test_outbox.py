"""The numbered changes of one instance, read by several directories at their own pace."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmesh.core.keys import ChunkKey
from kvmesh.core.replica import Replica
from kvmesh.directory import outbox as module
from kvmesh.directory.outbox import Outbox

INCARNATION = "0123456789abcdef"


class Source:
    """An inventory that can be changed by hand."""

    def __init__(self) -> None:
        self.published: set[ChunkKey] = set()
        self.added: list[ChunkKey] = []
        self.removed: list[ChunkKey] = []

    def add(self, *names: str) -> None:
        keys = [ChunkKey(name.encode().ljust(36)) for name in names]
        self.added += [key for key in keys if key not in self.published]
        self.published.update(keys)

    def remove(self, *names: str) -> None:
        for key in (ChunkKey(name.encode().ljust(36)) for name in names):
            if key not in self.published:
                continue
            self.published.remove(key)
            if key in self.added:
                self.added.remove(key)
            else:
                self.removed.append(key)

    def take_changes(self, limit: int) -> tuple[list[ChunkKey], list[ChunkKey]]:
        removed, self.removed = self.removed[:limit], self.removed[limit:]
        room = limit - len(removed)
        added, self.added = self.added[:room], self.added[room:]
        return added, removed

    def keys(self) -> list[ChunkKey]:
        return list(self.published)

    def __contains__(self, key: bytes) -> bool:
        return key in self.published


@pytest.fixture
def source() -> Source:
    return Source()


def make(source: Source, batch_keys: int = 2) -> Outbox:
    return Outbox("me", INCARNATION, source, batch_keys=batch_keys)


def test_everybody_gets_the_same_batches(source: Source) -> None:
    """Two readers at different paces read the same batches under the same numbers."""
    outbox = make(source)
    source.add("a", "b", "c")
    first = outbox.next_after(0)
    assert first is not None
    assert (first.sequence, len(first.added)) == (1, 2)
    second = outbox.next_after(1)
    assert second is not None
    assert outbox.next_after(2) is None
    assert outbox.next_after(0) is first
    source.remove("a")
    third = outbox.next_after(2)
    assert third is not None
    assert third.removed
    assert outbox.next_after(1) is second


def test_the_inventory_has_everything(source: Source) -> None:
    """Its number stands for all changes that nobody has taken before, too."""
    outbox = make(source)
    source.add("a", "b", "c")
    sequence, keys = outbox.inventory()
    assert (sequence, sorted(keys)) == (2, sorted(source.published))
    assert outbox.next_after(sequence) is None


def test_who_is_too_far_behind_is_told_so(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is bounded: old batches go, and `continues` says that they have."""
    monkeypatch.setattr(module, "MAX_KEPT_KEYS", 4)
    outbox = make(source)
    source.add(*"abcdefgh")
    outbox.inventory()
    assert outbox.sequence == 4
    assert not outbox.continues(0)
    assert not outbox.continues(1)
    assert outbox.next_after(1) is None
    assert outbox.continues(2)
    assert outbox.next_after(2) is not None
    assert not outbox.continues(5)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9), st.integers(0, 2)), max_size=60))
def test_any_mixture_of_readers_agrees(steps: list[tuple[bool, int, int]]) -> None:
    """One reader takes batches, the other now and then the inventory: both know the same in the end."""
    source = Source()
    outbox = make(source)
    batches, mixed = Replica(), Replica()
    at = {"batches": 0, "mixed": 0}
    for replica in (batches, mixed):
        replica.member_up("me", INCARNATION)
        replica.apply_snapshot("me", INCARNATION, 0, [], first=True, last=True)

    def read(replica: Replica, name: str) -> None:
        while (batch := outbox.next_after(at[name])) is not None:
            assert not replica.apply_changes("me", INCARNATION, batch.sequence, batch.added, batch.removed).gap
            at[name] = batch.sequence

    for is_added, name, reader in steps:
        (source.add if is_added else source.remove)(str(name))
        if reader == 1:
            read(batches, "batches")
        elif reader == 2:
            at["mixed"], keys = outbox.inventory()
            mixed.apply_snapshot("me", INCARNATION, at["mixed"], keys, first=True, last=True)
    read(batches, "batches")
    read(mixed, "mixed")
    assert batches.keys_of("me") == mixed.keys_of("me") == source.published
