"""Other people's programs as yardsticks for transfers, where they are installed: Redis, iperf3 and NIXL alone."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence

from kvmesh.bench.cluster import HOST, free_ports
from kvmesh.errors import StartupError, TransferError
from kvmesh.transfer.nixl_agent import Agent
from kvmesh.transfer.pool import HostPool

START_TIMEOUT_S = 20.0
READ_TIMEOUT_S = 60.0


def redis_program() -> str | None:
    """redis-server or valkey-server; None when neither is installed."""
    return shutil.which("redis-server") or shutil.which("valkey-server")


class RedisValues:
    """A Redis server that holds the chunks of a benchmark, and a connection to it. Use `running`."""

    def __init__(self, process: subprocess.Popen[bytes], sock: socket.socket) -> None:
        self._process = process
        self._socket = sock

    @classmethod
    @contextlib.contextmanager
    def running(cls, chunks: int, chunk_bytes: int) -> Iterator[RedisValues]:
        """Start it, without any disk, and store the chunks. Raises StartupError."""
        program = redis_program()
        if program is None:
            raise StartupError("redis", expected="redis-server or valkey-server", found="neither")
        (port,) = free_ports(1)
        options = ("--port", str(port), "--bind", HOST, "--save", "", "--appendonly", "no", "--loglevel", "warning")
        with subprocess.Popen([program, *options], stdout=subprocess.DEVNULL) as process:
            try:
                with _connect(port) as sock:
                    found = cls(process, sock)
                    found._store(chunks, bytes(range(256)) * (chunk_bytes // 256))
                    yield found
            finally:
                process.terminate()

    @property
    def pid(self) -> int:
        """The server's."""
        return self._process.pid

    def fetch(self, pool: HostPool, batch: int) -> None:
        """GET of so many chunks, pipelined, received straight into the slots."""
        self._socket.sendall(b"".join(_command(b"GET", b"%d" % slot) for slot in range(batch)))
        head = b"$%d\r\n" % pool.chunk_bytes
        for slot in range(batch):
            if self._socket.recv(len(head), socket.MSG_WAITALL) != head:
                raise StartupError("redis", found="another answer than a chunk")
            row, received = pool.row(slot), 0
            while received < len(row):
                received += self._socket.recv_into(row[received:])
            self._socket.recv(2, socket.MSG_WAITALL)

    def _store(self, chunks: int, value: bytes) -> None:
        for index in range(chunks):
            self._socket.sendall(_command(b"SET", b"%d" % index, value))
            if self._socket.recv(5, socket.MSG_WAITALL) != b"+OK\r\n":
                raise StartupError("redis", found="it did not take a chunk")


def _command(*words: bytes) -> bytes:
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in words)


def _connect(port: int) -> socket.socket:
    """Wait until it listens."""
    until_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < until_s:
        sock = socket.socket()
        if sock.connect_ex((HOST, port)) == 0:
            return sock
        sock.close()
        time.sleep(0.02)
    raise StartupError("redis", expected=f"a server that listens within {START_TIMEOUT_S:g} s", found="none")


class RawNixl:
    """NIXL with nothing of ours around it: one READ for a whole batch, looked at without a pause, nothing checked."""

    def __init__(self, pool: HostPool, metadata: bytes, addresses: Sequence[int]) -> None:
        """
        Args:
            pool: where to read to.
            metadata: that of the holder's agent.
            addresses: of the holder's slots, in its process.
        """
        self._chunk_bytes = pool.chunk_bytes
        regions = pool.regions()
        self._local = [regions[segment][0] + offset for segment, offset in map(pool.place, range(pool.slots))]
        self._remote = list(addresses)
        self._agent = Agent("yardstick", progress_thread=False)
        self._agent.register(regions)
        self._peer = self._agent.add_peer(metadata)

    def close(self) -> None:
        self._agent.destroy()

    def fetch(self, batch: int) -> None:
        """Read the first `batch` slots. Raises TransferError when the holder is lost or does not answer."""
        local, remote = ([(at, self._chunk_bytes) for at in where[:batch]] for where in (self._local, self._remote))
        read = self._agent.read(local, remote, self._peer)
        until_s = time.monotonic() + READ_TIMEOUT_S
        while not self._agent.is_done(read):
            if time.monotonic() > until_s:
                raise TransferError("NIXL alone", found=f"a READ that takes longer than {READ_TIMEOUT_S:g} s")
        self._agent.release(read)


def iperf3_gb_per_s(seconds: int = 3) -> float | None:
    """What iperf3 measures with one connection; None where it is not installed or does not work."""
    program = shutil.which("iperf3")
    if program is None:
        return None
    (port,) = free_ports(1)
    with subprocess.Popen([program, "-s", "-1", "-p", str(port)], stdout=subprocess.DEVNULL) as server:
        try:
            time.sleep(0.3)  # it does not say when it listens
            command = [program, "-c", HOST, "-p", str(port), "-J", "-t", str(seconds)]
            done = subprocess.run(command, capture_output=True, timeout=seconds + 20, check=True)
            return float(json.loads(done.stdout)["end"]["sum_received"]["bits_per_second"]) / 8e9
        except (OSError, subprocess.SubprocessError, ValueError, KeyError):
            return None
        finally:
            server.terminate()
