"""The serving side of the nixl transport: an agent, in a process of its own, from which peers read the pool.

In a process of its own, because UCX aborts the process when a peer goes away at the wrong moment, and because whoever
reaches its port can read all of the process's memory: here that is the pool and nothing else. When it dies, it is
started again as soon as a peer asks for it.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from kvmesh.errors import NixlError, StartupError, TransferError
from kvmesh.transfer.nixl_agent import Agent, Region, load, prepare_environment
from kvmesh.transfer.pool import HostPool, PoolSegment
from kvmesh.wire.peer import NixlMetadata

START_TIMEOUT_S = 30.0
RESTART_INTERVAL_S = 5.0
"""One that was started again after so short a life waits so long before the next start: whatever kills it may go on."""


class _Plan(msgspec.Struct, frozen=True):
    """What the process is told on its command line."""

    segments: tuple[PoolSegment, ...]
    chunk_bytes: int
    host: str
    backends: tuple[str, ...]
    answer_fd: int


class _Ready(msgspec.Struct, frozen=True):
    """What it answers once it can be read from."""

    metadata: bytes
    regions: tuple[Region, ...]


class _Serving(NamedTuple):
    process: subprocess.Popen[bytes]
    started_s: float
    number: int
    ready: _Ready


class NixlHolder:
    """Starts and restarts the process. All methods may be called from any thread."""

    def __init__(self, pool: HostPool, *, host: str, backends: Sequence[str] = ("UCX",)) -> None:
        """Starts nothing yet.

        Args:
            pool: the slots that peers read.
            host: the node's address; on loopback, UCX is confined to it.
            backends: NIXL backends, in order of preference.
        """
        self._pool = pool
        self._host = host
        self._backends = tuple(backends)
        self._lock = threading.Lock()
        self._serving: _Serving | None = None
        self._starts = 0
        self._is_quick_restart = False
        """The process that serves now followed one that had lived for less than RESTART_INTERVAL_S."""
        self._is_closed = False

    def start(self) -> None:
        """Start the process: about a second. Raises StartupError."""
        try:
            self.describe()
        except TransferError as error:
            raise StartupError(
                "serving with nixl",
                found=str(error),
                hint="set transfer_channel to tcp, or see UCX_TLS and UCX_NET_DEVICES",
            ) from None

    def describe(self) -> NixlMetadata:
        """What a peer needs to read from us, from a process that is alive. Raises TransferError."""
        serving = self._alive()
        return NixlMetadata(
            serving.ready.metadata, serving.number, serving.ready.regions[0][0], min(self._pool.chunk_bytes, 64)
        )

    def addresses(self, slots: Sequence[int]) -> tuple[int, list[int]]:
        """The serving number (as in NixlMetadata) and the slots' addresses in that process. Raises TransferError."""
        serving = self._alive()
        places = [self._pool.place(slot) for slot in slots]
        return serving.number, [serving.ready.regions[segment][0] + offset for segment, offset in places]

    @property
    def pid(self) -> int | None:
        """The process; None before the first start."""
        return self._serving.process.pid if self._serving is not None else None

    def close(self) -> None:
        """End the process. Safe to call twice."""
        with self._lock:
            self._is_closed = True
            if self._serving is not None:
                _end(self._serving.process)

    def _alive(self) -> _Serving:
        with self._lock:
            serving = self._serving
            if serving is not None and serving.process.poll() is None:
                return serving
            if self._is_closed:
                raise TransferError("nixl holder process", found="closed")
            if serving is not None:
                _end(serving.process)
                age_s = time.monotonic() - serving.started_s
                if self._is_quick_restart and age_s < RESTART_INTERVAL_S:
                    raise TransferError("nixl holder process", found=f"ended with {serving.process.returncode}")
                self._is_quick_restart = age_s < RESTART_INTERVAL_S
            self._starts += 1
            self._serving = self._spawn(self._starts)
            return self._serving

    def _spawn(self, number: int) -> _Serving:
        answer, answer_fd = os.pipe()
        plan = _Plan(self._pool.segments, self._pool.chunk_bytes, self._host, self._backends, answer_fd)
        with os.fdopen(answer, "rb") as reader:
            try:
                process = subprocess.Popen(
                    [sys.executable, "-m", __name__, msgspec.json.encode(plan).decode()],
                    stdin=subprocess.PIPE,
                    pass_fds=(answer_fd, *(segment.fd for segment in self._pool.segments)),
                )
            except OSError as error:
                raise TransferError("nixl holder process", found=str(error)) from None
            finally:
                os.close(answer_fd)
            # A process that hangs in its start is ended, which ends the reading below.
            watchdog = threading.Timer(START_TIMEOUT_S, process.kill)
            watchdog.start()
            try:
                ready = msgspec.msgpack.decode(reader.read(), type=_Ready)
            except msgspec.MsgspecError:
                _end(process)
                raise TransferError(
                    "nixl holder process",
                    expected="a ready agent",
                    found=f"exit code {process.returncode}, see its log",
                ) from None
            finally:
                watchdog.cancel()
        return _Serving(process, time.monotonic(), number, ready)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Close its standard input, on which it waits, and make sure."""
    assert process.stdin is not None
    with contextlib.suppress(OSError):
        process.stdin.close()
    process.kill()
    process.wait()


def main() -> None:
    """The process: make the agent, say so, wait for the end of standard input (the node has closed it, or is dead)."""
    plan = msgspec.json.decode(sys.argv[1], type=_Plan)
    prepare_environment(plan.host)
    pool = HostPool(plan.segments, chunk_bytes=plan.chunk_bytes)
    try:
        load()
        agent = Agent("holder", backends=plan.backends, progress_thread=True)
        agent.register(pool.regions())
        ready = _Ready(agent.metadata(), tuple(pool.regions()))
    except (TransferError, NixlError) as error:
        sys.exit(f"kvmesh nixl holder: {error}")
    with os.fdopen(plan.answer_fd, "wb") as answer:
        answer.write(msgspec.msgpack.encode(ready))
    sys.stdin.buffer.read()
    os._exit(0)  # NIXL's threads are not worth waiting for


if __name__ == "__main__":
    main()
