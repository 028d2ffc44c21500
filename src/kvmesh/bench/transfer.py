"""How fast chunks move between two processes of this host, per transport, beside yardsticks from the same run.

The other process holds a pool and serves it. Methods take turns, case by case, so that a busy machine is busy for all
of them; a figure is the median of the rounds. CPU seconds per GB are the ones to compare where cores are shared: bytes
per second then measure the neighbours too.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from statistics import median
from typing import NamedTuple

import msgspec
import xxhash
from rich.console import Console
from rich.table import Table

from kvmesh.bench.certificates import Authority, has_openssl
from kvmesh.bench.chaos import network
from kvmesh.bench.holders import HoldersRow, measure_holders
from kvmesh.bench.plot import line_chart
from kvmesh.bench.yardsticks import RawNixl, RedisValues, iperf3_gb_per_s, redis_program
from kvmesh.config import TlsFiles
from kvmesh.core.format import Format
from kvmesh.core.keys import ChunkKey
from kvmesh.core.ledger import SlotLedger
from kvmesh.errors import StartupError, TransferError
from kvmesh.node.peer_server import PeerServer
from kvmesh.transfer.base import Deadline, FetchItem, Located, PeerTransport
from kvmesh.transfer.link import PeerTarget
from kvmesh.transfer.nixl_agent import prepare_environment, unavailable
from kvmesh.transfer.pool import HostPool, PoolSegment
from kvmesh.transfer.security import OPEN, PeerSecurity
from kvmesh.transfer.shm import ShmTransport
from kvmesh.transfer.shm_holder import ShmHolder
from kvmesh.transfer.tcp import TcpTransport
from kvmesh.transfer.tls import Tls
from kvmesh.wire.auth import ClusterKey
from kvmesh.wire.peer import Hello

MIB = 1 << 20
CHUNK_SIZES_BYTES = (64 << 10, MIB, 8 * MIB, 32 * MIB)
BATCHES = (1, 8, 64)
METHODS = (
    "memcpy",
    "memcpy-first",
    "shm",
    "shm-unchecked",
    "socket",
    "tcp",
    "tcp-unchecked",
    "tcp-key",
    "tcp-tls",
    "nixl-raw",
    "nixl",
    "nixl-unchecked",
    "redis",
)
"""`memcpy-first`: out of memory that this process maps for the first time, as a chunk of another one is when it is read
once. `-unchecked`: without comparing checksums. `tcp-key`: with a cluster key, so MACs on all frames, headers and
trailers. `tcp-tls`: with that and inside TLS. `nixl-raw`: a READ of the whole batch by NIXL alone. `redis`: GET from a
Redis server on this host.
"""
_NIXL_METHODS = frozenset({"nixl", "nixl-raw", "nixl-unchecked"})
MAX_BATCH = 64
POOL_BYTES = 256 * MIB
"""Cases that need more are left out. Larger than the caches of most machines."""
_HOST, _HOLDER, _INCARNATION = "127.0.0.1", "holder", "0" * 16
_PATIENCE_S = 60.0


class Measurement(msgspec.Struct, frozen=True):
    """One method in one case."""

    method: str
    chunk_bytes: int
    batch: int
    """Chunks per fetch."""
    gb_per_s: float
    fetch_p50_ms: float
    fetch_p99_ms: float
    fetcher_cpu_s_per_gb: float
    holder_cpu_s_per_gb: float


class TransferBenchmark(msgspec.Struct, frozen=True):
    """The result of one run."""

    machine: str
    cores: int
    ucx_tls: str
    load: float
    """Of the machine before the run (one minute's average): what else there was to do."""
    skipped: dict[str, str]
    """Methods that could not run, and why."""
    measurements: list[Measurement]
    iperf3_gb_per_s: float | None
    links: list[HoldersRow]
    """Fetches through rate-limited links, by whole nodes."""
    links_mbit_s: list[float]


class _Round(NamedTuple):
    fetches_s: list[float]
    fetcher_cpu_s: float
    holder_cpu_s: float


def run_transfer_benchmark(
    *,
    chunk_sizes_bytes: Sequence[int] = CHUNK_SIZES_BYTES,
    batches: Sequence[int] = BATCHES,
    methods: Sequence[str] = METHODS,
    rounds: int = 3,
    round_s: float = 0.3,
    connections: int = 2,
    links_mbit_s: Sequence[float] = (),
    console: Console | None = None,
) -> TransferBenchmark:
    """Measure and, with a console, print a table as it goes.

    Args:
        chunk_sizes_bytes: chunk sizes; each takes a holder process of its own.
        batches: chunks per fetch. Cases over POOL_BYTES are left out.
        methods: any of METHODS.
        rounds: turns of each method in each case.
        round_s: seconds of one turn.
        connections: connections per fetch, for tcp.
        links_mbit_s: speeds of rate-limited links to measure, too; left out where namespaces cannot be made.
        console: where to print.
    """
    skipped: dict[str, str] = {}
    if _NIXL_METHODS.intersection(methods) and (problem := unavailable()):
        skipped |= dict.fromkeys(sorted(_NIXL_METHODS.intersection(methods)), problem)
    if "tcp-tls" in methods and not has_openssl():
        skipped["tcp-tls"] = "no openssl to make certificates with"
    if "redis" in methods and redis_program() is None:
        skipped["redis"] = "no redis-server"
    if links_mbit_s and (problem := network.unavailable()):
        skipped["links"] = problem
        links_mbit_s = ()
    load = os.getloadavg()[0]
    usable = [method for method in methods if method not in skipped]
    measurements = []
    for chunk_bytes in chunk_sizes_bytes:
        with _Case(chunk_bytes, usable, connections) as case:
            for batch in batches:
                if batch * chunk_bytes <= POOL_BYTES:
                    measurements += case.measure(batch, rounds, round_s)
    links = []
    try:
        links = [measure_holders([1], speed, 3)[0] for speed in links_mbit_s]
    except (StartupError, OSError) as error:  # what has been measured for minutes is worth having
        skipped["links"] = str(error)
    result = TransferBenchmark(
        machine=f"{platform.machine()} {platform.system()} {platform.release()}",
        cores=os.cpu_count() or 0,
        ucx_tls=os.environ.get("UCX_TLS", ""),
        load=load,
        skipped=skipped,
        measurements=measurements,
        iperf3_gb_per_s=iperf3_gb_per_s(),
        links=links,
        links_mbit_s=list(links_mbit_s) if links else [],
    )
    if console is not None:
        console.print(table(result))
        if result.iperf3_gb_per_s is not None:
            console.print(f"iperf3, one connection: {result.iperf3_gb_per_s:.2f} GB/s")
        for speed, row in zip(result.links_mbit_s, result.links, strict=True):
            console.print(f"{speed:g} Mbit/s link: {row.mb_per_s:.1f} MB/s of chunks, {row.link_share:.1%} of the link")
    return result


def chart(result: TransferBenchmark) -> str:
    """The largest batches as SVG: GB/s by chunk size."""
    largest: dict[tuple[str, int], Measurement] = {}
    for found in result.measurements:
        known = largest.get((found.method, found.chunk_bytes))
        if known is None or known.batch < found.batch:
            largest[found.method, found.chunk_bytes] = found
    lines: dict[str, list[tuple[float, float]]] = {}
    for found in largest.values():
        lines.setdefault(found.method, []).append((found.chunk_bytes / MIB, found.gb_per_s))
    title = f"Chunks between two processes of one host, {result.cores} cores"
    return line_chart(title, "chunk, MiB", "GB/s", lines)


def table(result: TransferBenchmark) -> Table:
    """The result for people."""
    machine = f"{result.cores} cores, load {result.load:.1f}, UCX_TLS={result.ucx_tls or 'default'}"
    shown = Table(
        title=f"Chunks between two processes, {machine}",
        caption="; ".join(f"{method} left out: {why}" for method, why in result.skipped.items()) or None,
    )
    for column in ("chunk", "batch", "method", "GB/s", "p50 ms", "p99 ms", "fetcher CPU s/GB", "holder CPU s/GB"):
        shown.add_column(column, justify="left" if column == "method" else "right")
    last = None
    for found in result.measurements:
        case = (found.chunk_bytes, found.batch)
        if last not in {None, case}:
            shown.add_section()
        last = case
        size = f"{found.chunk_bytes // MIB} MiB" if found.chunk_bytes >= MIB else f"{found.chunk_bytes >> 10} KiB"
        shown.add_row(
            size,
            str(found.batch),
            found.method,
            f"{found.gb_per_s:.2f}",
            f"{found.fetch_p50_ms:.2f}",
            f"{found.fetch_p99_ms:.2f}",
            f"{found.fetcher_cpu_s_per_gb:.3f}",
            f"{found.holder_cpu_s_per_gb:.3f}",
        )
    return shown


Fetch = Callable[[int], None]
"""Moves that many chunks once."""


class _Case:
    """A holder process of one chunk size, and every method ready to fetch from it."""

    def __init__(self, chunk_bytes: int, methods: Iterable[str], connections: int) -> None:
        self._chunk_bytes = chunk_bytes
        self._methods = list(methods)
        self._connections = connections
        self._stack = ExitStack()
        self._fetches: dict[str, Fetch] = {}
        self._holder_pids: list[int] = []
        self._tls_files: TlsFiles | None = None

    def __enter__(self) -> _Case:  # noqa: PYI034 - private, never subclassed
        pool = self._stack.enter_context(closing(HostPool.create(POOL_BYTES // self._chunk_bytes, self._chunk_bytes)))
        for slot in range(pool.slots):
            pool.row(slot)[:] = bytes(self._chunk_bytes)  # no page faults later
        if "tcp-tls" in self._methods:
            folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
            self._tls_files = Authority(folder).issue("benchmark")
        holder = self._stack.enter_context(
            _holder_process(
                self._chunk_bytes, nixl=bool(_NIXL_METHODS.intersection(self._methods)), tls=self._tls_files
            )
        )
        self._holder_pids = holder.pids
        ours = _hello("fetcher", self._chunk_bytes)
        for method in self._methods:
            port = holder.ports.get(method, holder.ports["tcp"])
            target = PeerTarget(_HOLDER, _INCARNATION, _HOST, port, ("shm", "nixl", "tcp"))
            self._fetches[method] = self._prepare(method, target, ours, pool, holder)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def measure(self, batch: int, rounds: int, round_s: float) -> list[Measurement]:
        """Each method in turn, `rounds` times."""
        found: dict[str, list[_Round]] = {method: [] for method in self._methods}
        for method in self._methods:
            self._fetches[method](batch)
        for _ in range(rounds):
            for method in self._methods:
                found[method].append(self._round(self._fetches[method], batch, round_s))
        return [self._summary(method, batch, turns) for method, turns in found.items()]

    def _round(self, fetch: Fetch, batch: int, round_s: float) -> _Round:
        fetches_s: list[float] = []
        holder_s, fetcher_s = self._holder_cpu_s(), time.process_time()
        end_s = time.perf_counter() + round_s
        while not fetches_s or time.perf_counter() < end_s:
            start_s = time.perf_counter()
            fetch(batch)
            fetches_s.append(time.perf_counter() - start_s)
        return _Round(fetches_s, time.process_time() - fetcher_s, self._holder_cpu_s() - holder_s)

    def _summary(self, method: str, batch: int, turns: list[_Round]) -> Measurement:
        fetch_gb = batch * self._chunk_bytes / 1e9
        every = sorted(seconds for turn in turns for seconds in turn.fetches_s)
        return Measurement(
            method,
            self._chunk_bytes,
            batch,
            gb_per_s=median(fetch_gb * len(turn.fetches_s) / sum(turn.fetches_s) for turn in turns),
            fetch_p50_ms=1e3 * every[len(every) // 2],
            fetch_p99_ms=1e3 * every[len(every) * 99 // 100],
            fetcher_cpu_s_per_gb=median(turn.fetcher_cpu_s / fetch_gb / len(turn.fetches_s) for turn in turns),
            holder_cpu_s_per_gb=median(turn.holder_cpu_s / fetch_gb / len(turn.fetches_s) for turn in turns),
        )

    def _holder_cpu_s(self) -> float:
        """CPU time of the holder's threads, to the nanosecond (field 1 of schedstat)."""
        tasks = (task for pid in self._holder_pids for task in Path(f"/proc/{pid}/task").iterdir())
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9

    def _prepare(self, method: str, target: PeerTarget, ours: Hello, pool: HostPool, holder: _Holder) -> Fetch:
        if method == "memcpy":
            source = self._stack.enter_context(closing(HostPool.create(pool.slots, pool.chunk_bytes)))
            for slot in range(pool.slots):
                source.row(slot)[:] = os.urandom(4096) * (pool.chunk_bytes // 4096)
            return lambda batch: _copy(source, pool, batch)
        if method == "memcpy-first":
            origin = self._stack.enter_context(closing(HostPool.create(pool.slots, pool.chunk_bytes)))
            for slot in range(pool.slots):
                origin.row(slot)[:] = bytes(pool.chunk_bytes)
            return lambda batch: _copy_first(origin, pool, batch)
        if method == "redis":
            values = self._stack.enter_context(RedisValues.running(min(pool.slots, MAX_BATCH), pool.chunk_bytes))
            self._holder_pids.append(values.pid)
            return lambda batch: values.fetch(pool, batch)
        if method == "socket":
            raw = self._stack.enter_context(socket.create_connection((_HOST, holder.socket_port)))
            return lambda batch: _receive(raw, pool, batch)
        if method == "nixl-raw":
            prepare_environment(_HOST)
            nixl = self._stack.enter_context(closing(RawNixl(pool, holder.nixl_metadata, holder.nixl_addresses)))
            return nixl.fetch
        transport: PeerTransport
        if method in _NIXL_METHODS:
            from kvmesh.transfer.nixl import NixlTransport  # noqa: PLC0415 - half a second and 50 MB

            prepare_environment(_HOST)
            transport = NixlTransport(target, ours, pool, verify=method == "nixl")
        elif method in {"shm", "shm-unchecked"}:
            transport = ShmTransport(target, ours, pool, threads=self._connections, verify=method == "shm")
        else:
            transport = TcpTransport(
                target,
                ours,
                pool,
                connections=self._connections,
                verify=method != "tcp-unchecked",
                security=_securities(self._tls_files).get(method, OPEN),
            )
        self._stack.callback(transport.close)
        return lambda batch: _fetch(transport, batch)


def _copy(source: HostPool, pool: HostPool, batch: int) -> None:
    for slot in range(batch):
        pool.row(slot)[:] = source.row(slot)


def _copy_first(origin: HostPool, pool: HostPool, batch: int) -> None:
    fd, start, length = origin.segments[0]
    with closing(HostPool([PoolSegment(os.dup(fd), start, length)], chunk_bytes=origin.chunk_bytes)) as mapped:
        _copy(mapped, pool, batch)


def _receive(raw: socket.socket, pool: HostPool, batch: int) -> None:
    raw.sendall(struct.pack("<I", batch))
    for slot in range(batch):
        row, received = pool.row(slot), 0
        while received < len(row):
            count = raw.recv_into(row[received:])
            if not count:
                raise TransferError("benchmark over a raw socket", found="the holder has ended")
            received += count


def _fetch(transport: PeerTransport, batch: int) -> None:
    items = [FetchItem(_key(slot), slot) for slot in range(batch)]
    outcomes = transport.fetch(items, Deadline(time.monotonic() + _PATIENCE_S, _PATIENCE_S))
    if any(outcome.reason for outcome in outcomes):
        raise TransferError(f"benchmark over {transport.name}", found=transport.statistics().last_error)


def _key(index: int) -> ChunkKey:
    return ChunkKey(index.to_bytes(36, "big"))


def _securities(tls: TlsFiles | None) -> dict[str, PeerSecurity]:
    """How the methods that secure their connections do it."""
    key = ClusterKey("the key of this benchmark").peer_key()
    found = {"tcp-key": PeerSecurity(key=key)}
    if tls is not None:
        found["tcp-tls"] = PeerSecurity(key=key, tls=Tls.load(tls))
    return found


def _hello(instance_id: str, chunk_bytes: int) -> Hello:
    text = dict.fromkeys(Format.__struct_fields__, "benchmark")
    numbers = {"block_tokens": 1, "chunk_tokens": 1, "chunk_bytes": chunk_bytes}
    kv_format = msgspec.convert(text | numbers, Format)
    return Hello.of(instance_id, _INCARNATION, kv_format, transports=("shm", "nixl", "tcp"), pid=os.getpid())


# -- the other process -------------------------------------------------------------------------------------------------


class _Holder(msgspec.Struct):
    ports: dict[str, int]
    """By method."""
    socket_port: int
    pids: list[int]
    nixl_metadata: bytes
    nixl_addresses: list[int]
    """Of the slots, in the process that serves NIXL."""


@contextmanager
def _holder_process(chunk_bytes: int, *, nixl: bool, tls: TlsFiles | None) -> Iterator[_Holder]:
    options = json.dumps([chunk_bytes, nixl, tls])
    process = subprocess.Popen([sys.executable, "-m", __name__, options], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield msgspec.json.decode(process.stdout.readline(), type=_Holder)
        finally:
            process.stdin.close()


def _serve_socket(listener: socket.socket, pool: HostPool) -> None:
    connection, _ = listener.accept()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while request := connection.recv(4, socket.MSG_WAITALL):
        for slot in range(struct.unpack("<I", request)[0]):
            connection.sendall(pool.row(slot))


def main() -> None:
    """Serve a pool until standard input ends."""
    chunk_bytes, nixl, tls = json.loads(sys.argv[1])
    slots = POOL_BYTES // chunk_bytes
    pool, ledger = HostPool.create(slots, chunk_bytes), SlotLedger.create(slots, chunk_bytes)
    where = {}
    for slot in range(slots):
        row = pool.row(slot)
        row[:] = os.urandom(4096) * (chunk_bytes // 4096)
        generation, digest = ledger.publish(slot, _key(slot)), xxhash.xxh3_128_digest(row)
        ledger.set_checksum(slot, generation, digest)
        where[bytes(_key(slot))] = Located(slot, generation, digest)
    pids, holder, metadata, addresses = [os.getpid()], None, b"", list[int]()
    if nixl:
        from kvmesh.transfer.nixl_holder import NixlHolder  # noqa: PLC0415 - as above

        holder = NixlHolder(pool, host=_HOST)
        holder.start()
        assert holder.pid is not None
        pids.append(holder.pid)
        metadata, (_, addresses) = holder.describe().metadata, holder.addresses(range(slots))
    servers = {}
    shm = ShmHolder(pool, ledger, _INCARNATION)
    for method, security in {"tcp": OPEN, **_securities(TlsFiles(*tls) if tls else None)}.items():
        servers[method] = server = PeerServer(
            pool,
            ledger,
            where.get,
            _hello(_HOLDER, chunk_bytes),
            host=_HOST,
            port=0,
            nixl=holder,
            shm=shm if method == "tcp" else None,
            security=security,
        )
        server.start()
    listener = socket.create_server((_HOST, 0))
    threading.Thread(target=_serve_socket, args=(listener, pool), daemon=True).start()
    ports = {method: server.port for method, server in servers.items()}
    ready = _Holder(ports, listener.getsockname()[1], pids, metadata, addresses)
    sys.stdout.buffer.write(msgspec.json.encode(ready) + b"\n")
    sys.stdout.buffer.flush()
    sys.stdin.buffer.read()
    for server in servers.values():
        server.close()
    if holder is not None:
        holder.close()


if __name__ == "__main__":
    main()
