"""A host pool: the memory whose rows (slots) hold KV chunks, mapped from shared memory."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

_MADV_POPULATE_WRITE = 23
"""Linux 5.14; not named in every version of Python's mmap module."""
PREFAULT_SLICE_BYTES = 16 << 20
"""Mapped in one call, which holds the interpreter for about a millisecond."""


class PoolSegment(NamedTuple):
    """A run of whole slots in one file: `fd` is open for reading and writing."""

    fd: int
    offset_bytes: int
    length_bytes: int


class HostPool:
    """Slots of `chunk_bytes` each, in one or more mapped segments. Safe to use from any thread; it holds no lock.

    The pool does not know which slots are readable: the slot ledger does.
    """

    def __init__(self, segments: Sequence[PoolSegment], *, chunk_bytes: int) -> None:
        """Map the segments in slot order and take their descriptors over.

        Raises ValueError when a segment is not a whole number of slots or is longer than its file.
        """
        if chunk_bytes <= 0:
            raise ValueError(f"chunk of {chunk_bytes} bytes")
        self.chunk_bytes = chunk_bytes
        self.segments = tuple(segments)
        self._maps: list[mmap.mmap] = []
        self._views: list[memoryview] = []
        self._first_slots: list[int] = []
        self._addresses: list[int] = []
        slots = 0
        for segment in self.segments:
            if segment.length_bytes % chunk_bytes or segment.length_bytes == 0:
                raise ValueError(
                    f"pool segment of {segment.length_bytes} bytes holds no whole number of {chunk_bytes}-byte chunks"
                )
            if os.fstat(segment.fd).st_size < segment.offset_bytes + segment.length_bytes:
                raise ValueError("pool segment reaches beyond its file")
            mapped = mmap.mmap(segment.fd, segment.offset_bytes + segment.length_bytes)
            self._maps.append(mapped)
            view = memoryview(mapped)[segment.offset_bytes :]
            self._views.append(view)
            self._addresses.append(ctypes.addressof(ctypes.c_char.from_buffer(mapped)) + segment.offset_bytes)
            self._first_slots.append(slots)
            slots += segment.length_bytes // chunk_bytes
        self.slots = slots

    @classmethod
    def create(cls, slots: int, chunk_bytes: int) -> HostPool:
        """A pool in anonymous shared memory, for stand-alone nodes, tests and benchmarks."""
        fd = os.memfd_create("kvmesh-pool", os.MFD_CLOEXEC)
        os.ftruncate(fd, slots * chunk_bytes)
        return cls([PoolSegment(fd, 0, slots * chunk_bytes)], chunk_bytes=chunk_bytes)

    def row(self, slot: int) -> memoryview:
        """The writable bytes of one slot. Raises IndexError outside the pool."""
        index, start = self.place(slot)
        return self._views[index][start : start + self.chunk_bytes]

    def address(self, slot: int) -> int:
        """The slot's address in this process, for transports that work on addresses."""
        index, start = self.place(slot)
        return self._addresses[index] + start

    def regions(self) -> list[tuple[int, int]]:
        """(address, length in bytes) of every mapped segment, for memory registration."""
        return [
            (address, segment.length_bytes) for address, segment in zip(self._addresses, self.segments, strict=True)
        ]

    def prefault(self) -> Iterator[int]:
        """Map the pages into this process, a slice per step; yields the bytes done so far.

        A first write to each page while a fetch is receiving costs a page fault per 4 KiB, which is a third of the
        whole transfer's time. The pages themselves exist already in an engine's pool; one of our own is allocated by
        this. A kernel that cannot (before 5.14) leaves the pages to be mapped when they are needed.
        """
        done = 0
        for mapped, segment in zip(self._maps, self.segments, strict=True):
            start = segment.offset_bytes - segment.offset_bytes % mmap.PAGESIZE
            end = segment.offset_bytes + segment.length_bytes
            for position in range(start, end, PREFAULT_SLICE_BYTES):
                length = min(PREFAULT_SLICE_BYTES, end - position)
                try:
                    mapped.madvise(_MADV_POPULATE_WRITE, position, length)
                except (OSError, ValueError):
                    return
                done += length
                yield done

    def close(self) -> None:
        """Close the descriptors and drop the mapping; rows still referenced elsewhere keep their memory alive."""
        for view in self._views:
            view.release()
        self._views.clear()
        self._maps.clear()
        for segment in self.segments:
            os.close(segment.fd)

    def place(self, slot: int) -> tuple[int, int]:
        """The slot's segment and its offset there in bytes. Raises IndexError outside the pool."""
        if not 0 <= slot < self.slots:
            raise IndexError(f"slot {slot} of a pool with {self.slots} slots")
        if len(self._first_slots) == 1:
            return 0, slot * self.chunk_bytes
        index = len(self._first_slots) - 1
        while self._first_slots[index] > slot:
            index -= 1
        return index, (slot - self._first_slots[index]) * self.chunk_bytes
