"""The slot ledger: what each slot of a host pool holds right now, in memory shared by an engine and its node.

Publishing is a one-way valve instead of a lock. The engine bumps a slot's generation *before* the slot may be reused;
a node that sends a slot looks at the generation before and after, and says STALE when it moved. Readers never pin,
owners never wait.

Layout (little endian, 64-bit words): a header of one 64-byte line, then one record of 96 bytes per slot.

    word 0      generation             written by the owner (the engine) only; odd: published, even: not readable
    word 1      key length in bytes    owner
    word 2-6    key, zero-padded       owner
    word 7      checksum generation    node only; the checksum below belongs to this generation
    word 8-9    checksum, 16 bytes     node
    word 10-11  reserved, zero

Each word has one writing process and is written in one store, so no lock is needed. The order of the stores carries
the meaning: retract = generation becomes even; publish = key first, then generation becomes odd; checksum first, then
its generation. x86-64 keeps the order of stores and of loads; on weaker machines the system calls around every use (a
send on one side, a message on the other) are full barriers.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from typing import NamedTuple

from kvmesh.core.keys import KEY_MAX_BYTES, KEY_MIN_BYTES, ChunkKey, check_key

CHECKSUM_BYTES = 16
"""xxh3-128 of a chunk's bytes."""

_MAGIC = int.from_bytes(b"kvmLedg1", "little")
_HEADER_WORDS = 8
_RECORD_WORDS = 12
_GENERATION, _KEY_LENGTH, _KEY, _CHECKSUM_GENERATION, _CHECKSUM = 0, 1, 2, 7, 8
_WORD = 8
_WORD_MASK = (1 << 64) - 1


class Record(NamedTuple):
    """A published slot as one consistent reading."""

    key: ChunkKey
    generation: int


class LedgerStatistics(NamedTuple):
    """How many slots are in which state."""

    slots: int
    published: int
    checksummed: int


class SlotLedger:
    """The ledger of one pool. One owner process publishes and retracts; any process that mapped it reads.

    Thread-safe for readers. `publish`, `retract` and `retract_all` belong to one thread of the owner (the scheduler
    thread); `set_checksum` to one thread of the node at a time.
    """

    def __init__(self, fd: int, *, slots: int, chunk_bytes: int, fresh: bool, writable: bool = True) -> None:
        self.slots = slots
        self.chunk_bytes = chunk_bytes
        self._fd = fd
        self._map = mmap.mmap(fd, self.size_bytes(slots), access=mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ)
        self._bytes = memoryview(self._map)
        self._words = self._bytes.cast("Q")
        if fresh:
            self._words[1], self._words[2] = slots, chunk_bytes
            self._words[0] = _MAGIC

    @classmethod
    def create(cls, slots: int, chunk_bytes: int) -> SlotLedger:
        """Make an empty ledger in anonymous shared memory, which goes away with the last process that maps it."""
        fd = os.memfd_create("kvmesh-ledger", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, cls.size_bytes(slots))
        # Whoever has the descriptor may write records, but a file cut short would kill all who have it mapped.
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        return cls(fd, slots=slots, chunk_bytes=chunk_bytes, fresh=True)

    @classmethod
    def attach(cls, fd: int, *, writable: bool = True) -> SlotLedger:
        """Map the ledger behind `fd` and take the descriptor over. Raises ValueError when it is not a whole ledger.

        Args:
            fd: open for reading and, where `writable`, for writing.
            writable: false for one of another instance, which is only read.
        """
        size = os.fstat(fd).st_size
        if size < _HEADER_WORDS * _WORD:
            raise ValueError(f"slot ledger of {size} bytes is shorter than its header")
        header = memoryview(os.pread(fd, _HEADER_WORDS * _WORD, 0)).cast("Q")
        magic, slots, chunk_bytes = header[0], header[1], header[2]
        if magic != _MAGIC or size != cls.size_bytes(slots):
            raise ValueError(f"not a slot ledger of this version: magic {magic:#x}, {slots} slots in {size} bytes")
        return cls(fd, slots=slots, chunk_bytes=chunk_bytes, fresh=False, writable=writable)

    @staticmethod
    def size_bytes(slots: int) -> int:
        return (_HEADER_WORDS + slots * _RECORD_WORDS) * _WORD

    @property
    def fd(self) -> int:
        """The descriptor to hand to a child process."""
        return self._fd

    # -- owner ---------------------------------------------------------------------------------------------------------

    def publish(self, slot: int, key: bytes) -> int:
        """Make `slot` readable under `key` and return its generation (odd). The slot's bytes must be complete."""
        check_key(key)
        base = self._base(slot)
        generation = self.retract(slot)
        words = self._words
        start = (base + _KEY) * _WORD
        self._bytes[start : start + KEY_MAX_BYTES] = key.ljust(KEY_MAX_BYTES, b"\0")
        words[base + _KEY_LENGTH] = len(key)
        words[base + _GENERATION] = generation + 1
        return generation + 1

    def retract(self, slot: int) -> int:
        """Make `slot` unreadable, before its bytes may change; return the generation (even). Retracting twice is
        harmless.
        """
        base = self._base(slot)
        generation: int = self._words[base + _GENERATION]
        if generation & 1:
            generation = (generation + 1) & _WORD_MASK  # no count gets there, but a word that was scribbled over may be
            self._words[base + _GENERATION] = generation
        return generation

    def retract_all(self) -> list[int]:
        """Retract every published slot; return those slots."""
        retracted = []
        for slot in range(self.slots):
            if self.generation(slot) & 1:
                self.retract(slot)
                retracted.append(slot)
        return retracted

    # -- readers -------------------------------------------------------------------------------------------------------

    def generation(self, slot: int) -> int:
        value: int = self._words[self._base(slot) + _GENERATION]
        return value

    def generations(self) -> memoryview:
        """The generations of all slots, as they change. Let go of it before `close`."""
        return self._words[_HEADER_WORDS + _GENERATION :: _RECORD_WORDS]

    def is_current(self, slot: int, generation: int) -> bool:
        """True while the slot still holds what it held when `generation` was read."""
        return self.generation(slot) == generation

    def read(self, slot: int) -> Record | None:
        """The key and generation of a published slot; None when it is not readable, changed during the reading, or is
        no record that an owner writes.
        """
        base = self._base(slot)
        generation: int = self._words[base + _GENERATION]
        if not generation & 1:
            return None
        length = self._words[base + _KEY_LENGTH]
        if not KEY_MIN_BYTES <= length <= KEY_MAX_BYTES:
            return None
        start = (base + _KEY) * _WORD
        key = bytes(self._bytes[start : start + length])
        if self._words[base + _GENERATION] != generation:
            return None
        return Record(ChunkKey(key), generation)

    def checksum(self, slot: int, generation: int) -> bytes | None:
        """The xxh3-128 digest of what the slot holds at `generation`, or None when it was not computed or is of
        another one.
        """
        base = self._base(slot)
        if self._words[base + _CHECKSUM_GENERATION] != generation:
            return None
        start = (base + _CHECKSUM) * _WORD
        digest = bytes(self._bytes[start : start + CHECKSUM_BYTES])
        return digest if self._words[base + _CHECKSUM_GENERATION] == generation else None

    # -- node ----------------------------------------------------------------------------------------------------------

    def set_checksum(self, slot: int, generation: int, digest: bytes) -> None:
        """Record the digest of the slot's bytes as they were at `generation`. The caller re-checks the generation
        first.
        """
        if len(digest) != CHECKSUM_BYTES:
            raise ValueError(f"checksum of {len(digest)} bytes; {CHECKSUM_BYTES} expected")
        base = self._base(slot)
        self._words[base + _CHECKSUM_GENERATION] = 0
        start = (base + _CHECKSUM) * _WORD
        self._bytes[start : start + CHECKSUM_BYTES] = digest
        self._words[base + _CHECKSUM_GENERATION] = generation

    # -- both ----------------------------------------------------------------------------------------------------------

    def statistics(self) -> LedgerStatistics:
        """Count the slots' states; reads every record, so not for hot paths."""
        generations = [self.generation(slot) for slot in range(self.slots)]
        published = sum(generation & 1 for generation in generations)
        checksummed = sum(
            1
            for slot, generation in enumerate(generations)
            if generation & 1 and self.checksum(slot, generation) is not None
        )
        return LedgerStatistics(self.slots, published, checksummed)

    def check_integrity(self) -> None:
        """Raise AssertionError when a record breaks the layout's rules. Called by tests and debug mode, with no writer
        active.
        """
        assert self._words[0] == _MAGIC
        assert self._words[1] == self.slots
        keys: dict[bytes, int] = {}
        for slot in range(self.slots):
            base = self._base(slot)
            generation = self._words[base + _GENERATION]
            assert self._words[base + _CHECKSUM_GENERATION] <= generation, (
                f"slot {slot}: checksum of a future generation"
            )
            record = self.read(slot)
            if record is None:
                continue
            check_key(record.key)
            assert record.key not in keys, f"slots {keys[record.key]} and {slot} are published under one key"
            keys[record.key] = slot

    def close(self) -> None:
        """Unmap and close. The memory goes away when no process maps it any more."""
        self._words.release()
        self._bytes.release()
        self._map.close()
        os.close(self._fd)

    def _base(self, slot: int) -> int:
        if not 0 <= slot < self.slots:
            raise IndexError(f"slot {slot} of a ledger with {self.slots} slots")
        return _HEADER_WORDS + slot * _RECORD_WORDS
