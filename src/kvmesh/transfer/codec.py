"""Wire codecs: the bytes of chunks made fewer for slow links. Pure; `kvmesh.transfer.coding` gives them to a node.

A chunk is cut into blocks of at most BLOCK_BYTES, coded one by one, so that neither side needs more memory than that
and coding goes on while the link carries what was coded before. A coded block is its length (4 bytes, little endian)
and so many bytes; a length equal to that of the block itself says that the block follows as it is.

`planes` (lossless): neighbouring values of KV have similar exponents and random mantissas. So the block is split into
planes, first bytes of all elements, second bytes, ... and each plane is compressed by zstd for itself. A plane is its
length and so many bytes; again, one that would not shrink is sent as it is. Source of the idea: byte shuffling in HDF5
and Blosc. zstd is set so that it looks for next to no repetitions: there are none in KV, and what gains is its entropy
coder (measured, one thread of a 2-core machine: 0.7 instead of 0.35 GB of plane per second, and 2 % smaller).

`int8` (lossy): each run of `group` elements, a token's key or value in one head, becomes the largest absolute value
in it (in the elements' own type) and an int8 for each element, 127 standing for that largest value. Coding what was
decoded before gives the same again, bit by bit: the largest value comes out as it went in, and all others within a
quarter of a step. A block with a value that is not finite is sent as it is.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import numpy.typing as npt
import xxhash
import zstandard

from kvmesh.core.format import Format, elements_of, int8_group

BLOCK_BYTES = 256 << 10
"""Before coding."""
LENGTH_BYTES = 4
_LENGTH = struct.Struct("<I")
_SAMPLE_BYTES = 4096
_WORTH = 0.97
"""A plane whose beginning shrinks less is not compressed."""
_WINDOW_BYTES = 1 << 20
"""More than any block needs: what a frame may make its reader set aside."""

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32] | npt.NDArray[np.float64]


class CodecError(ValueError):
    """What came is not what this codec makes."""


class Codec(Protocol):
    """One way to code. For one thread at a time."""

    name: str
    is_lossy: bool
    block_bytes: int

    def encode(self, block: memoryview) -> bytes | None:
        """The coded block, shorter than it; None when it is to be sent as it is."""
        ...

    def decode(self, coded: memoryview, block: memoryview) -> None:
        """Fill `block`. Raises CodecError, with anything in the block."""
        ...


def lossless_codec(kv_format: Format) -> Codec | None:
    """For chunks of this format; None when they are no whole number of elements."""
    width = elements_of(kv_format).size_bytes
    return None if kv_format.chunk_bytes % width else PlaneCodec(width)


def int8_codec(kv_format: Format) -> Codec | None:
    """For a format that says so (`kvmesh.core.format.with_int8`); None for others."""
    group = int8_group(kv_format)
    return None if group is None else Int8Codec(elements_of(kv_format).dtype, group)


def blocks(view: memoryview, block_bytes: int) -> Iterator[memoryview]:
    """The parts of a chunk that are coded for themselves."""
    for start in range(0, len(view), block_bytes):
        yield view[start : start + block_bytes]


def restored_digest(view: memoryview, codec: Codec) -> bytes:
    """xxh3-128 of what a chunk is after coding and decoding."""
    digest = xxhash.xxh3_128()
    scratch = memoryview(bytearray(codec.block_bytes))
    for block in blocks(view, codec.block_bytes):
        coded = codec.encode(block)
        if coded is None:
            digest.update(block)
            continue
        codec.decode(memoryview(coded), scratch[: len(block)])
        digest.update(scratch[: len(block)])
    return digest.digest()


class PlaneCodec:
    """`planes`: lossless."""

    name = "planes"
    is_lossy = False
    block_bytes = BLOCK_BYTES

    def __init__(self, width: int) -> None:
        """`width`: bytes of an element."""
        self._width = width
        self._planes = np.empty((width, BLOCK_BYTES // width), np.uint8)
        settings = zstandard.ZstdCompressionParameters.from_level(1, hash_log=6, min_match=7)
        self._compressor = zstandard.ZstdCompressor(compression_params=settings)
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=_WINDOW_BYTES)

    def encode(self, block: memoryview) -> bytes | None:
        raw = np.frombuffer(block, np.uint8)
        count = len(raw) // self._width
        parts: list[bytes | memoryview] = []
        for index in range(self._width):
            plane = self._planes[index, :count]
            np.copyto(plane, raw[index :: self._width])  # from now on nobody else can change it
            packed = self._pack(plane.data)
            parts += [_LENGTH.pack(len(packed)), packed]
        coded = b"".join(parts)
        return coded if len(coded) < len(block) else None

    def _pack(self, plane: memoryview) -> bytes | memoryview:
        if len(plane) > 2 * _SAMPLE_BYTES:
            middle = plane[len(plane) // 2 :][:_SAMPLE_BYTES]
            if len(self._compressor.compress(middle)) > _WORTH * len(middle):
                return plane
        packed = self._compressor.compress(plane)
        return packed if len(packed) < len(plane) else plane

    def decode(self, coded: memoryview, block: memoryview) -> None:
        raw = np.frombuffer(block, np.uint8)
        count = len(raw) // self._width
        for index in range(self._width):
            if len(coded) < LENGTH_BYTES:
                raise CodecError(f"plane {index} is missing")
            (length,) = _LENGTH.unpack_from(coded)
            packed, coded = coded[LENGTH_BYTES : LENGTH_BYTES + length], coded[LENGTH_BYTES + length :]
            if len(packed) != length or length > count:
                raise CodecError(f"plane {index} of {length} bytes where {count} are the most")
            plane = packed if length == count else self._unpack(packed, count)
            raw[index :: self._width] = np.frombuffer(plane, np.uint8)
        if len(coded):
            raise CodecError(f"{len(coded)} bytes after the last plane")

    def _unpack(self, packed: memoryview, count: int) -> bytes:
        """One frame that holds `count` bytes and says so: its reader sets aside what a frame says."""
        try:
            if zstandard.get_frame_parameters(packed).content_size != count:
                raise CodecError(f"a frame that does not say that it holds {count} bytes")
            plane = self._decompressor.decompress(packed, max_output_size=count, allow_extra_data=False)
        except (zstandard.ZstdError, MemoryError, ValueError) as error:
            raise CodecError(f"not a frame of {count} bytes: {error}") from None
        if len(plane) != count:
            raise CodecError(f"a frame of {len(plane)} bytes where {count} belong")
        return plane


class Int8Codec:
    """`int8`: lossy."""

    name = "int8"
    is_lossy = True

    def __init__(self, dtype: str, group: int) -> None:
        """
        Args:
            dtype: of the elements: bfloat16, float16 or float32.
            group: elements that have a scale in common.
        """
        self._element = _ELEMENTS[dtype]
        self._group = group
        run_bytes = group * self._element.size_bytes
        self.block_bytes = max(1, BLOCK_BYTES // run_bytes) * run_bytes

    def encode(self, block: memoryview) -> bytes | None:
        values = self._element.widen(np.frombuffer(block, np.uint8)).reshape(-1, self._group)
        largest = np.abs(values).max(axis=1)
        if not np.isfinite(largest).all():
            return None
        largest[largest < self._element.tiny] = 0
        steps = largest / largest.dtype.type(127)
        steps[steps == 0] = np.inf  # x / inf is 0
        values /= steps[:, None]
        scales = self._element.narrow(largest)
        return b"".join((scales.data, np.rint(values).astype(np.int8).data))

    def decode(self, coded: memoryview, block: memoryview) -> None:
        runs = len(block) // (self._group * self._element.size_bytes)
        scale_bytes = runs * self._element.size_bytes
        if len(coded) != scale_bytes + runs * self._group:
            raise CodecError(f"{len(coded)} bytes for {runs} runs of {self._group}")
        largest = self._element.widen(np.frombuffer(coded[:scale_bytes], np.uint8))
        steps = largest / largest.dtype.type(127)
        small = np.frombuffer(coded[scale_bytes:], np.int8).reshape(runs, self._group)
        with np.errstate(invalid="ignore", over="ignore"):  # scales that lie; the checksum finds them
            values = small * steps[:, None]
            np.frombuffer(block, np.uint8)[:] = self._element.narrow(values.reshape(-1)).view(np.uint8)


class _Element(Protocol):
    size_bytes: int
    tiny: float
    """Runs without a larger value become zeros: below it, steps would lose their precision."""

    def widen(self, raw: Bytes) -> Floats:
        """The elements as floats that hold each of them, and its 127th part, with some bits to spare."""
        ...

    def narrow(self, values: Floats) -> npt.NDArray[np.generic]:
        """Back, rounded to the nearest."""
        ...


class _BFloat16:
    """The upper half of a float32; NumPy has no such type."""

    size_bytes = 2
    tiny = 2.0**-100

    def widen(self, raw: Bytes) -> Floats:
        return (raw.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)

    def narrow(self, values: Floats) -> npt.NDArray[np.generic]:
        words = values.astype(np.float32, copy=False).view(np.uint32)
        half = np.uint32(0x7FFF) + ((words >> np.uint32(16)) & np.uint32(1))  # ties to even
        return ((words + half) >> np.uint32(16)).astype(np.uint16)


class _Float16:
    size_bytes = 2
    tiny = 2.0**-16

    def widen(self, raw: Bytes) -> Floats:
        return raw.view(np.float16).astype(np.float32)

    def narrow(self, values: Floats) -> npt.NDArray[np.generic]:
        return values.astype(np.float16)


class _Float32:
    size_bytes = 4
    tiny = 2.0**-100

    def widen(self, raw: Bytes) -> Floats:
        return raw.view(np.float32).astype(np.float64)

    def narrow(self, values: Floats) -> npt.NDArray[np.generic]:
        return values.astype(np.float32)


_ELEMENTS: dict[str, _Element] = {"bfloat16": _BFloat16(), "float16": _Float16(), "float32": _Float32()}
