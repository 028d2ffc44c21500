"""Wire codecs: bytes in, fewer bytes out, and back."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import xxhash
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmesh.transfer.codec import (
    BLOCK_BYTES,
    CodecError,
    Int8Codec,
    PlaneCodec,
    blocks,
    int8_codec,
    lossless_codec,
    restored_digest,
)
from support.transfer_holder import kv_format, kv_like

GROUP = 64


def there_and_back(codec, block: bytes) -> bytes:
    coded = codec.encode(memoryview(block))
    if coded is None:
        return block
    assert len(coded) < len(block)
    restored = bytearray(len(block))
    codec.decode(memoryview(coded), memoryview(restored))
    return bytes(restored)


@given(
    words=st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=40),
    repeats=st.integers(1, 2000),
    width=st.sampled_from([1, 2, 4]),
)
@settings(deadline=None)
def test_planes_bring_every_byte_back(words: list[int], repeats: int, width: int) -> None:
    block = (np.array(words, np.uint16).tobytes() * (4 * repeats))[:BLOCK_BYTES]
    assert there_and_back(PlaneCodec(width), block) == block


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_numbers_like_those_of_kv_shrink(dtype: str) -> None:
    block = kv_like(1, BLOCK_BYTES, dtype)
    codec = lossless_codec(kv_format(BLOCK_BYTES, kv_dtype=dtype))
    assert codec is not None
    coded = codec.encode(memoryview(block))
    assert coded is not None
    assert len(coded) < 0.9 * len(block)
    assert there_and_back(codec, block) == block


def test_noise_is_sent_as_it_is() -> None:
    noise = np.random.default_rng(1).bytes(BLOCK_BYTES)
    assert PlaneCodec(2).encode(memoryview(noise)) is None


def test_chunks_that_are_no_whole_number_of_elements_are_not_coded() -> None:
    assert lossless_codec(kv_format(1001)) is None
    assert lossless_codec(kv_format(1001, kv_dtype="fp8")) is not None
    assert int8_codec(kv_format(1000)) is None


values = st.floats(width=16, allow_nan=True, allow_infinity=True) | st.floats(-(2.0**-20), 2.0**-20, width=16)


@given(
    numbers=st.lists(values, min_size=1, max_size=2 * GROUP),
    scale=st.sampled_from([1e-40, 1e-30, 1e-8, 1.0, 1e4, 1e30]),
    dtype=st.sampled_from(["bfloat16", "float16", "float32"]),
)
@settings(deadline=None)
def test_int8_of_what_was_int8_is_the_same(numbers: list[float], scale: float, dtype: str) -> None:
    """Bit by bit, whatever the numbers: so a chunk is rounded once, however many instances it passes."""
    with np.errstate(all="ignore"):
        wide = np.resize(np.array(numbers, np.float64) * scale, 2 * GROUP).astype(np.float32)
        if dtype == "bfloat16":
            block = (wide.view(np.uint32) >> 16).astype(np.uint16).tobytes()
        else:
            block = wide.astype(dtype).tobytes()
    codec = Int8Codec(dtype, GROUP)
    once = there_and_back(codec, block)
    assert there_and_back(codec, once) == once


def test_int8_rounds_to_half_a_step_of_the_largest_value() -> None:
    block = kv_like(2, BLOCK_BYTES, "float32")
    before = np.frombuffer(block, np.float32).reshape(-1, GROUP)
    after = np.frombuffer(there_and_back(Int8Codec("float32", GROUP), block), np.float32).reshape(-1, GROUP)
    largest = np.abs(before).max(axis=1)
    assert (np.abs(after).max(axis=1) == largest).all()
    assert (np.abs(after - before).max(axis=1) <= largest / 254 * 1.001).all()


def test_a_block_with_infinity_is_sent_as_it_is() -> None:
    block = np.array([1.0] * 63 + [np.inf], np.float32).tobytes()
    assert Int8Codec("float32", 64).encode(memoryview(block)) is None


def test_the_checksum_of_a_lossy_chunk_is_that_of_what_peers_make_of_it() -> None:
    codec = Int8Codec("bfloat16", GROUP)
    chunk = memoryview(kv_like(3, 3 * BLOCK_BYTES + 2 * GROUP, "bfloat16"))
    restored = b"".join(there_and_back(codec, bytes(block)) for block in blocks(chunk, codec.block_bytes))
    assert restored != chunk
    assert restored_digest(chunk, codec) == xxhash.xxh3_128_digest(restored)
    assert restored_digest(memoryview(restored), codec) == xxhash.xxh3_128_digest(restored)


def plane(data: bytes) -> bytes:
    return struct.pack("<I", len(data)) + data


BOMB = zstandard.ZstdCompressor().compress(bytes(1 << 26))


@pytest.mark.parametrize(
    "coded",
    [
        b"",
        b"\x01",
        plane(b"not a frame"),
        plane(bytes(512)),  # and where is the second?
        plane(bytes(512)) * 2 + b"x",
        plane(bytes(513)) * 2,
        plane(BOMB) * 2,
        struct.pack("<I", 2**32 - 1) + bytes(512),
        plane(zstandard.ZstdCompressor(write_content_size=False).compress(bytes(512))) * 2,
        plane(zstandard.ZstdCompressor().compress(bytes(511))) * 2,
        plane(zstandard.ZstdCompressor().compress(bytes(512))[:-1]) * 2,
        plane(zstandard.ZstdCompressor().compress(bytes(512)) + b"x") * 2,
    ],
)
def test_what_no_coder_makes_is_refused(coded: bytes) -> None:
    """Without setting aside more than a block, whatever a frame says it holds."""
    with pytest.raises(CodecError):
        PlaneCodec(2).decode(memoryview(coded), memoryview(bytearray(1024)))
    with pytest.raises(CodecError):
        Int8Codec("bfloat16", GROUP).decode(memoryview(coded), memoryview(bytearray(1024)))


@given(coded=st.binary(max_size=1100))
@settings(deadline=None)
def test_anything_else_is_refused_or_fills_the_block(coded: bytes) -> None:
    for codec in (PlaneCodec(2), PlaneCodec(4), Int8Codec("float16", GROUP)):
        block = bytearray(1024)
        try:
            codec.decode(memoryview(coded), memoryview(block))
        except CodecError:
            continue
        assert len(block) == 1024
