"""A light stand-in for an engine: a pool, a ledger and a real node, without a model.

It computes nothing: the bytes of a chunk follow from its key, so that every byte that arrives anywhere can be checked.
Used by the process tests and by `kvmesh bench`; everything below it (node process, link, directory, transfers) is the
real thing.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from kvmesh.config import KVMeshConfig
from kvmesh.core.format import Format
from kvmesh.core.gate import Saved
from kvmesh.core.ledger import SlotLedger
from kvmesh.core.reasons import MissReason
from kvmesh.node.fetch_jobs import FinishedJob
from kvmesh.node.handle import NodeHandle
from kvmesh.transfer.pool import HostPool
from kvmesh.wire import link

KEY_BYTES = 36
ANSWER_S = 1.0
"""Longest wait for the directory's answer, where one is asked."""


def make_key(name: str) -> bytes:
    """A chunk key of the usual length for a readable name; group 0."""
    return hashlib.sha256(name.encode()).digest() + bytes(4)


def content(key: bytes, chunk_bytes: int) -> bytes:
    """The bytes of the chunk `key`: random, but always the same."""
    seed = int.from_bytes(key[:16], "little")
    return np.random.Generator(np.random.PCG64(seed)).bytes(chunk_bytes)


def kv_content(key: bytes, chunk_bytes: int) -> bytes:
    """The same with normally distributed bfloat16 numbers, which shrink about as much as real KV does."""
    seed = int.from_bytes(key[:16], "little")
    numbers = np.random.Generator(np.random.PCG64(seed)).standard_normal(chunk_bytes // 2, np.float32)
    return (numbers.view(np.uint32) >> np.uint32(16)).astype(np.uint16).tobytes()


def stand_in_format(chunk_bytes: int, **changed: object) -> Format:
    """A format for stand-ins; `changed` fields make it another one."""
    fields: dict[str, object] = {
        "model_name": "stand-in",
        "model_weights": "none",
        "kv_dtype": "bytes",
        "kv_layout": "flat",
        "block_tokens": 16,
        "chunk_tokens": 256,
        "chunk_bytes": chunk_bytes,
        "groups": "0",
        "hash_algorithm": "sha256",
        "hash_seed": "",
        "parallel_layout": "tp1",
        "instruction_set": "",
    }
    return Format(**(fields | changed))  # type: ignore[arg-type]  # the keys are Format's own


class Got(NamedTuple):
    """What became of one `get`."""

    local: int
    """Chunks that were in the own pool already."""
    fetched: int
    misses: dict[MissReason, int]
    wrong: int
    """Chunks whose bytes are not the key's: must be 0, always."""
    seconds: float
    holders: list[str]


class StandInEngine:
    """Stores and gets chunks as an engine would. Use from one thread, which plays the scheduler."""

    def __init__(
        self,
        config: KVMeshConfig,
        *,
        slots: int,
        chunk_bytes: int,
        kv_format: Format | None = None,
        content: Callable[[bytes, int], bytes] = content,
        stored: Callable[[bytes, int], bytes] | None = None,
    ) -> None:
        """`content` gives a chunk's bytes, `stored` those that `put` stores: another one makes an engine whose chunks
        nobody may get.
        """
        self.chunk_bytes = chunk_bytes
        self._content = content
        self._stored = stored or content
        self.format = kv_format or stand_in_format(chunk_bytes)
        self.pool = HostPool.create(slots, chunk_bytes)
        self.ledger = SlotLedger.create(slots, chunk_bytes)
        self.node = NodeHandle(
            config.to_wire(), self.format, self.ledger, self.pool.segments, log_level=config.log_level
        )
        self._slots: OrderedDict[bytes, int] = OrderedDict()
        """Slot by key, least recently used first."""
        self.held: set[bytes] = set()
        """Chunks that are not to be evicted."""
        self._free = list(range(slots))
        self._busy: set[int] = set()
        """Slots of fetch jobs that are out: nobody may touch them."""
        self._job_id = 0
        self._results: dict[int, FinishedJob] = {}
        self.evictions = 0

    def start(self) -> None:
        """Start the node; raises StartupError."""
        self.node.start()

    def put(self, keys: Sequence[bytes]) -> None:
        """Store chunks, evicting the least recently used, and publish them."""
        slots = []
        for key in keys:
            if key in self._slots:
                self._slots.move_to_end(key)
                continue
            slot = self._allocate()
            self.pool.row(slot)[:] = self._stored(key, self.chunk_bytes)
            self._slots[key] = slot
            self.ledger.publish(slot, key)
            slots.append(slot)
        if slots:
            self.node.publish(slots, fetched=False)

    def fill(self, key: bytes) -> int:
        """Store a chunk without a word to the node; returns its slot."""
        slot = self._allocate()
        self.pool.row(slot)[:] = self._stored(key, self.chunk_bytes)
        self._slots[key] = slot
        return slot

    def announce(self, key: bytes, slot: int) -> None:
        """Publish what `fill` has stored."""
        self.ledger.publish(slot, key)
        self.node.publish([slot], fetched=False)

    def get(self, keys: Sequence[bytes], timeout_s: float = 5.0, request_id: str = "") -> Got:
        """Look `keys` up in the own pool, fetch what peers are known to hold, and check every byte of all of it."""
        started_s = time.monotonic()
        self._job_id += 1
        request_id = request_id or f"request-{self._job_id}"
        local = [key for key in keys if key in self._slots]
        for key in local:
            self._slots.move_to_end(key)
        self._ask([key for key in keys if key not in self._slots])
        wanted = [key for key in keys if key not in self._slots and self.node.is_visible(key)]
        misses = {MissReason.NOT_PUBLISHED: len(keys) - len(local) - len(wanted)}
        fetched, holders = 0, []
        wrong = sum(self.is_wrong(key) for key in local)
        if wanted:
            finished, slots = self._fetch(wanted, timeout_s, request_id)
            holders = finished.holders
            for key, slot, reason in zip(wanted, slots, finished.reasons, strict=True):
                if reason is not None:
                    misses[reason] = misses.get(reason, 0) + 1
                    self._free.append(slot)
                    continue
                fetched += 1
                self._slots[key] = slot
                self.ledger.publish(slot, key)
                wrong += self.is_wrong(key)
            good = [slot for slot, reason in zip(slots, finished.reasons, strict=True) if reason is None]
            if good:
                self.node.publish(good, fetched=True)
        misses = {reason: count for reason, count in misses.items() if count}
        self._tell(keys, request_id)
        return Got(len(local), fetched, misses, wrong, time.monotonic() - started_s, holders)

    def get_all(self, keys: Sequence[bytes], timeout_s: float = 20.0) -> bool:
        """Get until all of `keys` are here, as requests that come again and again would; False when time is up or a
        byte is wrong.
        """

        def complete() -> bool:
            got = self.get(keys)
            return got.wrong == 0 and got.local + got.fetched == len(keys)

        return _poll(complete, timeout_s)

    def is_wrong(self, key: bytes) -> bool:
        """Whether the slot of a held chunk contains anything but its bytes."""
        return bytes(self.pool.row(self._slots[key])) != self._content(key, self.chunk_bytes)

    def holds(self, key: bytes) -> bool:
        return key in self._slots

    def keys(self) -> list[bytes]:
        """Held chunks, least recently used first."""
        return list(self._slots)

    def start_fetch(self, key: bytes, request_id: str, timeout_s: float) -> tuple[int, int]:
        """Have the node fetch one chunk, without waiting. Returns the job and its slot, for `take_result` and
        `end_fetch`.
        """
        slot = self._allocate()
        self._busy.add(slot)
        self._job_id += 1
        self.node.fetch(self._job_id, request_id, [key], [slot], timeout_s)
        return self._job_id, slot

    def take_result(self, job_id: int) -> FinishedJob | None:
        """How a job has ended; None while it has not."""
        for finished in self.node.take_finished():
            self._results[finished.job_id] = finished
        return self._results.pop(job_id, None)

    def end_fetch(self, key: bytes, slot: int, *, is_here: bool) -> None:
        """Keep and publish what has come, or give the slot back."""
        self._busy.discard(slot)
        if not is_here:
            self._free.append(slot)
            return
        self._slots[key] = slot
        self.ledger.publish(slot, key)
        self.node.publish([slot], fetched=True)

    def forget(self, keys: Sequence[bytes]) -> None:
        """Evict chunks."""
        for key in keys:
            self._evict(key)

    def wait_visible(self, keys: Sequence[bytes], timeout_s: float = 10.0) -> bool:
        """Wait until other instances are known to hold all of `keys`. The handle has no event for it: polled every
        millisecond.
        """

        def visible() -> bool:
            if self.node.state.asks:
                self.node.ask(keys)
            return all(self.node.is_visible(key) for key in keys)

        return _poll(visible, timeout_s)

    def wait_peers(self, count: int, timeout_s: float = 10.0) -> bool:
        """Wait until the node has exactly `count` peers."""
        return _poll(lambda: self.node.state.peers == count, timeout_s)

    def wait_node(self, *, restarts: int, timeout_s: float = 20.0) -> bool:
        """Wait until the node has been started again `restarts` times and is up."""
        return _poll(lambda: self.node.restarts >= restarts and self.node.state.alive, timeout_s)

    def close(self) -> None:
        """End the node and free the pool."""
        self.node.close()
        self.pool.close()
        self.ledger.close()

    def _ask(self, keys: Sequence[bytes]) -> None:
        """Where the node asks for each request: wait for its answer, as a request that is told to retry."""
        if self.node.state.asks and keys:
            self.node.ask(keys)
            _poll(lambda: all(self.node.is_known(key) for key in keys), ANSWER_S)

    def _tell(self, keys: Sequence[bytes], request_id: str) -> None:
        """Tell the node what became of the request, as an engine's connector does. Prefix order is that of `keys`."""
        known = self._slots.keys()
        found = next((index for index, key in enumerate(keys) if key not in known), len(keys))
        misses = []
        if found < len(keys):
            missed = keys[found]
            reason = MissReason.RECENTLY_FAILED if self.node.is_visible(missed) else self.node.state.why_invisible()
            misses.append(link.Miss(missed, reason))
        self.node.record(
            link.RequestRecord(
                request_id=request_id,
                prompt_tokens=len(keys) * self.format.chunk_tokens,
                keys=list(keys),
                loaded_tokens=found * self.format.chunk_tokens,
                misses=misses,
            )
        )

    def fetch(self, keys: Sequence[bytes], timeout_s: float, saved: Saved | None = None) -> FinishedJob:
        """Fetch chunks that are not in the pool, and publish those that came. Checks nothing: see `is_wrong`."""
        self._job_id += 1
        finished, slots = self._fetch(keys, timeout_s, f"request-{self._job_id}", saved)
        good = []
        for key, slot, reason in zip(keys, slots, finished.reasons, strict=True):
            if reason is not None:
                self._free.append(slot)
                continue
            self._slots[key] = slot
            self.ledger.publish(slot, key)
            good.append(slot)
        if good:
            self.node.publish(good, fetched=True)
        return finished

    def _fetch(
        self, keys: Sequence[bytes], timeout_s: float, request_id: str, saved: Saved | None = None
    ) -> tuple[FinishedJob, list[int]]:
        slots = [self._allocate() for _ in keys]
        self._busy.update(slots)
        job_id = self._job_id
        self.node.fetch(job_id, request_id, list(keys), slots, timeout_s, saved)
        while job_id not in self._results:
            for finished in self.node.take_finished():
                self._results[finished.job_id] = finished
            time.sleep(0.0005)
        self._busy.difference_update(slots)
        return self._results.pop(job_id), slots

    def _allocate(self) -> int:
        if not self._free:
            self._evict(next(key for key in self._slots if key not in self.held))
        return self._free.pop()

    def _evict(self, key: bytes) -> None:
        slot = self._slots.pop(key)
        self.ledger.retract(slot)
        self.node.retract([slot])
        self._free.append(slot)
        self.evictions += 1


def _poll(condition: Callable[[], bool], timeout_s: float) -> bool:
    waiting = threading.Event()
    until_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > until_s:
            return False
        waiting.wait(0.001)
    return True
