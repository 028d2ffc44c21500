"""Frames on a byte stream: four bytes of length (little endian), then that many bytes of payload.

Used by the engine link (asyncio, unix socket) and by the peer protocol (blocking sockets, see
`kvmesh.transfer.stream`). Every reader names the longest payload it takes, so a length that lies costs nothing but its
connection. An empty frame does not exist.
"""

from __future__ import annotations

import asyncio
import struct

LENGTH_BYTES = 4
_LENGTH = struct.Struct("<I")


class FrameError(ValueError):
    """The stream is not a sequence of frames within the limit; it cannot be read any further."""


def pack_frame(payload: bytes) -> bytes:
    """One frame, ready to be written. Raises FrameError for an empty payload or one of 4 GiB and more."""
    if not 0 < len(payload) < 1 << 32:
        raise FrameError(f"frame of {len(payload)} bytes cannot be sent")
    return _LENGTH.pack(len(payload)) + payload


def parse_length(prefix: bytes | bytearray | memoryview, limit_bytes: int) -> int:
    """Payload length of the frame that starts with `prefix` (four bytes). Raises FrameError outside 1..limit_bytes."""
    (length,) = _LENGTH.unpack(prefix)
    if not 0 < length <= limit_bytes:
        raise FrameError(f"frame of {length} bytes; 1 to {limit_bytes} are allowed")
    return int(length)


async def read_frame(reader: asyncio.StreamReader, limit_bytes: int) -> bytes | None:
    """The next payload, or None when the stream ended between two frames.

    Raises FrameError for a bad length or an end inside a frame, and lets OSError of a broken connection pass. Not safe
    against cancellation: a cancelled read may have consumed half a frame, so the connection must be closed afterwards.
    """
    prefix = b""
    try:
        prefix = await reader.readexactly(LENGTH_BYTES)
        return await reader.readexactly(parse_length(prefix, limit_bytes))
    except asyncio.IncompleteReadError as error:
        if not prefix and not error.partial:
            return None
        raise FrameError(f"stream ended inside a frame, {len(error.partial)} of {error.expected} bytes read") from None


class FrameBuffer:
    """Splits what a blocking socket returns into payloads. One thread."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._data = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The payloads that are complete now. Raises FrameError for a bad length; the buffer is no use afterwards."""
        self._data += data
        payloads = []
        start = 0
        while len(self._data) - start >= LENGTH_BYTES:
            length = parse_length(self._data[start : start + LENGTH_BYTES], self._limit_bytes)
            end = start + LENGTH_BYTES + length
            if len(self._data) < end:
                break
            payloads.append(bytes(self._data[start + LENGTH_BYTES : end]))
            start = end
        del self._data[:start]
        return payloads
