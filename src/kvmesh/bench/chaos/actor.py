"""An engine stand-in in a process of its own, so that it can be killed, stopped, or put into a network namespace.

Commands come as JSON lines on standard input and are answered by a line each, in order. While a load runs, a line is
written before each request and one after it. Everything that children or libraries print goes to standard error.
"""

from __future__ import annotations

import io
import os
import random
import select
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import psutil

from kvmesh.bench.stand_in import StandInEngine, content, make_key, stand_in_format
from kvmesh.config import KVMeshConfig
from kvmesh.errors import KVMeshError


class Options(msgspec.Struct, kw_only=True):
    """What an actor is told in the first line of its standard input: it may hold a key, so it is no argument."""

    config: str
    """`KVMeshConfig.to_wire`, as text."""
    slots: int
    chunk_bytes: int
    foreign_weights: bool = False
    """Another model under the same name."""
    lies: bool = False
    """Its chunks have other bytes than everybody else's of the same keys: nobody may ever get one."""


class Load(msgspec.Struct, kw_only=True):
    """Requests, one after the other: all chunks of a document, which are forgotten again at once. Documents come in
    rounds of random order.
    """

    seed: int
    documents: int
    chunks: int
    """Per document."""
    timeout_s: float
    pause_s: float


class Status(msgspec.Struct):
    """The actor's node as the engine sees it."""

    pid: int
    node_pids: list[int]
    """The node and what it has started, the node first; empty while there is none."""
    restarts: int
    peers: int
    peer_port: int
    admin_port: int
    connected: bool
    incarnation: str


class Sent(msgspec.Struct, tag=True):
    """A request has been sent."""

    number: int


class Answered(msgspec.Struct, tag=True):
    """A request has been answered."""

    number: int
    sent_at_s: float
    """time.monotonic()."""
    seconds: float
    document: int
    asked: int
    fetched: int
    wrong: int
    misses: dict[str, int]


class Reply(msgspec.Struct, tag=True):
    """A command has been carried out, or has failed."""

    value: msgspec.Raw
    error: str = ""


Line = Sent | Answered | Reply


def document(number: int, chunks: int, series: str = "") -> list[bytes]:
    """The chunk keys of one document. Another series has other documents."""
    return [make_key(f"{series}document-{number}-{index}") for index in range(chunks)]


class _Churn(NamedTuple):
    documents: int
    chunks: int


class Actor:
    """Carries out commands between requests; one thread, as an engine's scheduler is."""

    def __init__(self, options: Options, commands: int, lines: int) -> None:
        foreign = {"model_weights": "foreign"} if options.foreign_weights else {}
        self._engine = StandInEngine(
            KVMeshConfig.from_wire(options.config.encode()),
            slots=options.slots,
            chunk_bytes=options.chunk_bytes,
            kv_format=stand_in_format(options.chunk_bytes, **foreign),
            stored=_lie if options.lies else content,
        )
        self._commands = commands
        self._lines = lines
        self._input = b""
        self._load: Load | None = None
        self._random = random.Random()
        self._round: list[int] = []
        """Documents that are still to be asked for before any is asked for again."""
        self._churn: _Churn | None = None
        self._number = 0
        self._next_s = 0.0
        self._is_over = False
        self._ballast: list[Path] = []

    def run(self) -> int:
        """Until told to close, or until standard input ends; returns the exit status."""
        try:
            self._engine.start()
        except KVMeshError as error:
            self._write(Reply(msgspec.Raw(b"null"), str(error)))
            self._engine.close()
            return 1
        self._write(Reply(msgspec.Raw(msgspec.json.encode(self.status()))))
        while not self._is_over:
            for line in self._read():
                self._obey(line)
            if self._load is not None and time.monotonic() >= self._next_s:
                self._request(self._load)
                self._next_s = time.monotonic() + self._load.pause_s
            if self._churn is not None:
                self._put_one(self._churn)
        self._engine.close()
        return 0

    # -- commands ------------------------------------------------------------------------------------------------------

    def status(self) -> Status:
        node = self._engine.node
        ready = node.ready
        return Status(
            os.getpid(),
            _family(node.pid),
            node.restarts,
            node.state.peers,
            ready.peer_port if ready else 0,
            ready.admin_port if ready else 0,
            node.state.directory_connected,
            ready.incarnation if ready else "",
        )

    def put(self, first: int, count: int, chunks: int, series: str = "") -> int:
        """Store documents; returns how many chunks."""
        for number in range(first, first + count):
            self._engine.put(document(number, chunks, series))
        return count * chunks

    def forget(self, first: int, count: int, chunks: int, series: str = "") -> None:
        keys = [key for number in range(first, first + count) for key in document(number, chunks, series)]
        self._engine.forget([key for key in keys if self._engine.holds(key)])

    def spoil(self, first: int, count: int, chunks: int) -> None:
        """Change a byte of every chunk in the pool, behind the back of ledger and node."""
        for number in range(first, first + count):
            self._write_over(document(number, chunks))

    def churn(self, documents: int, chunks: int) -> None:
        """From now on store documents in turn, as fast as it goes; 0 documents: stop."""
        self._churn = _Churn(documents, chunks) if documents else None

    def load(self, **options: object) -> None:
        """Start the requests (see `Load`)."""
        self._load = msgspec.convert(options, Load)
        self._random = random.Random(self._load.seed)

    def idle(self) -> None:
        """End the requests."""
        self._load = None

    def wait_visible(self, first: int, count: int, chunks: int, timeout_s: float, series: str = "") -> bool:
        keys = [key for number in range(first, first + count) for key in document(number, chunks, series)]
        return self._engine.wait_visible(keys, timeout_s)

    def fill_disks(self, folders: Sequence[str]) -> list[int]:
        """Write to each folder until its file system is full; returns the bytes written. Only for our own mounts."""
        self._ballast = [Path(folder) / "ballast" for folder in folders]
        return [_fill(path) for path in self._ballast]

    def free_disks(self) -> None:
        while self._ballast:
            self._ballast.pop().unlink()

    def close(self) -> None:
        """End in good order."""
        self._is_over = True

    # -- inside --------------------------------------------------------------------------------------------------------

    def _obey(self, line: bytes) -> None:
        reply = Reply(msgspec.Raw(b"null"))
        try:
            name, arguments = msgspec.json.decode(line, type=tuple[str, dict[str, object]])
            answer = getattr(self, name)(**arguments)
            reply = Reply(msgspec.Raw(msgspec.json.encode(answer)))
        except Exception as error:  # whatever it was, the harness has to hear of it
            reply = Reply(msgspec.Raw(b"null"), repr(error))
        self._write(reply)

    def _request(self, load: Load) -> None:
        self._number += 1
        if not self._round:
            self._round = self._random.sample(range(load.documents), load.documents)
        wanted = self._round.pop()
        keys = document(wanted, load.chunks)
        sent_at_s = time.monotonic()
        self._write(Sent(self._number))
        got = self._engine.get(keys, load.timeout_s)
        self._engine.forget([key for key in keys if self._engine.holds(key)])
        misses = {reason.value: count for reason, count in got.misses.items()}
        fetched = got.local + got.fetched
        self._write(Answered(self._number, sent_at_s, got.seconds, wanted, len(keys), fetched, got.wrong, misses))

    def _put_one(self, churn: _Churn) -> None:
        self._engine.put(document(self._random.randrange(churn.documents), churn.chunks))

    def _write_over(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            if self._engine.holds(key):
                row = self._engine.pool.row(self._engine._slots[key])  # noqa: SLF001 - its bytes are what is attacked
                row[len(row) // 2] = content(key, len(row))[len(row) // 2] ^ 0x5A

    def _read(self) -> Iterator[bytes]:
        """Lines that have come; waits a little when there is nothing else to do."""
        wait_s = 0.0 if self._churn else 0.1
        if self._load is not None:
            wait_s = max(0.0, min(wait_s, self._next_s - time.monotonic()))
        if not select.select([self._commands], [], [], wait_s)[0]:
            return
        data = os.read(self._commands, 1 << 16)
        if not data:
            self._is_over = True
        *lines, self._input = (self._input + data).split(b"\n")
        yield from lines

    def _write(self, line: Line) -> None:
        data = msgspec.json.encode(line) + b"\n"
        while data:
            data = data[os.write(self._lines, data) :]


def _family(pid: int | None) -> list[int]:
    """A process and what it has started; empty when it is gone."""
    if pid is None:
        return []
    try:
        return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    except psutil.NoSuchProcess:
        return []


def _lie(key: bytes, size: int) -> bytes:
    return content(bytes(byte ^ 0xFF for byte in key), size)


def _fill(path: Path) -> int:
    size, block = 0, bytes(4096)
    with path.open("wb", buffering=0) as file:
        while block:
            written = _write_some(file, block)
            size += written
            if not written:
                block = block[: len(block) // 2]
    return size


def _write_some(file: io.FileIO, block: bytes) -> int:
    try:
        return file.write(block)
    except OSError:
        return 0


def main() -> int:
    """Run one actor."""
    lines = os.dup(1)
    os.dup2(2, 1)  # what libraries print would come between our lines
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the harness, which ends us
    first = bytearray()
    while not first.endswith(b"\n"):  # byte by byte: what follows belongs to the actor
        byte = os.read(0, 1)
        if not byte:
            return 0
        first += byte
    return Actor(msgspec.json.decode(first, type=Options), 0, lines).run()


if __name__ == "__main__":
    sys.exit(main())
