"""Cache policies that tell the slot ledger when a slot stops being readable.

vLLM's own LRU and ARC decide what to evict, with two exceptions. The ledger's generation moves *before* a slot can be
reused: every way out of a policy (evict, remove, clear) passes here, on the scheduler thread. And among the chunks that
have not been used for longest, those that other instances hold too go first: they can be fetched again, while the last
copy in the cluster has to be computed again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any, Protocol

from kvmesh.core.ledger import SlotLedger
from kvmesh.vllm.compat import ARCCachePolicy, CachePolicy, ChunkStatus, LRUCachePolicy, OffloadKey, ReqContext

Retracted = Callable[[list[int]], None]

LOOKS = 4096
"""Chunks that are looked at for others' copies in one eviction, in about a millisecond. In a pool of up to so many no
last copy goes while another idle chunk has copies; in a larger one only the least recently used are looked at. Two
instances that evict their copies at the same moment do not know of each other.
"""


class PeerChunks(Protocol):
    """What other instances hold; asked on the scheduler thread, often, and must be quick."""

    def is_visible(self, key: bytes) -> bool: ...

    def visible_count(self) -> int: ...


class _Publishing(CachePolicy):
    """Mix-in before one of vLLM's policies. Until `attach` nothing is published, so there is nothing to retract."""

    _ledger: SlotLedger | None = None
    _on_retract: Retracted | None = None
    _peers: PeerChunks | None = None

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._by_use: OrderedDict[OffloadKey, None] = OrderedDict()
        """The keys of the pool, least recently used first; how vLLM orders them differs between its versions."""

    def attach(self, ledger: SlotLedger, on_retract: Retracted, peers: PeerChunks | None = None) -> None:
        """From now on retract evicted slots in `ledger` and report those that had been published; prefer what
        `peers` hold, too.
        """
        self._ledger = ledger
        self._on_retract = on_retract
        self._peers = peers

    def insert(self, key: OffloadKey, chunk: ChunkStatus, *context: Any) -> None:
        # vLLM 0.33 passes a request context too.
        super().insert(key, chunk, *context)
        self._by_use[key] = None
        self._by_use.move_to_end(key)

    def touch(self, keys: Iterable[OffloadKey], *context: Any) -> None:
        keys = list(keys)
        super().touch(keys, *context)
        self._used(keys)

    def on_request_finished(self, key_groups: Sequence[Sequence[OffloadKey]], *rest: Any) -> None:
        # Since vLLM 0.32 a request's chunks count as used when it ends.
        super().on_request_finished(key_groups, *rest)
        context: ReqContext = rest[-1]
        keys = [key for group in key_groups for key in group]
        self._used(sorted(keys, key=lambda key: context.get_offload_key_position(key) or 0))

    def _used(self, head_to_tail: Sequence[OffloadKey]) -> None:
        """The first chunks of a prefix are the most useful ones: they count as used last."""
        for key in reversed(head_to_tail):
            if key in self._by_use:
                self._by_use.move_to_end(key)

    def remove(self, key: OffloadKey) -> None:
        chunk = self.get(key)
        if chunk is not None:
            self._retract((chunk.chunk_id,))
        super().remove(key)
        self._by_use.pop(key, None)

    def evict(self, n: int, protected: set[OffloadKey]) -> list[tuple[OffloadKey, ChunkStatus]] | None:
        replicated = self._replicated(n, protected)
        if replicated:
            protected = protected.union(key for key, _ in replicated)
        evicted: list[tuple[OffloadKey, ChunkStatus]] | None = super().evict(n - len(replicated), protected)
        if evicted is None:
            return None
        for key, _ in replicated:
            super().remove(key)
        evicted = replicated + evicted
        for key, _ in evicted:
            self._by_use.pop(key, None)
        self._retract(chunk.chunk_id for _, chunk in evicted)
        return evicted

    def all_keys(self) -> list[bytes]:
        """Every key with a slot."""
        return list(self._by_use)

    def most_recent(self, limit: int) -> list[bytes]:
        """Keys of complete chunks, most recently used first."""
        chunks = ((key, self.get(key)) for key in reversed(self._by_use))
        return list(islice((key for key, chunk in chunks if chunk is not None and chunk.is_ready), limit))

    def remove_all(self, keys: list[OffloadKey]) -> list[ChunkStatus]:
        """As `remove` for each, but told in one go; returns their slots. All of them are here."""
        chunks: list[ChunkStatus] = [self.get(key) for key in keys]
        self._retract(chunk.chunk_id for chunk in chunks)
        for key in keys:
            super().remove(key)
            self._by_use.pop(key, None)
        return chunks

    def _replicated(self, n: int, protected: set[OffloadKey]) -> list[tuple[OffloadKey, ChunkStatus]]:
        """Up to n chunks that may go and that others hold, too, the least recently used first."""
        peers = self._peers
        found: list[tuple[OffloadKey, ChunkStatus]] = []
        if peers is None or not peers.visible_count():
            return found
        for key in islice(self._by_use, LOOKS):
            if len(found) == n:
                break
            if peers.is_visible(key) and key not in protected:
                chunk = self.get(key)
                if chunk is not None and chunk.ref_cnt == 0:
                    found.append((key, chunk))
        return found

    def clear(self) -> None:
        if self._ledger is not None and self._on_retract is not None:
            self._on_retract(self._ledger.retract_all())
        super().clear()
        self._by_use.clear()

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


class KVMeshARC(_Publishing, ARCCachePolicy):
    """vLLM's adaptive replacement cache, telling the ledger."""


POLICIES = {"lru": KVMeshLRU.__name__, "arc": KVMeshARC.__name__}
"""Class name by `cache_policy`. Our configuration tells by "KVMesh" in it that the connector filled it in."""
