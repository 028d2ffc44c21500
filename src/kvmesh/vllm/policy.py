"""Cache policies that tell the slot ledger when a slot stops being readable.

vLLM's own LRU and ARC decide what to evict. We only see to it that the ledger's generation moves *before* a slot can be
reused: every way out of a policy (evict, remove, clear) passes here, on the scheduler thread.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from itertools import chain, islice
from typing import Any

from kvmesh.core.ledger import SlotLedger
from kvmesh.vllm.compat import ARCCachePolicy, CachePolicy, ChunkStatus, LRUCachePolicy, OffloadKey

Retracted = Callable[[list[int]], None]


class _Publishing(CachePolicy):
    """Mix-in before one of vLLM's policies. Until `attach` nothing is published, so there is nothing to retract."""

    _ledger: SlotLedger | None = None
    _on_retract: Retracted | None = None

    def attach(self, ledger: SlotLedger, on_retract: Retracted) -> None:
        """From now on retract evicted slots in `ledger` and report those that had been published."""
        self._ledger = ledger
        self._on_retract = on_retract

    def insert(self, key: OffloadKey, chunk: ChunkStatus, *context: Any) -> None:
        # vLLM 0.33 passes a request context too.
        super().insert(key, chunk, *context)

    def remove(self, key: OffloadKey) -> None:
        chunk = self.get(key)
        if chunk is not None:
            self._retract((chunk.chunk_id,))
        super().remove(key)

    def evict(self, n: int, protected: set[OffloadKey]) -> list[tuple[OffloadKey, ChunkStatus]] | None:
        evicted: list[tuple[OffloadKey, ChunkStatus]] | None = super().evict(n, protected)
        if evicted:
            self._retract(chunk.chunk_id for _, chunk in evicted)
        return evicted

    def all_keys(self) -> list[bytes]:
        """Every key with a slot."""
        raise NotImplementedError

    def most_recent(self, limit: int) -> list[bytes]:
        """Keys of complete chunks, most recently used first."""
        raise NotImplementedError

    def remove_all(self, keys: list[OffloadKey]) -> list[ChunkStatus]:
        """As `remove` for each, but told in one go; returns their slots. All of them are here."""
        chunks: list[ChunkStatus] = [self.get(key) for key in keys]
        self._retract(chunk.chunk_id for chunk in chunks)
        for key in keys:
            super().remove(key)
        return chunks

    def clear(self) -> None:
        if self._ledger is not None and self._on_retract is not None:
            self._on_retract(self._ledger.retract_all())
        super().clear()

    def _retract(self, slots: Iterable[int]) -> None:
        ledger, on_retract = self._ledger, self._on_retract
        if ledger is None or on_retract is None:
            return
        published = [slot for slot in slots if ledger.generation(slot) & 1]
        for slot in published:
            ledger.retract(slot)
        if published:
            on_retract(published)


class KVMeshLRU(_Publishing, LRUCachePolicy):
    """vLLM's least-recently-used policy, telling the ledger."""

    def all_keys(self) -> list[bytes]:
        return list(self.chunks)

    def most_recent(self, limit: int) -> list[bytes]:
        ready = (key for key, chunk in self.chunks.items() if chunk.is_ready)
        return heapq.nlargest(limit, ready, key=self._ranks.__getitem__)


class KVMeshARC(_Publishing, ARCCachePolicy):
    """vLLM's adaptive replacement cache, telling the ledger."""

    def all_keys(self) -> list[bytes]:
        return [*self.t1, *self.t2]

    def most_recent(self, limit: int) -> list[bytes]:
        """Those used more than once come first."""
        newest_first = chain(reversed(self.t2.items()), reversed(self.t1.items()))
        return list(islice((key for key, chunk in newest_first if chunk.is_ready), limit))


POLICIES = {"lru": KVMeshLRU.__name__, "arc": KVMeshARC.__name__}
"""Class name by `cache_policy`. Our configuration tells by "KVMesh" in it that the connector filled it in."""
