"""From an address to descriptors: whatever made the mapping, the node can map the same bytes."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import tempfile

import pytest

from kvmesh.errors import UnsupportedError
from kvmesh.transfer.pool import HostPool
from kvmesh.vllm.pool_files import find_segments

PAGE = mmap.PAGESIZE

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_MAP_FIXED = 0x10
_PROT_NONE = 0


@pytest.fixture
def cleanup():
    with contextlib.ExitStack() as stack:
        yield stack


def memfd(cleanup, pages: int) -> int:
    fd = os.memfd_create("kvmesh-test")
    cleanup.callback(close_if_open, fd)
    os.ftruncate(fd, pages * PAGE)
    return fd


def close_if_open(fd: int) -> None:
    with contextlib.suppress(OSError):
        os.close(fd)


def reserve(cleanup, pages: int) -> int:
    """An address range of our own; `place` lays files over it."""
    address = _libc.mmap(None, pages * PAGE, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    cleanup.callback(_libc.munmap, address, pages * PAGE)
    return address


def place(fd: int, address: int, pages: int, offset_pages: int = 0, flags: int = mmap.MAP_SHARED) -> None:
    rights = mmap.PROT_READ | mmap.PROT_WRITE
    placed = _libc.mmap(address, pages * PAGE, rights, flags | _MAP_FIXED, fd, offset_pages * PAGE)
    assert placed == address


def same_bytes(segments, address: int, length_bytes: int) -> bool:
    """Whether mapping the segments shows what stands at the address."""
    fresh = [segment._replace(fd=os.dup(segment.fd)) for segment in segments]
    pool = HostPool(fresh, chunk_bytes=PAGE)
    try:
        found = b"".join(bytes(pool.row(slot)) for slot in range(pool.slots))
    finally:
        pool.close()
    return found == ctypes.string_at(address, length_bytes)


def test_a_memfd_is_one_segment(cleanup):
    fd, address = memfd(cleanup, 4), reserve(cleanup, 4)
    place(fd, address, 4)
    ctypes.memmove(address, os.urandom(4 * PAGE), 4 * PAGE)
    segments = find_segments(address, 4 * PAGE)
    assert [(each.offset_bytes, each.length_bytes) for each in segments] == [(0, 4 * PAGE)]
    assert same_bytes(segments, address, 4 * PAGE)


def test_a_file_whose_name_is_gone_is_found_by_its_descriptor(cleanup):
    """The pool's name goes early, so that a killed engine leaves nothing; the kernel then shows it as deleted."""
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:  # unlinked here, below
        fd = os.dup(file.fileno())
    cleanup.callback(close_if_open, fd)
    os.ftruncate(fd, 2 * PAGE)
    address = reserve(cleanup, 2)
    place(fd, address, 2)
    ctypes.memmove(address, os.urandom(2 * PAGE), 2 * PAGE)
    assert same_bytes(find_segments(address, 2 * PAGE), address, 2 * PAGE)


def test_a_part_of_a_file_keeps_its_offset(cleanup):
    fd, address = memfd(cleanup, 8), reserve(cleanup, 4)
    place(fd, address, 4, offset_pages=3)
    ctypes.memmove(address, os.urandom(4 * PAGE), 4 * PAGE)
    (segment,) = find_segments(address + PAGE, 2 * PAGE)
    assert (segment.offset_bytes, segment.length_bytes) == (4 * PAGE, 2 * PAGE)
    assert same_bytes([segment], address + PAGE, 2 * PAGE)


def test_several_files_back_to_back_are_several_segments(cleanup):
    """A pool may be split into files that lie under one contiguous range."""
    first, second = memfd(cleanup, 2), memfd(cleanup, 3)
    address = reserve(cleanup, 5)
    place(first, address, 2)
    place(second, address + 2 * PAGE, 3)
    ctypes.memmove(address, os.urandom(5 * PAGE), 5 * PAGE)
    segments = find_segments(address, 5 * PAGE)
    assert [each.length_bytes for each in segments] == [2 * PAGE, 3 * PAGE]
    assert same_bytes(segments, address, 5 * PAGE)


def test_one_mapping_that_the_kernel_shows_in_parts_is_one_segment(cleanup):
    """Advice or locks on a part split a range in /proc/self/maps; the file under it is still one."""
    fd, address = memfd(cleanup, 6), reserve(cleanup, 6)
    place(fd, address, 6)
    _libc.mprotect(ctypes.c_void_p(address + 2 * PAGE), PAGE, mmap.PROT_READ)
    (segment,) = find_segments(address, 6 * PAGE)
    assert (segment.offset_bytes, segment.length_bytes) == (0, 6 * PAGE)


def test_memory_of_this_process_alone_is_refused(cleanup):
    """Anonymous and private memory cannot be shown to a node."""
    address = reserve(cleanup, 2)
    with pytest.raises(UnsupportedError, match="shared file mappings, found 0 bytes"):
        find_segments(address, 2 * PAGE)
    place(memfd(cleanup, 2), address, 2, flags=mmap.MAP_PRIVATE)
    with pytest.raises(UnsupportedError, match="found 0 bytes"):
        find_segments(address, 2 * PAGE)


def test_a_gap_is_refused_and_counted(cleanup):
    fd, address = memfd(cleanup, 2), reserve(cleanup, 4)
    place(fd, address, 2)
    with pytest.raises(UnsupportedError, match=f"found {2 * PAGE} bytes"):
        find_segments(address, 4 * PAGE)


def test_a_pool_whose_descriptor_was_closed_is_refused(cleanup):
    """Without a descriptor there is nothing to hand to the node; say so instead of handing over a wrong one."""
    fd, address = memfd(cleanup, 2), reserve(cleanup, 2)
    place(fd, address, 2)
    os.close(fd)
    with pytest.raises(UnsupportedError, match="an open descriptor of its file"):
        find_segments(address, 2 * PAGE)
