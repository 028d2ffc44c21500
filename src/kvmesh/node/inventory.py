"""What this node's engine has published: from key to slot, and the way of a slot from "bytes complete" to "announced".

A chunk is announced only after its checksum is in the ledger and its generation was re-checked after hashing. Hashing
runs in one worker thread; everything else here runs on the node's event loop, except `locate`, which any thread may
call.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import xxhash

from kvmesh.core.keys import ChunkKey
from kvmesh.core.ledger import SlotLedger
from kvmesh.transfer.base import Located
from kvmesh.transfer.pool import HostPool

HASH_BATCH_BYTES = 64 << 20
"""Hashed in one go before being announced: a restarted node announces its pool bit by bit, and can stop in between."""


class Announced(NamedTuple):
    """One inventory change for the directory; a key that was removed and added again counts as both."""

    added: list[ChunkKey]
    removed: list[ChunkKey]


class _Entry(NamedTuple):
    slot: int
    generation: int


class _Fetched(NamedTuple):
    key: ChunkKey
    checksum: bytes
    published_as: int
    """The generation that the slot gets when it is published for the first time since."""


class Inventory:
    """Published chunks of one pool. `on_change` is called on the loop whenever `take_changes` has something new."""

    def __init__(
        self,
        pool: HostPool,
        ledger: SlotLedger,
        on_change: Callable[[], None],
        digest: Callable[[memoryview], bytes] = xxhash.xxh3_128_digest,
    ) -> None:
        """`digest` makes a slot's checksum: of its bytes, or of what a lossy wire codec makes of them."""
        self._digest = digest
        self._pool = pool
        self._ledger = ledger
        self._on_change = on_change
        self._entries: dict[ChunkKey, _Entry] = {}
        self._keys: dict[int, ChunkKey] = {}
        """Announced key by slot."""
        self._fetched: dict[int, _Fetched] = {}
        """By slot: what this node has fetched and the engine has not published yet."""
        self.accepting = True
        """False: what the engine publishes is not announced; `republish` makes up for it."""
        self._added: dict[ChunkKey, None] = {}
        self._removed: dict[ChunkKey, None] = {}
        self._checksums = threading.Lock()
        """Held from looking at a generation to writing its checksum, so that an older one never overwrites a newer."""
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="hash")

    # -- from the engine -----------------------------------------------------------------------------------------------

    def published(self, slots: Iterable[int], *, fetched: bool = False) -> None:
        """The slots' bytes are complete, says the engine. Announces at once what needs no hashing, the rest later."""
        unhashed: list[tuple[int, ChunkKey, int]] = []
        for slot in slots if self.accepting else ():
            record = self._ledger.read(slot)
            if record is None:
                continue
            known = self._fetched.pop(slot, None)
            if fetched and known is not None and (known.key, known.published_as) == record:
                self._set_checksum(slot, record.generation, known.checksum)
            if self._ledger.checksum(slot, record.generation) is not None:
                self._announce(slot, record.key, record.generation)
            else:
                unhashed.append((slot, record.key, record.generation))
        size = max(1, HASH_BATCH_BYTES // self._pool.chunk_bytes)
        for start in range(0, len(unhashed), size):
            loop = asyncio.get_running_loop()
            future = loop.run_in_executor(self._hasher, self._hash, unhashed[start : start + size])
            future.add_done_callback(self._hashed)
        self._notify()

    def republish(self) -> None:
        """Announce what the ledger holds already: after a restart of the node. Valid checksums are kept."""
        self.published(range(self._ledger.slots))

    def retracted(self, slots: Iterable[int]) -> None:
        """The engine has taken the slots back; their generations have moved before this was sent."""
        for slot in slots:
            self._fetched.pop(slot, None)
            key = self._keys.get(slot)
            if key is not None and not self._ledger.is_current(slot, self._entries[key].generation):
                self._withdraw(slot, key)
        self._notify()

    def withdraw(self, keys: Iterable[ChunkKey] | None = None) -> int:
        """Announce at once that chunks (None: all) are not here any more, whatever the engine still does with them.

        Returns how many had been announced.
        """
        found = [
            (entry.slot, key)
            for key in (list(self._entries) if keys is None else keys)
            if (entry := self._entries.get(key)) is not None
        ]
        for slot, key in found:
            if key in self._entries:
                self._withdraw(slot, key)
        self._notify()
        return len(found)

    def filled(self, slot: int, key: ChunkKey, digest: bytes) -> None:
        """A fetch has put `key` into a slot of ours; remember the verified checksum until the engine publishes the
        slot.
        """
        self._fetched[slot] = _Fetched(key, digest, self._ledger.generation(slot) + 1)

    # -- for the peer server and the directory -------------------------------------------------------------------------

    def locate(self, key: bytes) -> Located | None:
        """Where an announced chunk is now. None when it is not announced or its slot has been reused. Any thread."""
        entry = self._entries.get(ChunkKey(key))
        if entry is None or not self._ledger.is_current(entry.slot, entry.generation):
            return None
        digest = self._ledger.checksum(entry.slot, entry.generation)
        return None if digest is None else Located(entry.slot, entry.generation, digest)

    def keys(self) -> list[ChunkKey]:
        return list(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: bytes) -> bool:
        return key in self._entries

    def take_changes(self, limit: int) -> Announced:
        """Up to `limit` changes that were not taken yet, removals first."""
        removed = _take(self._removed, limit)
        return Announced(_take(self._added, limit - len(removed)), removed)

    def has_changes(self) -> bool:
        return bool(self._added or self._removed)

    def close(self) -> None:
        self._hasher.shutdown(wait=False, cancel_futures=True)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _set_checksum(self, slot: int, generation: int, digest: bytes) -> bool:
        """Write a checksum unless the slot has moved on. False when it has."""
        with self._checksums:
            if not self._ledger.is_current(slot, generation):
                return False
            self._ledger.set_checksum(slot, generation, digest)
            return True

    def _hash(self, slots: list[tuple[int, ChunkKey, int]]) -> list[tuple[int, ChunkKey, int]]:
        """Checksum slots that are still what they were; runs in the hashing thread, where xxhash lets go of the GIL."""
        done = []
        for slot, key, generation in slots:
            if not self._ledger.is_current(slot, generation):
                continue
            digest = self._digest(self._pool.row(slot))
            if self._set_checksum(slot, generation, digest):
                done.append((slot, key, generation))
        return done

    def _hashed(self, future: asyncio.Future[list[tuple[int, ChunkKey, int]]]) -> None:
        if future.cancelled():
            return
        for slot, key, generation in future.result():
            self._announce(slot, key, generation)
        self._notify()

    def _announce(self, slot: int, key: ChunkKey, generation: int) -> None:
        """A retraction may have overtaken the hashing: its message found nothing to withdraw, so look again here."""
        if not self._ledger.is_current(slot, generation) or not self.accepting:
            return
        before = self._keys.get(slot)
        if before is not None and before != key:
            self._withdraw(slot, before)
        known = self._entries.get(key)
        if known is not None and known.slot != slot:
            self._keys.pop(known.slot, None)
        self._entries[key] = _Entry(slot, generation)
        self._keys[slot] = key
        if known is None:
            self._added[key] = None

    def _withdraw(self, slot: int, key: ChunkKey) -> None:
        del self._entries[key]
        del self._keys[slot]
        if key in self._added:
            del self._added[key]
            return
        self._removed[key] = None

    def _notify(self) -> None:
        if self.has_changes():
            self._on_change()


def _take(pending: dict[ChunkKey, None], limit: int) -> list[ChunkKey]:
    taken = list(pending)[:limit] if len(pending) > limit else list(pending)
    for key in taken:
        del pending[key]
    return taken
