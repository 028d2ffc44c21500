"""Sends slots to peers over tcp: the answer to a Get (see `kvmesh.wire.peer`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from kvmesh.core.ledger import SlotLedger
from kvmesh.transfer.base import Deadline, Locate, Located
from kvmesh.transfer.coding import Coding
from kvmesh.transfer.pool import HostPool
from kvmesh.transfer.stream import PeerStream
from kvmesh.wire.peer import (
    NO_CHECKSUM,
    ChunkHeader,
    ChunkStatus,
    ChunkTrailer,
    Get,
    MessageError,
    Verdict,
    pack_header,
    pack_trailer,
)


class ChunkSender:
    """Reads slots straight from the pool, without a lock. Called by the connections' threads."""

    def __init__(
        self, pool: HostPool, ledger: SlotLedger, locate: Locate, coding: Coding | None, patience: Deadline
    ) -> None:
        self._pool = pool
        self._ledger = ledger
        self._locate = locate
        self._coding = coding
        self._patience = patience

    def find(self, key: bytes) -> Located | None:
        """Where the chunk is, if the ledger agrees that it is there under this very key."""
        located = self._locate(key)
        if located is None:
            return None
        record = self._ledger.read(located.slot)
        if record is None or record.generation != located.generation or record.key != key:
            return None
        return located

    def send(self, stream: PeerStream, get: Get, counts: Counter[str]) -> list[bytes | memoryview]:
        """Header, payload, trailer for each key. A trailer leaves together with what follows it, in one system call;
        returns what is to be sent last.

        Adds to `counts` (`served`, `stale`, `gone`) as it goes. Raises MessageError and what the stream raises.
        """
        coding = self._coding_for(get)
        owed: list[bytes | memoryview] = []
        for position, key in enumerate(get.keys):
            located = self.find(key)
            if located is None:
                counts["gone"] += 1
                owed.append(pack_header(ChunkHeader(ChunkStatus.GONE, get.request, position, 0), stream.sending))
                continue
            row = self._pool.row(located.slot)
            header = ChunkHeader(ChunkStatus.HELD, get.request, position, len(row))
            owed.append(pack_header(header, stream.sending))
            if coding is None:
                stream.send([*owed, row], self._patience)
            else:
                self._send_coded(stream, coding, row, owed)
            # Every byte has left the slot: only now does the generation say what they were.
            is_valid = self._ledger.is_current(located.slot, located.generation)
            counts["served" if is_valid else "stale"] += 1
            verdict = Verdict.VALID if is_valid else Verdict.STALE
            checksum = located.checksum if is_valid else NO_CHECKSUM
            owed = [pack_trailer(ChunkTrailer(verdict, get.request, position, checksum), stream.sending)]
        return owed

    def _coding_for(self, get: Get) -> Coding | None:
        """The codec that a Get names; None for raw chunks. Raises MessageError for one that we did not offer, and for
        none where bytes only travel coded.
        """
        coding = self._coding
        if coding is not None and get.codec == coding.name:
            return coding
        if get.codec or (coding is not None and coding.is_lossy):
            raise MessageError(f"chunks asked for with codec {get.codec!r}")
        return None

    def _send_coded(
        self, stream: PeerStream, coding: Coding, row: memoryview, owed: Sequence[bytes | memoryview]
    ) -> None:
        """A slot block by block: the kernel sends what was coded before while the next one is coded."""
        for block in coding.blocks(row):
            stream.send([*owed, *coding.code(block)], self._patience)
            owed = ()
