"""A node's wire codec: how chunks are coded on their way over tcp, whether they are, and what that has cost and saved.

A holder codes in the threads of its connections, with a few coders that all of them share: memory and processors have
a bound, whoever asks. A fetcher decodes in its own threads, straight into the slots. Which of the two a fetch asks for
is decided by `kvmesh.core.codec_choice`, unless the configuration has decided it.
"""

from __future__ import annotations

import os
import queue
import struct
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from kvmesh.config.model import WireCodec
from kvmesh.core.codec_choice import CodecChoice, CodecFacts
from kvmesh.core.format import Format, int8_group
from kvmesh.errors import PeerProtocolError, StartupError
from kvmesh.transfer.codec import (
    LENGTH_BYTES,
    Codec,
    CodecError,
    blocks,
    int8_codec,
    lossless_codec,
    restored_digest,
)

if TYPE_CHECKING:
    import xxhash

    from kvmesh.transfer.base import Deadline
    from kvmesh.transfer.stream import PeerStream

MAX_CODERS = 4
MAX_CHOICES = 4096
"""Peers that are remembered, the last ones used."""
SAMPLES = 3
SAMPLE_S = 60.0
"""What coding takes and brings is measured on the first chunks that come raw, and after so long again."""
SAMPLE_BYTES = 1 << 20
_LENGTH = struct.Struct("<I")


class CodingStatistics(NamedTuple):
    """Counters since the start, of chunks that travelled coded only."""

    sent_raw_bytes: int
    """What they are in the pool."""
    sent_wire_bytes: int
    """What they were on the wire."""
    received_raw_bytes: int
    received_wire_bytes: int
    encode_s: float
    """Processor time for what was sent."""
    decode_s: float
    """And for what was received."""


class Coding:
    """The codec of one node. Safe to use from any thread."""

    def __init__(self, make: Callable[[], Codec], *, is_choosing: bool) -> None:
        """
        Args:
            make: makes a coder, for one thread at a time.
            is_choosing: code only what comes sooner for it; otherwise all that can be.
        """
        self._make = make
        self._is_choosing = is_choosing
        first = make()
        self.name = first.name
        self.is_lossy = first.is_lossy
        self._block_bytes = first.block_bytes
        self._coders: queue.SimpleQueue[Codec] = queue.SimpleQueue()
        for coder in (first, *(make() for _ in range(_coders() - 1))):
            self._coders.put(coder)
        self._lock = threading.Lock()
        self._facts = CodecFacts()
        self._choices: OrderedDict[str, CodecChoice] = OrderedDict()
        self._samples, self._sampled_at_s = 0, 0.0
        self._sent = self._sent_wire = self._received = self._received_wire = 0
        self._encode_s = self._decode_s = 0.0

    # -- holder --------------------------------------------------------------------------------------------------------

    def code(self, block: memoryview) -> list[bytes | memoryview]:
        """What to send for a block. Waits for a coder, each of which is busy for about a millisecond."""
        coder = self._coders.get()
        try:
            started_s = time.thread_time()
            coded = coder.encode(block)
            seconds = time.thread_time() - started_s
        finally:
            self._coders.put(coder)
        payload: bytes | memoryview = block if coded is None else coded
        wire_bytes = LENGTH_BYTES + len(payload)
        with self._lock:
            self._facts.encoded(len(block), wire_bytes, seconds)
            self._sent += len(block)
            self._sent_wire += wire_bytes
            self._encode_s += seconds
        return [_LENGTH.pack(len(payload)), payload]

    def blocks(self, row: memoryview) -> Iterator[memoryview]:
        """The parts of a slot, for `code`."""
        return blocks(row, self._block_bytes)

    def digest(self, row: memoryview) -> bytes:
        """xxh3-128 of what peers make of a slot; for the codec of a lossy format."""
        return restored_digest(row, self._make())

    # -- fetcher -------------------------------------------------------------------------------------------------------

    def towards(self, incarnation: str) -> PeerCoding:
        """What is known of one peer, whichever transport learns it."""
        with self._lock:
            choice = self._choices.pop(incarnation, None) or CodecChoice(self._facts)
            self._choices[incarnation] = choice
            if len(self._choices) > MAX_CHOICES:
                self._choices.popitem(last=False)
        return PeerCoding(self, choice)

    def decoder(self) -> Decoder:
        """For one connection."""
        return Decoder(self, self._make())

    def wants_coded(self, choice: CodecChoice) -> bool:
        """Whether the next fetch is to come coded."""
        if not self._is_choosing:
            return True
        with self._lock:
            return choice.wants_coded(time.monotonic())

    def came(self, choice: CodecChoice, raw_bytes: int, wire_bytes: int, seconds: float) -> None:
        """A fetch is over; `wire_bytes` is 0 when it came raw."""
        now_s = time.monotonic()
        with self._lock:
            if wire_bytes:
                choice.came_coded(now_s, raw_bytes, wire_bytes, seconds)
            else:
                choice.came_raw(now_s, raw_bytes, seconds)

    def decoded(self, raw_bytes: int, wire_bytes: int, seconds: float) -> None:
        """A chunk has come coded; `seconds` is what decoding took."""
        with self._lock:
            self._facts.decoded(raw_bytes, wire_bytes, seconds)
            self._received += raw_bytes
            self._received_wire += wire_bytes
            self._decode_s += seconds

    def wants_sample(self) -> bool:
        """Whether a chunk that has come raw is to be given to `sample`."""
        with self._lock:
            is_due = self._samples < SAMPLES or time.monotonic() - self._sampled_at_s > SAMPLE_S
            return self._is_choosing and is_due

    def sample(self, row: bytes) -> None:
        """Measure coding on (the beginning of) a chunk: milliseconds."""
        coder = self._make()
        scratch = memoryview(bytearray(coder.block_bytes))
        coder.encode(memoryview(row)[: coder.block_bytes])  # not counted: its first time takes longer
        for block in blocks(memoryview(row), coder.block_bytes):
            started_s = time.thread_time()
            coded = coder.encode(block)
            encoded_s = time.thread_time()
            if coded is not None:
                coder.decode(memoryview(coded), scratch[: len(block)])
            decoded_s = time.thread_time()
            wire_bytes = LENGTH_BYTES + len(block if coded is None else coded)
            with self._lock:
                self._facts.encoded(len(block), wire_bytes, encoded_s - started_s)
                self._facts.decoded(len(block), wire_bytes, decoded_s - encoded_s)
        with self._lock:
            self._samples += 1
            self._sampled_at_s = time.monotonic()

    def statistics(self) -> CodingStatistics:
        """Counters."""
        with self._lock:
            return CodingStatistics(
                self._sent, self._sent_wire, self._received, self._received_wire, self._encode_s, self._decode_s
            )


class PeerCoding(NamedTuple):
    """A codec towards one peer."""

    coding: Coding
    choice: CodecChoice

    def wants_coded(self) -> bool:
        """Whether the next fetch is to come coded, if the peer can."""
        return self.coding.wants_coded(self.choice)

    def came(self, raw_bytes: int, wire_bytes: int, seconds: float) -> None:
        """A fetch is over; `wire_bytes` is 0 when it came raw."""
        self.coding.came(self.choice, raw_bytes, wire_bytes, seconds)


class Decoder:
    """Receives coded chunks over one connection. For one thread at a time."""

    def __init__(self, coding: Coding, codec: Codec) -> None:
        self._coding = coding
        self._codec = codec
        self._prefix = memoryview(bytearray(LENGTH_BYTES))
        self._coded = memoryview(bytearray(codec.block_bytes))

    def receive(self, stream: PeerStream, row: memoryview, deadline: Deadline, digest: xxhash.xxh3_128 | None) -> int:
        """Fill a slot, and `digest` with what is in it then; returns the bytes that came. Raises PeerProtocolError for
        what this codec does not make, and what the stream raises.
        """
        wire_bytes, seconds = 0, 0.0
        for block in blocks(row, self._codec.block_bytes):
            stream.receive_into(self._prefix, deadline)
            (length,) = _LENGTH.unpack(self._prefix)
            if length == len(block):
                stream.receive_into(block, deadline)
            elif 0 < length < len(block):
                coded = self._coded[:length]
                stream.receive_into(coded, deadline)
                started_s = time.thread_time()
                try:
                    self._codec.decode(coded, block)
                except CodecError as error:
                    raise PeerProtocolError(
                        stream.peer, expected=f"a block coded by {self._codec.name}", found=str(error)
                    ) from None
                seconds += time.thread_time() - started_s
            else:
                expected = f"a coded block of at most {len(block)} bytes"
                raise PeerProtocolError(stream.peer, expected=expected, found=f"{length} bytes")
            if digest is not None:
                digest.update(block)
            wire_bytes += LENGTH_BYTES + length
        self._coding.decoded(len(row), wire_bytes, seconds)
        return wire_bytes


def make_coding(wire_codec: WireCodec, kv_format: Format) -> Coding | None:
    """What a configuration asks for; None where chunks travel raw. Raises StartupError when it cannot be had."""
    if (wire_codec == "int8") is (int8_group(kv_format) is None):
        raise StartupError(
            f"wire_codec {wire_codec}",
            expected="int8 and a format that says int8, or neither",
            found=f"a format with kv_dtype {kv_format.kv_dtype!r}",
        )
    if wire_codec == "none":
        return None
    make = int8_codec if wire_codec == "int8" else lossless_codec
    if make(kv_format) is None:
        return None

    def coder() -> Codec:
        made = make(kv_format)
        assert made is not None  # it was not a moment ago
        return made

    return Coding(coder, is_choosing=wire_codec == "auto")


def _coders() -> int:
    """A quarter of the processors: they are there for the engine."""
    return max(2, min(MAX_CODERS, len(os.sched_getaffinity(0)) // 4))
