"""The replica: whatever order messages come in, after a snapshot it is the publisher's inventory, and lookups agree
with it.
"""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvmesh.core.keys import ChunkKey
from kvmesh.core.replica import Replica

IDS = ["a", "b", "c"]
KEYS = [ChunkKey(bytes([number]) * 36) for number in range(8)]


class Publisher:
    """An instance's true inventory and what it would send."""

    def __init__(self, incarnation: str) -> None:
        self.incarnation = incarnation
        self.keys: set[ChunkKey] = set()
        self.quarantined: set[ChunkKey] = set()
        self.sequence = 0


class ReplicaMachine(RuleBasedStateMachine):
    """Publishers change; their messages arrive, get lost, or arrive twice; snapshots repair."""

    @initialize()
    def start(self) -> None:
        self.replica = Replica()
        self.publishers: dict[str, Publisher] = {}
        self.visible: set[ChunkKey] = set()
        self.synchronised: set[str] = set()
        self.lives = 0

    def applied(self, applied: object) -> bool:
        appeared, vanished, gap = applied  # type: ignore[misc]
        assert not self.visible & set(appeared), "a key appears only when nobody held it"
        assert set(vanished) <= self.visible, "only a visible key can vanish"
        self.visible = (self.visible - set(vanished)) | set(appeared)
        return bool(gap)

    @rule(name=st.sampled_from(IDS))
    def up(self, name: str) -> None:
        self.lives += 1
        self.publishers[name] = Publisher(f"{self.lives:016x}")
        self.synchronised.discard(name)
        assert not self.applied(self.replica.member_up(name, self.publishers[name].incarnation))
        assert not self.replica.keys_of(name), "a new life starts with nothing"

    @rule(name=st.sampled_from(IDS), stale=st.booleans())
    def down(self, name: str, stale: bool) -> None:
        publisher = self.publishers.get(name)
        if publisher is None:
            return
        self.applied(self.replica.member_down(name, "f" * 16 if stale else publisher.incarnation))
        if not stale:
            del self.publishers[name]
            self.synchronised.discard(name)

    @rule(
        name=st.sampled_from(IDS),
        added=st.sets(st.sampled_from(KEYS)),
        removed=st.sets(st.sampled_from(KEYS)),
        delivered=st.sampled_from(["once", "twice", "lost", "old life"]),
    )
    def change(self, name: str, added: set[ChunkKey], removed: set[ChunkKey], delivered: str) -> None:
        publisher = self.publishers.get(name)
        if publisher is None:
            return
        if delivered == "old life":
            assert not self.applied(self.replica.apply_changes(name, "e" * 16, 1, added, removed))
            return
        publisher.sequence += 1
        publisher.keys = (publisher.keys - removed) | added
        if delivered == "lost":
            self.synchronised.discard(name)
            return
        for _ in range(2 if delivered == "twice" else 1):
            gap = self.applied(
                self.replica.apply_changes(name, publisher.incarnation, publisher.sequence, added, removed)
            )
            assert gap == (name not in self.synchronised)
        if name in self.synchronised:
            publisher.quarantined -= added | removed

    @rule(name=st.sampled_from(IDS), key=st.sampled_from(KEYS), old_life=st.booleans())
    def quarantine(self, name: str, key: ChunkKey, old_life: bool) -> None:
        """A holder that is not to be used for a key; nothing happens to strangers, old lives and keys not held."""
        publisher = self.publishers.get(name)
        incarnation = "d" * 16 if old_life or publisher is None else publisher.incarnation
        held = key in self.replica.keys_of(name)
        assert not self.applied(self.replica.quarantine(name, incarnation, key))
        if publisher is not None and not old_life and held:
            publisher.quarantined.add(key)

    @rule(name=st.sampled_from(IDS), parts=st.integers(1, 3))
    def snapshot(self, name: str, parts: int) -> None:
        publisher = self.publishers.get(name)
        if publisher is None:
            return
        keys = sorted(publisher.keys)
        size = -(-len(keys) // parts) or 1
        pieces = [keys[start : start + size] for start in range(0, len(keys), size)] or [[]]
        for index, piece in enumerate(pieces):
            gap = self.applied(
                self.replica.apply_snapshot(
                    name, publisher.incarnation, publisher.sequence, piece, index == 0, index == len(pieces) - 1
                )
            )
            assert not gap
        if name in self.synchronised:
            publisher.quarantined &= publisher.keys  # a snapshot is no new announcement
        else:
            publisher.quarantined.clear()  # but stands for those that were missed
        self.synchronised.add(name)

    @rule(name=st.sampled_from(IDS))
    def broken_snapshot(self, name: str) -> None:
        """A middle part without its first part asks for everything again and shows nothing."""
        publisher = self.publishers.get(name)
        if publisher is None or name in self.synchronised:
            return
        before = set(self.replica.keys_of(name))
        applied = self.replica.apply_snapshot(name, publisher.incarnation, publisher.sequence, KEYS, False, True)
        assert applied.gap
        assert set(self.replica.keys_of(name)) == before

    @invariant()
    def synchronised_inventories_are_true(self) -> None:
        self.replica.check_integrity()
        for name in self.synchronised:
            assert self.replica.keys_of(name) == self.publishers[name].keys
        assert set(self.replica.keys()) == self.visible
        for key in KEYS:
            holders = set(self.replica.holders(key))
            held = {name for name in self.publishers if key in self.replica.keys_of(name)}
            assert holders == {name for name in held if key not in self.publishers[name].quarantined}
        for name, publisher in self.publishers.items():
            assert self.replica.quarantined(name) == publisher.quarantined
        prefix = self.replica.longest_prefix(KEYS)
        assert all(key in self.visible for key in KEYS[:prefix])
        assert prefix == len(KEYS) or KEYS[prefix] not in self.visible


TestReplica = ReplicaMachine.TestCase


def test_a_stale_snapshot_takes_nothing_back() -> None:
    """A snapshot that was under way while newer changes came is ignored."""
    replica = Replica()
    replica.member_up("a", "0" * 16)
    replica.apply_snapshot("a", "0" * 16, 5, KEYS[:2], True, True)
    replica.apply_changes("a", "0" * 16, 6, KEYS[2:3], [])
    replica.apply_snapshot("a", "0" * 16, 5, KEYS[:2], True, True)
    assert replica.keys_of("a") == set(KEYS[:3])


def test_many_members_reuse_their_bits() -> None:
    """Members come and go for ever; the masks do not grow with the number of lives."""
    replica = Replica()
    for life in range(200):
        replica.member_up("a", f"{life:016x}")
        replica.member_up(f"passing-{life}", "0" * 16)
        replica.apply_snapshot("a", f"{life:016x}", 0, KEYS, True, True)
        replica.member_down(f"passing-{life}", "0" * 16)
    assert max(replica._holders.masks.values()) < 1 << 4
    replica.check_integrity()


def test_quarantine_ends_with_a_new_announcement_or_a_new_life() -> None:
    """The only holder in quarantine: the key is gone for lookups until there is a reason to trust it again."""
    replica = Replica()
    key = KEYS[0]
    replica.member_up("a", "0" * 16)
    replica.apply_snapshot("a", "0" * 16, 5, [key], True, True)
    assert replica.quarantine("a", "0" * 16, key).vanished == [key]
    assert replica.quarantine("a", "0" * 16, key).vanished == []
    assert (key in replica, replica.holders(key), replica.statistics().quarantined) == (False, (), 1)
    replica.apply_snapshot("a", "0" * 16, 5, [key], True, True)
    assert key not in replica, "a snapshot repeats what was known before"
    assert replica.apply_snapshot("a", "0" * 16, 6, [key], True, True).appeared == [key], "it was missed"
    assert replica.quarantine("a", "0" * 16, key).vanished == [key]
    assert replica.apply_changes("a", "0" * 16, 7, [key], []).appeared == [key]
    replica.quarantine("a", "0" * 16, key)
    assert replica.apply_changes("a", "0" * 16, 8, [key], [key]).appeared == [key]
    replica.quarantine("a", "0" * 16, key)
    assert replica.member_up("a", "1" * 16).vanished == []
    assert replica.apply_snapshot("a", "1" * 16, 0, [key], True, True).appeared == [key]
    replica.check_integrity()


def test_a_member_cannot_fill_the_memory() -> None:
    """What goes beyond the limit is not taken in, by changes and by a snapshot without an end; the rest stays right."""
    replica = Replica(max_member_keys=3)
    replica.member_up("a", "0" * 16)
    for part in range(10):
        replica.apply_snapshot("a", "0" * 16, 0, KEYS, part == 0, False)
    assert set(replica.apply_snapshot("a", "0" * 16, 0, [], False, True).appeared) == set(replica.keys())
    assert len(replica) == 3
    replica.apply_changes("a", "0" * 16, 1, KEYS, [])
    assert len(replica) == 3
    replica.apply_changes("a", "0" * 16, 2, KEYS[5:7], list(replica.keys()))
    assert replica.keys_of("a") == set(KEYS[5:7])
    replica.check_integrity()
