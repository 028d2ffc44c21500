"""The asking side's hold on a peer's pool and ledger: descriptors that came over a unix socket, and what they lead to.

They come from another process, which may lie and may change everything at any time. So chunks are read with `pread`,
which returns fewer bytes where a file has been cut short (reading through a mapping would kill us); the ledger is
mapped, but only when it is sealed against that; and both must be shared memory, because a file of another kind (of a
network or user-space file system) could hold up a read for ever.
"""

from __future__ import annotations

import fcntl
import os
import stat
from typing import NamedTuple

from kvmesh.core.ledger import SlotLedger
from kvmesh.core.ledger_index import LedgerIndex
from kvmesh.errors import PeerClosedError, PeerProtocolError
from kvmesh.transfer.base import Deadline
from kvmesh.transfer.link import PeerLink, PeerTarget, refusal
from kvmesh.transfer.security import OPEN, PeerSecurity
from kvmesh.transfer.shm_holder import socket_address
from kvmesh.transfer.unix_stream import UnixStream, close_all, connect_unix
from kvmesh.wire.peer import (
    FRAME_LIMIT_BYTES,
    MAX_SEGMENTS,
    Hello,
    MessageError,
    Refused,
    ShmAttach,
    ShmAttached,
    ShmSegment,
    decode_answer,
)

MAX_SLOTS = 1 << 22
"""Of a peer's pool: what one peer can make us remember has an end (`core/replica.py` has the same)."""


class _Part(NamedTuple):
    """A run of slots in one file."""

    first_slot: int
    fd: int
    offset_bytes: int


class Attachment:
    """A peer's pool and ledger, readable. `read` and `index` may be used by many threads until `close`."""

    def __init__(self, link: PeerLink, descriptors: list[int], segments: list[ShmSegment], *, chunk_bytes: int) -> None:
        """Takes the descriptors over, and closes them when it raises PeerProtocolError."""
        self.link = link
        self.chunk_bytes = chunk_bytes
        self.is_alive = True
        """False once the peer has closed the connection or died: its memory may stay, but nobody looks after it."""
        self.users = 0
        """Fetches that read now; guarded by whoever shares the attachment."""
        self._descriptors = descriptors
        try:
            self._parts, slots = _parts(descriptors, segments, chunk_bytes)
            self.ledger = _attach_ledger(descriptors[0], slots, chunk_bytes)
        except (OSError, ValueError) as error:
            close_all(descriptors)
            raise PeerProtocolError(link.peer, expected="its pool and ledger", found=str(error)) from None
        self.index = LedgerIndex(self.ledger)
        self.index.refresh()

    @classmethod
    def dial(
        cls, target: PeerTarget, ours: Hello, chunk_bytes: int, deadline: Deadline, security: PeerSecurity = OPEN
    ) -> Attachment:
        """Connect, greet and get the descriptors. Raises what `PeerLink.dial` does."""
        stream = connect_unix(socket_address(target.port, target.incarnation), deadline, str(target))
        link = PeerLink.greet(stream, target, ours, deadline, security)
        try:
            link.send(ShmAttach(), deadline)
            answer, descriptors = _receive(stream, deadline)
            return cls(link, descriptors, answer.segments, chunk_bytes=chunk_bytes)
        except BaseException:
            link.close()
            raise

    def read(self, slot: int, offset_bytes: int, row: memoryview) -> None:
        """Fill `row` from the peer's slot, starting at `offset_bytes` in it. Raises PeerClosedError when the file does
        not have the bytes any more.
        """
        part = self._parts[-1]
        if part.first_slot > slot:
            part = next(part for part in reversed(self._parts) if part.first_slot <= slot)
        start = part.offset_bytes + (slot - part.first_slot) * self.chunk_bytes + offset_bytes
        while row:
            try:
                count = os.preadv(part.fd, [row], start)
            except OSError as error:
                raise PeerClosedError(self.link.peer, found=f"its pool cannot be read: {error}") from None
            if not count:
                raise PeerClosedError(self.link.peer, found="its pool's file has been cut short")
            row, start = row[count:], start + count

    def wait_for_end(self) -> None:
        """Block until the peer has closed, died, or said something, which nobody has asked for."""
        while not self.link.stream.wait_readable(600.0):
            pass

    def close(self) -> None:
        """Let go of everything. Nobody may be reading. Never raises."""
        self.link.close()
        self.ledger.close()
        close_all(self._descriptors)


def _receive(stream: UnixStream, deadline: Deadline) -> tuple[ShmAttached, list[int]]:
    payload, descriptors = stream.receive_frame_with(deadline, FRAME_LIMIT_BYTES, MAX_SEGMENTS + 1)
    try:
        answer = decode_answer(payload)
    except MessageError as violation:
        close_all(descriptors)
        raise PeerProtocolError(stream.peer, found=str(violation)) from None
    if isinstance(answer, ShmAttached) and len(descriptors) == len(answer.segments) + 1:
        return answer, descriptors
    close_all(descriptors)
    if isinstance(answer, Refused):
        raise refusal(answer, stream.peer)
    found = f"{type(answer).__name__} with {len(descriptors)} descriptors"
    raise PeerProtocolError(stream.peer, expected="ShmAttached and its descriptors", found=found)


def _parts(descriptors: list[int], segments: list[ShmSegment], chunk_bytes: int) -> tuple[list[_Part], int]:
    """Where slots lie, and how many there are. Raises ValueError or OSError."""
    parts, slots = [], 0
    for fd, segment in zip(descriptors[1:], segments, strict=True):
        _check_shared_memory(fd)
        if segment.length % chunk_bytes:
            raise ValueError(f"a segment of {segment.length} bytes with chunks of {chunk_bytes}")
        if segment.offset + segment.length > os.fstat(fd).st_size:
            raise ValueError("a segment that reaches beyond its file")
        parts.append(_Part(slots, fd, segment.offset))
        slots += segment.length // chunk_bytes
    return parts, slots


def _attach_ledger(fd: int, slots: int, chunk_bytes: int) -> SlotLedger:
    """Raises ValueError or OSError."""
    if not _check_shared_memory(fd) & fcntl.F_SEAL_SHRINK:
        raise ValueError("a ledger that is not sealed: it could be cut short while it is read")
    own = os.dup(fd)
    try:
        ledger = SlotLedger.attach(own, writable=False)
    except BaseException:
        os.close(own)
        raise
    if (ledger.slots, ledger.chunk_bytes) == (slots, chunk_bytes) and slots <= MAX_SLOTS:
        return ledger
    found = f"a ledger of {ledger.slots} slots of {ledger.chunk_bytes} bytes, with a pool of {slots} of {chunk_bytes}"
    ledger.close()
    raise ValueError(found)


def _check_shared_memory(fd: int) -> int:
    """The file's seals. Raises ValueError when it is not in memory: other files have none."""
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise ValueError("a descriptor that is no file")
    try:
        return int(fcntl.fcntl(fd, fcntl.F_GET_SEALS))
    except OSError:
        raise ValueError("a file that is not in shared memory") from None
