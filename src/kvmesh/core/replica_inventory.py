"""What one member of a replica holds, in little memory.

A replica's memory is that of its keys (69 bytes each), of the dictionary from key to holders (about 52) and of the
inventories. A set of its keys would cost a member 42 bytes for each, and 69 more for a key object of its own if others
hold the chunk too. But the dictionary knows already whether a member holds a key: its bit is in the key's mask. So an
inventory is a list (9 bytes for each key), which serves only to be gone through, and it refers to the dictionary's own
key objects.

A removed key stays in the list until an eighth of it is such, or until somebody goes through it; so to remove a key
costs the same however long the list is. Masks are shared between the keys that have the same holders.

Not thread-safe, like the replica.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet

from kvmesh.core.keys import ChunkKey

STALE_SHARE = 8
"""A list is tidied when one in so many of its keys is not held any more."""
STALE_KEYS = 64
"""Fewer are never worth it."""
MAX_SHARED_MASKS = 4096
"""Sets of holders whose masks are kept to be shared. Beyond them it starts over, which costs memory only."""


class Holders:
    """Who holds a key: a bit mask of members."""

    def __init__(self) -> None:
        self.masks: dict[bytes, int] = {}
        """Never 0: a key without holders is not there."""
        self._shared: dict[int, int] = {}
        self._probe = _Probe()

    def share(self, mask: int) -> int:
        """The one object for this mask."""
        if len(self._shared) >= MAX_SHARED_MASKS:
            self._shared.clear()
        return self._shared.setdefault(mask, mask)

    def stored(self, key: ChunkKey) -> ChunkKey:
        """The one object for this key, which must have a holder."""
        return self._probe.stored_in(self.masks, key)


class Inventory(AbstractSet[ChunkKey]):
    """The keys that one member holds, those in quarantine included: a set to look at."""

    __slots__ = ("_holders", "_keys", "_size", "bit", "quarantined")

    def __init__(self, holders: Holders, bit: int) -> None:
        """`bit`: the member's in the masks of `holders`."""
        self.bit = bit
        self.quarantined: set[ChunkKey] = set()
        """Keys that it holds and for which it is not used: their masks lack its bit."""
        self._holders = holders
        self._keys: list[ChunkKey] = []
        """All that it holds, and some that it held; one that came back may be there twice."""
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __contains__(self, key: object) -> bool:
        return isinstance(key, bytes) and (bool(self._holders.masks.get(key, 0) & self.bit) or key in self.quarantined)

    def __iter__(self) -> Iterator[ChunkKey]:
        """In no order. What is added or removed meanwhile may come or not."""
        self._tidy()
        return iter(self._keys)

    def add(self, keys: Iterable[bytes], limit: int) -> list[ChunkKey]:
        """Hold these keys and use them, unless that makes it more than `limit` keys.

        Returns:
            Those that had no holder before.
        """
        holders, masks, bit, own = self._holders, self._holders.masks, self.bit, self._keys
        appeared: list[ChunkKey] = []
        for raw in keys:
            key: ChunkKey = raw  # type: ignore[assignment] # a call of the type for each would be half of the work
            mask = masks.get(key, 0)
            if mask & bit:
                continue
            if key in self.quarantined:
                self.quarantined.remove(key)
            elif self._size < limit:
                self._size += 1
                own.append(holders.stored(key) if mask else key)
            else:
                continue
            if mask:
                masks[key] = holders.share(mask | bit)
            else:
                masks[key] = bit
                appeared.append(key)
        return appeared

    def remove(self, keys: Iterable[bytes]) -> list[ChunkKey]:
        """Hold these keys no longer.

        Returns:
            Those for which it was the last one who was used.
        """
        holders, masks, bit = self._holders, self._holders.masks, self.bit
        vanished: list[ChunkKey] = []
        for raw in keys:
            key: ChunkKey = raw  # type: ignore[assignment] # as above
            mask = masks.get(key, 0)
            if mask == bit:
                del masks[key]
                vanished.append(key)
            elif mask & bit:
                masks[key] = holders.share(mask ^ bit)
            elif key in self.quarantined:
                self.quarantined.remove(key)
            else:
                continue
            self._size -= 1
        if (len(self._keys) - self._size) * STALE_SHARE > len(self._keys) + STALE_KEYS * STALE_SHARE:
            self._tidy()
        return vanished

    def remove_all(self) -> list[ChunkKey]:
        """Hold nothing any more; returns as `remove`."""
        return self.remove(list(self))

    def quarantine(self, key: ChunkKey) -> list[ChunkKey]:
        """Use a key that is held no longer; returns as `remove`."""
        mask = self._holders.masks.get(key, 0)
        if not mask & self.bit:
            return []
        self.quarantined.add(key)
        if mask != self.bit:
            self._holders.masks[key] = self._holders.share(mask ^ self.bit)
            return []
        del self._holders.masks[key]
        return [key]

    def clear(self) -> None:
        """Forget everything; whoever owns `holders` forgets it there."""
        self._keys, self._size = [], 0
        self.quarantined = set()

    def check_integrity(self) -> set[ChunkKey]:
        """Raise AssertionError when list and masks disagree; return what is used. For tests: reads everything, and
        leaves the list as it is.
        """
        held = {key for key in self._keys if key in self}
        assert len(held) == self._size, f"{len(held)} keys are held, {self._size} counted"
        assert self.quarantined <= held
        assert not any(self._holders.masks.get(key, 0) & self.bit for key in self.quarantined)
        return held - self.quarantined

    def _tidy(self) -> None:
        """Make the list what is held, each once. Of two equal ones the later is the dictionary's own object."""
        if len(self._keys) == self._size:
            return
        masks, bit, quarantined = self._holders.masks, self.bit, self.quarantined
        held = (key for key in reversed(self._keys) if masks.get(key, 0) & bit or key in quarantined)
        self._keys = list(dict.fromkeys(held))


class _Probe:
    """Finds the very object that a dictionary has for a key, by being compared with it."""

    __slots__ = ("_found", "_key")

    def __init__(self) -> None:
        self._key = self._found = ChunkKey(b"")

    def stored_in(self, keys: dict[bytes, int], key: ChunkKey) -> ChunkKey:
        """The object equal to `key`, which must be there."""
        self._key = self._found = key
        keys.get(self)  # type: ignore[call-overload] # equal to a key, though none
        found = self._found
        self._key = self._found = ChunkKey(b"")
        return found

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, stored: object) -> bool:
        if stored != self._key or not isinstance(stored, bytes):
            return False
        self._found = ChunkKey(stored)
        return True
