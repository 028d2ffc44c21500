"""What this node has to tell: its inventory's changes, numbered once for all directories that are told.

Several directories may be told at a time (two controllers, Redis, peers), each at its own pace. All get the same
batches under the same numbers, so that whoever hears of them from two sides notices that they are the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Protocol

from kvmesh.core.keys import ChunkKey
from kvmesh.wire.directory import MAX_KEYS_PER_MESSAGE, Changes

MAX_KEPT_KEYS = 200_000
"""Keys in the batches that are kept for those who are behind; who is further behind is given the whole inventory."""
MAX_KEPT_BATCHES = 10_000


class ChangeSource(Protocol):
    """An inventory whose changes can be taken once (`kvmesh.node.inventory.Inventory`)."""

    def take_changes(self, limit: int) -> tuple[list[ChunkKey], list[ChunkKey]]:
        """Up to `limit` added and removed keys that were not taken before."""

    def keys(self) -> list[ChunkKey]:
        """Everything published now, with the changes that were not taken yet."""

    def __contains__(self, key: bytes) -> bool:
        """Whether a chunk is published now."""


class Outbox:
    """The numbered changes of one life of an instance. Lives on the node's event loop."""

    def __init__(
        self, instance_id: str, incarnation: str, source: ChangeSource, *, batch_keys: int = MAX_KEYS_PER_MESSAGE
    ) -> None:
        """`batch_keys`: most keys in one batch."""
        self.instance_id = instance_id
        self.incarnation = incarnation
        self.sequence = 0
        """Number of the last batch."""
        self._source = source
        self._batch_keys = batch_keys
        self._kept: deque[Changes] = deque()
        self._kept_keys = 0
        self._again: list[bytes] = []

    def next_after(self, sequence: int) -> Changes | None:
        """The batch that follows `sequence`, made of new changes if need be; None when there is none, or it is no
        longer kept (see `continues`).
        """
        if sequence == self.sequence:
            self._take()
        if sequence >= self.sequence or not self.continues(sequence):
            return None
        return self._kept[sequence - self.sequence]  # numbers are consecutive, so this counts from the end

    def continues(self, sequence: int) -> bool:
        """Whether all batches after `sequence` are kept. If not, `inventory` is what is to be told."""
        return 0 <= self.sequence - sequence <= len(self._kept)

    def inventory(self) -> tuple[int, list[ChunkKey]]:
        """Everything published now, and its number."""
        while self._take():
            pass
        return self.sequence, self._source.keys()

    def keys(self) -> list[ChunkKey]:
        """Everything published now."""
        return self._source.keys()

    def __contains__(self, key: bytes) -> bool:
        """Whether a chunk is published now."""
        return key in self._source

    def repeat(self, keys: Iterable[bytes]) -> None:
        """Tell these keys once more with the next changes, as far as they are published then: a directory could not
        take them before.
        """
        self._again += keys

    def bump(self) -> None:
        """Give the inventory as it is a number of its own, so that nobody takes an earlier state for it."""
        if not self._take():
            self._append([], [])

    def _take(self) -> bool:
        added, removed = self._source.take_changes(self._batch_keys)
        room = self._batch_keys - len(added) - len(removed)
        again, self._again = self._again[:room], self._again[room:]
        told = [*added, *(key for key in again if key in self._source)]
        if not told and not removed:
            return False
        self._append(told, removed)
        return True

    def _append(self, added: Sequence[bytes], removed: Sequence[bytes]) -> None:
        self.sequence += 1
        batch = Changes(self.instance_id, self.incarnation, self.sequence, list[bytes](added), list[bytes](removed))
        self._kept.append(batch)
        self._kept_keys += len(added) + len(removed)
        while len(self._kept) > 1 and (self._kept_keys > MAX_KEPT_KEYS or len(self._kept) > MAX_KEPT_BATCHES):
            oldest = self._kept.popleft()
            self._kept_keys -= len(oldest.added) + len(oldest.removed)
