"""A holder in a process of its own, for the transfer tests: a pool, a ledger and a peer server.

Chunk i is published under `key(i)` in slot i and holds `content(i)`. One JSON line on standard output says where it
listens, then each line on standard input is a command that is answered by a line. It ends with its standard input.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from kvmesh.core.format import Format
from kvmesh.core.keys import ChunkKey
from kvmesh.core.ledger import SlotLedger
from kvmesh.node.peer_server import PeerServer
from kvmesh.transfer import nixl_holder
from kvmesh.transfer.base import FetchItem, Located
from kvmesh.transfer.link import PeerTarget
from kvmesh.transfer.pool import HostPool
from kvmesh.transfer.security import OPEN, PeerSecurity
from kvmesh.transfer.shm_holder import ShmHolder
from kvmesh.wire.auth import ClusterKey
from kvmesh.wire.peer import Hello

if TYPE_CHECKING:
    from typing_extensions import Self

HOLDER, HOLDER_INCARNATION = "holder", "00000000000000aa"
OTHER_INCARNATION = "00000000000000bb"


def kv_format(chunk_bytes: int, **changes: object) -> Format:
    fields: dict[str, Any] = {
        "model_name": "m",
        "model_weights": "w",
        "kv_dtype": "bfloat16",
        "kv_layout": "v1",
        "block_tokens": 16,
        "chunk_tokens": 256,
        "chunk_bytes": chunk_bytes,
        "groups": "g",
        "hash_algorithm": "sha256",
        "hash_seed": "",
        "parallel_layout": "tp1",
        "instruction_set": "",
    }
    return Format(**(fields | changes))


def key(index: int) -> ChunkKey:
    return ChunkKey(index.to_bytes(8, "big") * 4 + bytes(4))


def content(index: int, chunk_bytes: int) -> bytes:
    """Different in every chunk and at every 4 KiB page, and quick to make."""
    return random.Random(index).randbytes(4096 + 1) * (chunk_bytes // 4097) + bytes([index % 251]) * (
        chunk_bytes % 4097
    )


def kv_like(index: int, chunk_bytes: int, dtype: str = "bfloat16") -> bytes:
    """Normally distributed numbers, as in KV."""
    numbers = np.random.default_rng(index).standard_normal(chunk_bytes // 2, np.float32)
    if dtype == "bfloat16":
        return (numbers.view(np.uint32) >> 16).astype(np.uint16).tobytes()[:chunk_bytes]
    return numbers.astype(dtype).tobytes()[:chunk_bytes]


def items(count: int, first: int = 0) -> list[FetchItem]:
    """Chunks `first` and following, into slots 0 and following."""
    return [FetchItem(key(first + index), index) for index in range(count)]


class Store:
    """What a holder serves, in this process. Its `locate` can be slowed down."""

    def __init__(self, chunks: int, chunk_bytes: int, pool: HostPool | None = None) -> None:
        self.pool = pool or HostPool.create(chunks, chunk_bytes)
        self.ledger = SlotLedger.create(chunks, chunk_bytes)
        self.delay_s = 0.0
        self._where: dict[bytes, Located] = {}
        for index in range(chunks):
            self.publish(index, index)

    def publish(self, slot: int, index: int) -> None:
        """Put chunk `index` into `slot` and announce it."""
        self.fill(slot, index, content(index, self.pool.chunk_bytes), xxhash.xxh3_128_digest)

    def fill(self, slot: int, index: int, data: bytes, digest: Callable[[memoryview], bytes]) -> None:
        """The same with any bytes and checksum."""
        self.retract(slot)
        row = self.pool.row(slot)
        row[:] = data
        generation = self.ledger.publish(slot, key(index))
        checksum = digest(row)
        self.ledger.set_checksum(slot, generation, checksum)
        self._where[key(index)] = Located(slot, generation, checksum)

    def retract(self, slot: int) -> None:
        """Make the slot unreadable, then spoil its bytes. The announcement stays: a stale directory entry."""
        self.ledger.retract(slot)
        self.pool.row(slot)[:] = b"\xee" * self.pool.chunk_bytes

    def forget(self, index: int) -> None:
        del self._where[key(index)]

    def locate(self, wanted: bytes) -> Located | None:
        time.sleep(self.delay_s)
        return self._where.get(wanted)

    def close(self) -> None:
        self.ledger.close()
        self.pool.close()


class RacingPool(HostPool):
    """Its owner reuses the slots in `racing` between the first look at the ledger and the sending of the bytes."""

    store: Store | None = None
    racing: frozenset[int] = frozenset()

    def row(self, slot: int) -> memoryview:
        if slot in self.racing and self.store is not None:
            self.racing -= {slot}
            self.store.retract(slot)
        return super().row(slot)


def hello(
    chunk_bytes: int, instance_id: str = HOLDER, incarnation: str = HOLDER_INCARNATION, **changes: object
) -> Hello:
    return Hello.of(
        instance_id, incarnation, kv_format(chunk_bytes, **changes), transports=("shm", "nixl", "tcp"), pid=os.getpid()
    )


class HolderProcess:
    """Starts this file as a process. Use as a context manager."""

    def __init__(
        self,
        chunks: int,
        chunk_bytes: int,
        *,
        nixl: bool = False,
        port: int = 0,
        racing: tuple[int, ...] = (),
        ucx_tls: str = "",
        shm: bool = False,
    ) -> None:
        options = {"chunks": chunks, "chunk_bytes": chunk_bytes, "nixl": nixl, "port": port, "racing": racing}
        options["shm"] = shm
        options["key"] = os.environ.get("KVMESH_CLUSTER_KEY", "")
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__)), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | ({"UCX_TLS": ucx_tls} if ucx_tls else {}),
        )
        self.chunk_bytes = chunk_bytes
        ready = json.loads(self._line())
        self.port, self.nixl_pid = ready["port"], ready["nixl_pid"]

    @property
    def target(self) -> PeerTarget:
        return PeerTarget(HOLDER, HOLDER_INCARNATION, "127.0.0.1", self.port, ("nixl", "tcp"))

    def tell(self, *command: object) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return json.loads(self._line())

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"holder ended with {self.process.wait()}"
        return line

    def send_signal(self, number: int) -> None:
        """To the whole holder: its node and, where there is one, its NIXL process."""
        for pid in filter(None, (self.process.pid, self.nixl_pid)):
            os.kill(pid, number)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()
        if self.nixl_pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.nixl_pid, signal.SIGKILL)


def say(answer: object) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def main() -> None:
    options = json.loads(sys.argv[1])
    chunks, chunk_bytes = options["chunks"], options["chunk_bytes"]
    source = HostPool.create(chunks, chunk_bytes)
    pool = RacingPool(source.segments, chunk_bytes=chunk_bytes)
    store = Store(chunks, chunk_bytes, pool)
    pool.store, pool.racing = store, frozenset(options["racing"])
    holder = None
    if options["nixl"]:
        nixl_holder.RESTART_INTERVAL_S = 0.0

        class RacingHolder(nixl_holder.NixlHolder):
            def addresses(self, slots: Any) -> Any:
                found = super().addresses(slots)
                for slot in pool.racing & set(slots):
                    pool.row(slot)  # loses the race
                return found

        holder = RacingHolder(pool, host="127.0.0.1")
        holder.start()
    server = PeerServer(
        pool,
        store.ledger,
        store.locate,
        hello(chunk_bytes),
        host="127.0.0.1",
        port=options["port"],
        nixl=holder,
        shm=ShmHolder(pool, store.ledger, HOLDER_INCARNATION) if options["shm"] else None,
        security=PeerSecurity(key=ClusterKey(options["key"]).peer_key()) if options["key"] else OPEN,
    )
    server.start()
    say({"port": server.port, "nixl_pid": holder.pid if holder else None})
    stop_churning = threading.Event()

    def churn(others: int) -> None:
        generator = random.Random(1)
        while not stop_churning.is_set():
            slot = generator.randrange(chunks)
            store.publish(slot, generator.choice([slot, chunks + generator.randrange(others)]))

    for line in sys.stdin:
        match json.loads(line):
            case ["publish", slot, index]:
                store.publish(slot, index)
            case ["retract", slot]:
                store.retract(slot)
            case ["spoil", slot]:
                store.pool.row(slot)[12345] ^= 1
            case ["forget", index]:
                store.forget(index)
            case ["delay", delay_s]:
                store.delay_s = delay_s
            case ["churn", others]:
                threading.Thread(target=churn, args=(others,), daemon=True).start()
            case ["statistics"]:
                pass
            case command:
                raise ValueError(command)
        statistics = server.statistics()._asdict() | {"nixl_pid": holder.pid if holder else None}
        say(statistics)
    stop_churning.set()
    server.close()
    if holder is not None:
        holder.close()


if __name__ == "__main__":
    main()
