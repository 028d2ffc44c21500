"""Real Redis (or Valkey) servers for tests: own port, own folder, ended by their process id."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmesh.bench.cluster import free_ports

SERVER = shutil.which("valkey-server") or shutil.which("redis-server")

needs_redis = pytest.mark.skipif(SERVER is None, reason="no redis-server or valkey-server installed")


class RedisServer:
    """One server process without persistence."""

    def __init__(
        self, folder: Path, *options: str, port: int = 0, password: str = "", config: Path | None = None
    ) -> None:
        """`config`: make it a Sentinel with this file."""
        self.folder = folder
        self.port = port or free_ports(1)[0]
        self.password = password
        self._options = options
        self._config = config
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        secret = f":{self.password}@" if self.password else ""
        return f"redis://{secret}127.0.0.1:{self.port}"

    def start(self) -> RedisServer:
        assert SERVER is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        command = [SERVER, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder)]
        if self._config is not None:
            command = [SERVER, str(self._config), *command[1:], "--sentinel"]
        else:
            command += ["--save", "", "--appendonly", "no", *self._options]
        if self.password:
            command += ["--requirepass", self.password]
        with (self.folder / "redis.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        until_s = time.monotonic() + 20
        while True:
            with contextlib.suppress(OSError):
                self.command("PING")
                return self
            assert self.process.poll() is None, (self.folder / "redis.log").read_text()
            assert time.monotonic() < until_s, "redis-server does not answer"
            time.sleep(0.02)

    def stop(self, number: int = signal.SIGKILL) -> None:
        """End it; what it held is lost."""
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGCONT)
            os.kill(self.process.pid, number)
        self.process.wait(20)
        self.process = None

    def freeze(self) -> None:
        assert self.process is not None
        os.kill(self.process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        assert self.process is not None
        os.kill(self.process.pid, signal.SIGCONT)

    def command(self, *words: str | bytes) -> object:
        """One command over a connection of its own, without any client library. Raises OSError."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
            stream = connection.makefile("rb")
            if self.password:
                connection.sendall(_pack("AUTH", self.password))
                _answer(stream)
            connection.sendall(_pack(*words))
            return _answer(stream)

    def all_keys(self) -> list[bytes]:
        found = self.command("KEYS", "*")
        assert isinstance(found, list)
        return found


def _pack(*words: str | bytes) -> bytes:
    encoded = [word.encode() if isinstance(word, str) else word for word in words]
    return b"*%d\r\n" % len(encoded) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in encoded)


def _answer(stream: object) -> object:
    line = stream.readline()  # type: ignore[attr-defined]
    if not line:
        raise OSError("connection closed")
    kind, rest = line[:1], line[1:-2]
    if kind in {b"+", b":"}:
        return rest if kind == b"+" else int(rest)
    if kind == b"-":
        raise OSError(rest.decode())
    if kind == b"$":
        size = int(rest)
        return None if size < 0 else stream.read(size + 2)[:-2]  # type: ignore[attr-defined]
    return [_answer(stream) for _ in range(int(rest))]


@contextlib.contextmanager
def running_redis(folder: Path, *options: str, password: str = "") -> Iterator[RedisServer]:
    server = RedisServer(folder, *options, password=password)
    try:
        yield server.start()
    finally:
        server.stop()


@contextlib.contextmanager
def running_sentinel(folder: Path, master: RedisServer) -> Iterator[RedisServer]:
    """A Sentinel that watches one master under the name mymaster."""
    folder.mkdir(parents=True)
    watched = [f"sentinel monitor mymaster 127.0.0.1 {master.port} 1"]
    watched += [f'sentinel auth-pass mymaster "{master.password}"'] if master.password else []
    (folder / "sentinel.conf").write_text("\n".join(watched) + "\n")
    sentinel = RedisServer(folder, config=folder / "sentinel.conf")
    try:
        yield sentinel.start()
    finally:
        sentinel.stop()


@contextlib.contextmanager
def running_redis_cluster(folder: Path, masters: int = 3, replicas: int = 0) -> Iterator[list[RedisServer]]:
    """A Redis Cluster: the masters first, then `replicas` of each."""
    with contextlib.ExitStack() as stack:
        servers = []
        for number in range(masters * (1 + replicas)):
            server = RedisServer(
                folder / f"node-{number}",
                *("--cluster-enabled", "yes", "--cluster-node-timeout", "1000", "--cluster-config-file", "nodes.conf"),
                *("--cluster-replica-validity-factor", "0", "--repl-diskless-sync-delay", "0"),
            )
            stack.callback(server.stop)
            servers.append(server.start())
        step = 16384 // masters + 1
        for number, server in enumerate(servers):
            server.command("CLUSTER", "SET-CONFIG-EPOCH", str(number + 1))
            if number < masters:
                slots = range(number * step, min((number + 1) * step, 16384))
                server.command("CLUSTER", "ADDSLOTSRANGE", str(slots[0]), str(slots[-1]))
            if number:
                server.command("CLUSTER", "MEET", "127.0.0.1", str(servers[0].port))
        _wait(lambda: all(_info(server, "cluster_known_nodes") == str(len(servers)) for server in servers))
        for number, server in enumerate(servers[masters:]):
            name = servers[number % masters].command("CLUSTER", "MYID")
            assert isinstance(name, bytes)
            _wait(lambda server=server, name=name: _replicate(server, name))
        _wait(lambda: all(_info(server, "cluster_state") == "ok" for server in servers))
        for server in servers[masters:]:
            _wait(lambda server=server: b"master_link_status:up" in bytes(server.command("INFO", "replication")))  # type: ignore[arg-type]
        yield servers


def _replicate(server: RedisServer, name: bytes) -> bool:
    with contextlib.suppress(OSError):
        return server.command("CLUSTER", "REPLICATE", name) == b"OK"
    return False


def _info(server: RedisServer, field: str) -> str:
    answer = server.command("CLUSTER", "INFO")
    assert isinstance(answer, bytes)
    return dict(line.split(":", 1) for line in answer.decode().split("\r\n") if ":" in line).get(field, "")


def _wait(check: object, timeout_s: float = 30.0) -> None:
    until_s = time.monotonic() + timeout_s
    while not check():  # type: ignore[operator]
        assert time.monotonic() < until_s, "the Redis Cluster does not form"
        time.sleep(0.05)
