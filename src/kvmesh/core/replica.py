"""The directory replica: which instances hold which chunks, as far as this process has heard.

Pure state: no clock, no I/O. A node feeds it what the directory sends; the controller keeps one per format as its
registry of inventories. A replica is a hint. It may name a holder that no longer has the chunk (the fetch then
misses), and it may not know a holder yet (the chunk is then computed); neither can cause wrong bytes.

Consistency rests on two numbers. An *incarnation* names one life of an instance: entries of an older life vanish at
once. A
*sequence number* orders a publisher's changes: whatever does not continue the sequence is a gap, the publisher's
changes are then ignored, and a snapshot (its whole inventory) puts things right.

A holder that delivered bad bytes for a key, or again and again nothing, is put in *quarantine* for that key: it is not
named as its holder until it announces the key anew or starts a new life. A snapshot says again what it said before, so
it lifts nothing; unless it stands for changes that were missed, because these may have announced the key anew.

Memory. One dictionary says who holds a key, as a bit mask, and so also what a member holds; an inventory is a mere
list, there to be gone through (`kvmesh.core.replica_inventory`). Keys and masks are objects, so equal ones are kept
once: however many hold a chunk, its key is there once, and another holder costs a place in a list.

Not thread-safe: one thread owns it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from itertools import islice
from typing import NamedTuple, cast

from kvmesh.core.keys import ChunkKey
from kvmesh.core.replica_inventory import Holders, Inventory


class Applied(NamedTuple):
    """What an input did to the replica as a whole."""

    appeared: list[ChunkKey]
    """Keys that got their first holder."""
    vanished: list[ChunkKey]
    """Keys that lost their last holder."""
    gap: bool = False
    """The input did not continue the sequence: ask for a snapshot of this publisher."""


class ReplicaStatistics(NamedTuple):
    """Sizes, for metrics."""

    members: int
    waiting: int
    """Members whose inventory is unknown until a snapshot has come."""
    keys: int
    entries: int
    """Pairs of key and holder, those in quarantine included."""
    quarantined: int
    """Pairs that are not used."""


NOTHING = Applied([], [])

MAX_MEMBER_KEYS = 4_000_000
"""What one member can make us remember (under 600 MB): further keys are not taken in, which costs only hits."""


class _Member:
    """One incarnation of an instance."""

    __slots__ = ("incarnation", "inventory", "sequence", "snapshot")

    def __init__(self, incarnation: str, inventory: Inventory) -> None:
        self.incarnation = incarnation
        self.inventory = inventory
        self.sequence: int | None = None
        self.snapshot: set[ChunkKey] | None = None
        """Parts of a snapshot received so far; None when none is under way."""


class Replica:
    """Holders by key, inventories by instance."""

    def __init__(self, max_member_keys: int = MAX_MEMBER_KEYS) -> None:
        self._max_member_keys = max_member_keys
        self._members: dict[str, _Member] = {}
        self._names: dict[int, str] = {}
        """Instance id by bit number."""
        self._free_bits: list[int] = []
        self._holders = Holders()
        self._masks = self._holders.masks

    # -- membership ----------------------------------------------------------------------------------------------------

    def member_up(self, instance_id: str, incarnation: str) -> Applied:
        """Learn of a life of an instance. An older life's entries are dropped; the same life again changes nothing."""
        known = self._members.get(instance_id)
        if known is not None and known.incarnation == incarnation:
            return NOTHING
        applied = NOTHING if known is None else self.member_down(instance_id, known.incarnation)
        bit_number = self._free_bits.pop() if self._free_bits else len(self._names)
        self._names[bit_number] = instance_id
        self._members[instance_id] = _Member(incarnation, Inventory(self._holders, 1 << bit_number))
        return applied

    def member_down(self, instance_id: str, incarnation: str) -> Applied:
        """Forget a life of an instance. Another incarnation than the known one is ignored: it is gone already."""
        member = self._members.get(instance_id)
        if member is None or member.incarnation != incarnation:
            return NOTHING
        vanished = member.inventory.remove_all()
        del self._members[instance_id]
        bit_number = member.inventory.bit.bit_length() - 1
        del self._names[bit_number]
        self._free_bits.append(bit_number)
        return Applied([], vanished)

    def incarnation(self, instance_id: str) -> str | None:
        member = self._members.get(instance_id)
        return None if member is None else member.incarnation

    def members(self) -> list[str]:
        return list(self._members)

    # -- inventories ---------------------------------------------------------------------------------------------------

    def apply_changes(
        self, instance_id: str, incarnation: str, sequence: int, added: Iterable[bytes], removed: Iterable[bytes]
    ) -> Applied:
        """Apply one batch: removals, then additions. Old batches and strangers' are ignored; a hole in the numbers is
        a gap.
        """
        member = self._members.get(instance_id)
        if member is None or member.incarnation != incarnation:
            return NOTHING
        if member.sequence is None:
            return Applied([], [], gap=member.snapshot is None)
        if sequence <= member.sequence:
            return NOTHING
        if sequence != member.sequence + 1:
            member.sequence = None
            return Applied([], [], gap=True)
        member.sequence = sequence
        vanished = member.inventory.remove(removed)
        appeared = member.inventory.add(added, self._max_member_keys)
        if vanished and appeared:
            both = set(vanished).intersection(appeared)
            if both:
                vanished = [key for key in vanished if key not in both]
                appeared = [key for key in appeared if key not in both]
        return Applied(appeared, vanished)

    def apply_snapshot(
        self, instance_id: str, incarnation: str, sequence: int, keys: Iterable[bytes], first: bool, last: bool
    ) -> Applied:
        """Apply one part of an inventory; nothing is visible before the last part. A middle part without its first is
        a gap.

        A snapshot older than what is known is ignored: changes that came after it are not taken back.
        """
        member = self._members.get(instance_id)
        if member is None or member.incarnation != incarnation:
            return NOTHING
        if member.sequence is not None and sequence < member.sequence:
            return NOTHING
        if first:
            member.snapshot = set()
        if member.snapshot is None:
            return Applied([], [], gap=True)
        member.snapshot.update(map(ChunkKey, islice(keys, self._max_member_keys - len(member.snapshot))))
        if not last:
            return NOTHING
        has_missed = member.sequence is None or sequence > member.sequence
        whole, member.snapshot, member.sequence = member.snapshot, None, sequence
        inventory = member.inventory
        vanished = inventory.remove([key for key in inventory if key not in whole])
        news = whole if has_missed or not inventory.quarantined else whole - inventory.quarantined
        return Applied(inventory.add(news, self._max_member_keys), vanished)

    def quarantine(self, instance_id: str, incarnation: str, key: bytes) -> Applied:
        """Stop naming this life of the instance as a holder of `key`, until it announces the key anew (or may have done
        so in changes that were missed).

        Strangers, older lives and keys that the instance does not hold are ignored.
        """
        member = self._members.get(instance_id)
        if member is None or member.incarnation != incarnation:
            return NOTHING
        return Applied([], member.inventory.quarantine(ChunkKey(key)))

    def quarantined(self, instance_id: str) -> AbstractSet[ChunkKey]:
        """Keys for which this instance is not used."""
        member = self._members.get(instance_id)
        return frozenset() if member is None else member.inventory.quarantined

    def mark_stale(self, instance_id: str) -> None:
        """Treat the instance's inventory as behind: its next change is a gap. Entries stay as hints meanwhile."""
        member = self._members.get(instance_id)
        if member is not None:
            member.sequence = None
            member.snapshot = None

    def sequence(self, instance_id: str) -> int | None:
        """Number of the last change applied; None for strangers and while a snapshot is awaited."""
        member = self._members.get(instance_id)
        return None if member is None else member.sequence

    # -- lookups -------------------------------------------------------------------------------------------------------

    def __contains__(self, key: bytes) -> bool:
        return key in self._masks

    def __len__(self) -> int:
        return len(self._masks)

    def keys(self) -> AbstractSet[ChunkKey]:
        """Every key that has a holder."""
        return cast("AbstractSet[ChunkKey]", self._masks.keys())

    def holders(self, key: bytes) -> tuple[str, ...]:
        """Instance ids of the holders of one key, oldest member first; empty when nobody is known to hold it."""
        mask = self._masks.get(key, 0)
        found = []
        while mask:
            bit = mask & -mask
            found.append(self._names[bit.bit_length() - 1])
            mask ^= bit
        return tuple(found)

    def longest_prefix(self, keys: Sequence[bytes]) -> int:
        """How many leading keys have a holder."""
        for index, key in enumerate(keys):
            if key not in self._masks:
                return index
        return len(keys)

    def clear_inventories(self) -> Applied:
        """Forget what everybody holds; members stay, and wait for snapshots."""
        vanished = list(self.keys())
        self._masks.clear()
        for member in self._members.values():
            member.inventory.clear()
            member.sequence = member.snapshot = None
        return Applied([], vanished)

    def keys_of(self, instance_id: str) -> AbstractSet[ChunkKey]:
        """The inventory of one instance; empty for strangers."""
        member = self._members.get(instance_id)
        return frozenset() if member is None else member.inventory

    # -- care ----------------------------------------------------------------------------------------------------------

    def statistics(self) -> ReplicaStatistics:
        return ReplicaStatistics(
            members=len(self._members),
            waiting=sum(1 for member in self._members.values() if member.sequence is None),
            keys=len(self._masks),
            entries=sum(len(member.inventory) for member in self._members.values()),
            quarantined=sum(len(member.inventory.quarantined) for member in self._members.values()),
        )

    def check_integrity(self) -> None:
        """Raise AssertionError when masks and inventories disagree. For tests and debug mode: reads everything."""
        expected: dict[bytes, int] = {}
        bits = 0
        for instance_id, member in self._members.items():
            bit = member.inventory.bit
            assert self._names[bit.bit_length() - 1] == instance_id
            assert not bits & bit, f"two members share a bit: {instance_id}"
            bits |= bit
            for key in member.inventory.check_integrity():
                expected[key] = expected.get(key, 0) | bit
        assert expected == self._masks
