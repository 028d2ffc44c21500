"""Find the files behind vLLM's host pool, so that the node can map the same memory.

vLLM hands its tiers a memoryview, not a file, and how the file is named, split and unlinked differs between versions.
What the kernel says does not: `/proc/self/maps` names device and inode of every mapped range, and one of our open
descriptors leads to that inode.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from kvmesh.errors import UnsupportedError
from kvmesh.transfer.pool import PoolSegment

_MAPS_LINE = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) (\S{4}) ([0-9a-f]+) ([0-9a-f]+):([0-9a-f]+) (\d+)")


class _Range(NamedTuple):
    start: int
    end: int
    offset: int
    device: int
    inode: int


def find_segments(address: int, length_bytes: int) -> list[PoolSegment]:
    """Descriptors, offsets and lengths of the shared files mapped at [address, address + length_bytes), in order.

    The descriptors stay owned by whoever opened them. Raises UnsupportedError when part of the range is not a shared
    file, or the file is no longer open in this process.
    """
    maps = Path("/proc/self/maps").read_text(errors="replace")
    ranges = [found for line in maps.splitlines() if (found := _parse(line)) is not None]
    segments: list[PoolSegment] = []
    end = address + length_bytes
    position = address
    for mapped in _covering(ranges, address, end):
        if mapped.start > position or mapped.inode == 0:
            break
        stop = min(mapped.end, end)
        fd = _descriptor(mapped.device, mapped.inode)
        offset = mapped.offset + position - mapped.start
        previous = segments[-1] if segments else None
        if previous is not None and previous.fd == fd and previous.offset_bytes + previous.length_bytes == offset:
            segments[-1] = PoolSegment(fd, previous.offset_bytes, previous.length_bytes + stop - position)
        else:
            segments.append(PoolSegment(fd, offset, stop - position))
        position = stop
    if position < end:
        raise UnsupportedError(
            "vLLM's host pool",
            expected=f"{length_bytes} bytes of shared file mappings",
            found=f"{position - address} bytes",
            hint="sharing needs the pool in shared memory, as vLLM's tiering offload makes it",
        )
    return segments


def _parse(line: str) -> _Range | None:
    match = _MAPS_LINE.match(line)
    if match is None or not match[3].endswith("s"):
        return None
    device = os.makedev(int(match[5], 16), int(match[6], 16))
    return _Range(int(match[1], 16), int(match[2], 16), int(match[4], 16), device, int(match[7]))


def _covering(ranges: Iterable[_Range], start: int, end: int) -> Iterator[_Range]:
    return (mapped for mapped in sorted(ranges) if mapped.end > start and mapped.start < end)


def _descriptor(device: int, inode: int) -> int:
    for link in Path("/proc/self/fd").iterdir():
        try:
            found = link.stat()
        except OSError:
            continue
        if (found.st_dev, found.st_ino) == (device, inode):
            return int(link.name)
    raise UnsupportedError(
        "vLLM's host pool", expected="an open descriptor of its file", found=f"none for inode {inode}"
    )
