from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmesh.wire.framing import FrameBuffer, FrameError, pack_frame, parse_length, read_frame

LIMIT = 1000
payloads = st.lists(st.binary(min_size=1, max_size=LIMIT), max_size=5)


async def read_all(stream: bytes, limit_bytes: int = LIMIT) -> list[bytes]:
    reader = asyncio.StreamReader()
    reader.feed_data(stream)
    reader.feed_eof()
    found = []
    while (payload := await read_frame(reader, limit_bytes)) is not None:
        found.append(payload)
    return found


@given(payloads)
def test_frames_come_out_as_they_went_in(sent):
    """Any sequence of payloads within the limit survives; the end of the stream between two frames is no error."""
    assert asyncio.run(read_all(b"".join(map(pack_frame, sent)))) == sent


@given(payloads, st.lists(st.integers(1, 50), min_size=1))
def test_a_buffer_gives_the_same_frames_however_the_bytes_arrive(sent, sizes):
    """Pieces of any size: a frame is complete exactly when its last byte has come."""
    stream, buffer, found = b"".join(map(pack_frame, sent)), FrameBuffer(LIMIT), []
    while stream:
        for size in sizes:
            found += buffer.feed(stream[:size])
            stream = stream[size:]
    assert found == sent


@given(st.binary(min_size=1, max_size=LIMIT), st.data())
def test_a_stream_that_ends_inside_a_frame_is_an_error(payload, data):
    """Half a frame is never taken for a whole one, nor for a clean end."""
    frame = pack_frame(payload)
    cut = data.draw(st.integers(1, len(frame) - 1))
    with pytest.raises(FrameError):
        asyncio.run(read_all(frame[:cut]))


@given(st.binary(max_size=200))
def test_garbage_gives_frames_or_a_frame_error(stream):
    """No bytes whatever raise anything else."""
    try:
        found = asyncio.run(read_all(stream))
    except FrameError:
        return
    assert b"".join(map(pack_frame, found)) == stream


@pytest.mark.parametrize("length", [0, LIMIT + 1, (1 << 32) - 1])
def test_lengths_outside_the_limit_are_refused_before_anything_is_read(length):
    with pytest.raises(FrameError, match=f"frame of {length} bytes"):
        parse_length(length.to_bytes(4, "little"), LIMIT)


def test_an_empty_frame_cannot_be_sent():
    with pytest.raises(FrameError):
        pack_frame(b"")
