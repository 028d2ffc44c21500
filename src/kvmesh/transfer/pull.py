"""One connection's part in a fetch over tcp: asks for runs of chunks and receives them straight into the slots."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import xxhash

from kvmesh.core.reasons import MissReason
from kvmesh.errors import PeerAuthenticationError, PeerProtocolError, PeerTimeoutError
from kvmesh.transfer.base import Deadline
from kvmesh.transfer.coding import Decoder, PeerCoding
from kvmesh.transfer.leases import FetchBook
from kvmesh.transfer.link import PeerLink
from kvmesh.transfer.pool import HostPool
from kvmesh.wire.auth import AuthenticationError
from kvmesh.wire.peer import (
    HEADER_BYTES,
    MAX_KEYS,
    TRAILER_BYTES,
    ChunkHeader,
    ChunkStatus,
    ChunkTrailer,
    Get,
    MessageError,
    Verdict,
    parse_header,
    parse_trailer,
)

RUN_BYTES = 16 << 20
"""Chunks asked for in one request: the holder sends the last trailer of each by itself, and looks for the next request,
which costs the more the smaller they are (measured).
"""
AHEAD_BYTES = 8 << 20
"""When no more than this is still to come, the next run is asked for: 100 Gbit/s at 0.6 ms of round trip."""
PIECE_BYTES = 4 << 20
"""Received and hashed at a time. Larger pieces leave the cache before they are hashed; smaller ones cost wake-ups, and
beside an engine that keeps the processors busy a third of the speed (measured).
"""
REST_S = 0.05
"""What was asked for behind a hole in the prefix is of no use to the request: it may take so long to come, or the
connection is given up. On a fast link that is cheaper than another connection, on a slow one nobody waits for it.
"""


def run_chunks(chunk_bytes: int) -> int:
    """Chunks of one request."""
    return max(1, min(MAX_KEYS, RUN_BYTES // chunk_bytes))


class _Asked(NamedTuple):
    """A chunk on its way: which request asks for it, at which position, and which item of the fetch it is."""

    request: int
    position: int
    item: int


class Way:
    """Coded or raw: the same for all of a fetch, so that it says how fast that is. Safe to use from any thread."""

    def __init__(self, peer: PeerCoding | None) -> None:
        self._coding = peer.coding if peer is not None else None
        self._is_coded = peer is not None and peer.wants_coded()
        self._lock = threading.Lock()
        self.is_offered = False
        """The peer knows our codec."""
        self.wire_bytes = 0
        """That have come coded."""

    def decoder(self, link: PeerLink) -> Decoder | None:
        """What to receive with on this connection; None for raw chunks. Raises PeerProtocolError."""
        if self._coding is None:
            return None
        if self._coding.name not in link.theirs.codecs:
            if self._coding.is_lossy:
                raise PeerProtocolError(link.peer, expected=f"codec {self._coding.name}", found="none in common")
            return None
        self.is_offered = True
        return self._coding.decoder() if self._is_coded else None

    @property
    def codec(self) -> str:
        """The codec's name, for a Get whose answer is read with `decoder`."""
        return "" if self._coding is None else self._coding.name

    def add(self, wire_bytes: int) -> None:
        """A chunk has come."""
        with self._lock:
            self.wire_bytes += wire_bytes


class Pull:
    """One connection's part in a fetch."""

    def __init__(
        self, book: FetchBook, deadline: Deadline, pool: HostPool, way: Way, *, verify: bool, reports: bool
    ) -> None:
        self._book = book
        self._deadline = deadline
        self._pool = pool
        self._way = way
        self._decoder: Decoder | None = None
        self._verify = verify
        self._reports = reports
        self._run_chunks = run_chunks(pool.chunk_bytes)
        self._asked: deque[_Asked] = deque()
        self._requests = 0
        self._header = memoryview(bytearray(HEADER_BYTES))
        self._trailer = memoryview(bytearray(TRAILER_BYTES))
        self._has_header = False
        """The header of the next chunk has been read."""
        self._met_hole = False
        self.has_heard = False
        """The peer has answered on this connection."""

    def run(self, link: PeerLink) -> bool:
        """Pull until nothing is left; False when the connection is not to be used again, with nobody to blame.

        Raises what the link raises, with the undecided items still on our list.
        """
        self._decoder = self._way.decoder(link)
        self._ask_again(link)
        while self._ask_ahead(link):
            try:
                self._receive(link, self._asked[0])
            except PeerTimeoutError:
                if not self._met_hole:
                    raise
                self.give_up(MissReason.TRUNCATED)
                return False
            self._asked.popleft()
            if self._reports:
                self._book.report()
        return True

    def give_up(self, reason: MissReason) -> None:
        """Decide what was asked for here, and have the rest not asked for."""
        for asked in self._asked:
            self._book.miss(asked.item, reason)
        self._asked.clear()
        self._book.end(reason)

    def _ask_ahead(self, link: PeerLink) -> bool:
        """Keep runs asked for; False when nothing is on its way any more."""
        while len(self._asked) * self._pool.chunk_bytes <= AHEAD_BYTES:
            run = self._book.take(self._run_chunks)
            if not run:
                break
            self._ask(link, run)
        return bool(self._asked)

    def _ask_again(self, link: PeerLink) -> None:
        """After an idle connection turned out dead: its requests, on the new one."""
        indices = [asked.item for asked in self._asked]
        self._asked.clear()
        self._has_header = False
        for start in range(0, len(indices), self._run_chunks):
            self._ask(link, indices[start : start + self._run_chunks])

    def _ask(self, link: PeerLink, indices: Sequence[int]) -> None:
        self._requests += 1
        self._asked.extend(_Asked(self._requests, position, index) for position, index in enumerate(indices))
        keys: list[bytes] = [self._book.items[index].key for index in indices]
        link.send(Get(self._requests, keys, self._way.codec if self._decoder is not None else ""), self._deadline)

    def _receive(self, link: PeerLink, asked: _Asked) -> None:
        """One chunk into its slot, and the next one's header where that comes with it."""
        stream, deadline, book = link.stream, self._deadline, self._book
        if not self._has_header:
            stream.receive_into(self._header, deadline)
        self.has_heard, self._has_header = True, False
        if self._parse_header(link, asked).status is ChunkStatus.GONE:
            book.miss(asked.item, MissReason.EVICTED)
            self._end_here()
            return
        row = self._pool.row(book.items[asked.item].slot)
        digest = xxhash.xxh3_128() if self._verify else None
        if self._decoder is None:
            self._receive_raw(link, asked, row, digest)
        else:
            self._way.add(self._decoder.receive(stream, row, deadline, digest))
            stream.receive_into(self._trailer, deadline)
        trailer = self._parse_trailer(link, asked)
        if trailer.verdict is Verdict.STALE:
            book.miss(asked.item, MissReason.STALE)
        elif digest is not None and digest.digest() != trailer.checksum:
            book.miss(asked.item, MissReason.CORRUPT)
        else:
            book.hit(asked.item, trailer.checksum)
            return
        self._end_here()

    def _end_here(self) -> None:
        """The prefix ends with a chunk that did not come; all that is still on its way here comes after it."""
        self._book.end(MissReason.TRUNCATED)
        if not self._met_hole:
            self._met_hole = True
            self._deadline = self._deadline._replace(at_s=min(self._deadline.at_s, time.monotonic() + REST_S))

    def _receive_raw(self, link: PeerLink, asked: _Asked, row: memoryview, digest: xxhash.xxh3_128 | None) -> None:
        """Payload and trailer, and the next header where that comes with them."""
        stream, deadline = link.stream, self._deadline
        last = (len(row) - 1) // PIECE_BYTES * PIECE_BYTES
        for start in range(0, last, PIECE_BYTES):
            piece = row[start : start + PIECE_BYTES]
            stream.receive_into(piece, deadline)
            if digest is not None:
                digest.update(piece)
        # Within one Get the holder sends a trailer together with the next header, so waiting for both delays nothing.
        self._has_header = len(self._asked) > 1 and self._asked[1].request == asked.request
        tail = [self._trailer, self._header] if self._has_header else [self._trailer]
        stream.receive_parts([row[last:], *tail], deadline)
        if digest is not None:
            digest.update(row[last:])

    def _parse_header(self, link: PeerLink, asked: _Asked) -> ChunkHeader:
        try:
            header = parse_header(self._header, link.stream.receiving)
        except AuthenticationError as error:
            raise PeerAuthenticationError(link.peer, found=str(error)) from None
        except MessageError as error:
            raise PeerProtocolError(link.peer, found=str(error)) from None
        if header[1:3] != asked[:2]:
            raise PeerProtocolError(link.peer, expected=f"chunk {asked[:2]}", found=f"chunk {header[1:3]}")
        if header.status is ChunkStatus.HELD and header.length != self._pool.chunk_bytes:
            expected = f"chunk of {self._pool.chunk_bytes} bytes"
            raise PeerProtocolError(link.peer, expected=expected, found=f"{header.length} bytes")
        return header

    def _parse_trailer(self, link: PeerLink, asked: _Asked) -> ChunkTrailer:
        try:
            trailer = parse_trailer(self._trailer, link.stream.receiving)
        except AuthenticationError as error:
            raise PeerAuthenticationError(link.peer, found=str(error)) from None
        except MessageError as error:
            raise PeerProtocolError(link.peer, found=str(error)) from None
        if trailer[1:3] != asked[:2]:
            raise PeerProtocolError(link.peer, expected=f"trailer of chunk {asked[:2]}", found=f"of {trailer[1:3]}")
        return trailer
