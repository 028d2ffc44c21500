"""A small cluster of real processes that faults are done to: a controller, an engine that holds, one that reads."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from kvmesh.bench.chaos.actor import Load, Options
from kvmesh.bench.chaos.actors import Actor
from kvmesh.bench.chaos.network import (
    CONTROLLER_HOLDER,
    CONTROLLER_READER,
    DATA,
    HOLDER_DATA,
    READER_DATA,
    Network,
)
from kvmesh.bench.chaos.proxies import CorruptingProxy, LossyProxy
from kvmesh.bench.chaos.traffic import Traffic
from kvmesh.bench.cluster import HOST, Controller, free_ports, wait_healthy
from kvmesh.config import KVMeshConfig
from kvmesh.config.cluster_key import CLUSTER_KEY_VARIABLE

Kind = Literal["local", "network", "proxied", "lossy", "small_disks", "secured"]

CHUNK_BYTES = 256 * 1024
CHUNKS = 6
"""Per document."""
DOCUMENTS = 6
SLOTS = 64
"""Of each pool. Everything that is asked for fits; with `churn` it does not."""
FETCH_TIMEOUT_S = 3.0
STALL_TIMEOUT_S = 1.0
HEARTBEAT_S = 0.5
PAUSE_S = 0.01
"""Between an answer and the next request."""
HOLDER_BEHIND_PROXY, PROXY = "127.0.0.2", "127.0.0.3"

_SMALL_DISKS = (
    'mkdir -p "$KVMESH_SMALL" && mount -t tmpfs -o size=512k none "$KVMESH_SMALL" && '
    'mount -t tmpfs -o size=512k none /dev/shm && exec "$@" 2>>"$KVMESH_SMALL/log"'
)


class Stage:
    """Open it, do things to its parts, close it."""

    def __init__(self, kind: Kind, transport: str, folder: Path, seed: int) -> None:
        self.kind = kind
        self.transport = transport
        self.seed = seed
        self.folder = folder
        self.traffic = Traffic(DOCUMENTS)
        self.problems: list[str] = []
        """What a fault found to be wrong, besides what the requests show."""
        self.lookup_ports: dict[str, int] = {}
        self._open = contextlib.ExitStack()
        self._after = contextlib.ExitStack()
        self._loads = 0

    # -- life ----------------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Start everything and wait until the reader knows what the holder has. Raises StartupError."""
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.network: Network | None = None
        if self.kind == "network":
            self.network = Network()
            self._open.callback(self.network.close)
            self.network.open()
        self.controller = Controller(self.folder)
        beyond = ["--host", "0.0.0.0", "--insecure"] if self.network else []
        self.cluster_key: str | None = None
        if self.kind == "secured":
            self.cluster_key = secrets.token_urlsafe(32)
            self.controller.env = {CLUSTER_KEY_VARIABLE: self.cluster_key}
        self.controller.command = [
            *self.controller.command,
            *("--heartbeat-interval", str(HEARTBEAT_S), "--instance-timeout", str(6 * HEARTBEAT_S)),
            *beyond,
        ]
        self._open.callback(self.controller.stop)
        self.controller.start()
        wait_healthy(self.controller, timeout_s=120)
        self.lossy: dict[str, LossyProxy] = {}
        self.corrupting: CorruptingProxy | None = None
        self.holder = self.actor("holder")
        self.reader = self.actor("reader", self.traffic)
        for actor in (self.holder, self.reader):
            self._open.callback(actor.close)
            actor.start(wait=False)
        for actor in (self.holder, self.reader):
            actor.started()
        if self.kind == "proxied":
            port = self.holder.peer_port
            self.corrupting = CorruptingProxy((PROXY, port), (HOLDER_BEHIND_PROXY, port), self.seed)
            self._open.callback(self.corrupting.close)
        self.publish()
        self.reader.tell("wait_visible", first=0, count=DOCUMENTS, chunks=CHUNKS, timeout_s=30.0)

    def close(self) -> None:
        """End all processes, remove namespaces."""
        self.calm()
        self._open.close()

    # -- for faults ----------------------------------------------------------------------------------------------------

    def actor(self, name: str, traffic: Traffic | None = None, *, instance_id: str = "", **changed: object) -> Actor:
        """A further engine, not started yet. `changed` are configuration keys, and what `Options`
        calls `foreign_weights` and `lies`.
        """
        foreign, lies = (bool(changed.pop(name, False)) for name in ("foreign_weights", "lies"))
        config = self._config(name, instance_id or name, changed)
        options = Options(
            config=config.to_wire().decode(),
            slots=SLOTS,
            chunk_bytes=CHUNK_BYTES,
            foreign_weights=foreign,
            lies=lies,
        )
        prefix, environment = self._surroundings(name)
        return Actor(
            name,
            options,
            self.folder / f"{name}.log",
            prefix=prefix,
            environment=environment,
            heard=traffic.heard if traffic else lambda _: None,
        )

    def join(self, name: str, **changed: object) -> Actor:
        """A further engine, started; ended when the cell is over."""
        actor = self.actor(name, **changed)  # type: ignore[arg-type]  # passed on as they are
        self._after.callback(actor.close)
        actor.start()
        return actor

    def publish(self) -> None:
        """Have the holder store all documents."""
        self.holder.tell("put", first=0, count=DOCUMENTS, chunks=CHUNKS)

    def restart_holder(self) -> None:
        """Start the holder's engine again, as its operator would: same id, same port, empty pool that fills again."""
        self.holder.start()
        self.publish()

    def later(self, action: Callable[[], object]) -> None:
        """Do it when the cell is over, whatever came of it."""
        self._after.callback(action)

    def calm(self) -> None:
        """Do what was put off until the cell is over."""
        self._after.close()
        self.problems.clear()

    # -- requests ------------------------------------------------------------------------------------------------------

    def load(self) -> None:
        """Start requests."""
        self.traffic.forget()
        self._loads += 1
        load = Load(
            seed=self.seed * 1000 + self._loads,
            documents=DOCUMENTS,
            chunks=CHUNKS,
            timeout_s=FETCH_TIMEOUT_S,
            pause_s=PAUSE_S,
        )
        self.reader.tell("load", **msgspec.to_builtins(load))

    def idle(self) -> None:
        """End requests; the one that is out is answered first."""
        self.reader.tell("idle")

    # -- inside --------------------------------------------------------------------------------------------------------

    def _config(self, name: str, instance_id: str, changed: dict[str, object]) -> KVMeshConfig:
        is_reader = name == "reader"
        host, advertised, controller = HOST, HOST, HOST
        peer_port, lookup_port = free_ports(2)
        self.lookup_ports[name] = lookup_port
        pull, reply = self.controller.pull_port, self.controller.reply_port
        if self.network:
            host = advertised = READER_DATA if is_reader else HOLDER_DATA
            controller = CONTROLLER_READER if is_reader else CONTROLLER_HOLDER
        if self.kind == "proxied" and name == "holder":
            host, advertised = HOLDER_BEHIND_PROXY, PROXY
        if self.kind == "lossy":
            proxy = self.lossy[name] = LossyProxy(f"tcp://{HOST}:{pull}", f"tcp://{HOST}:{reply}", self.seed)
            self._open.callback(proxy.close)
            pull, reply = proxy.pull_port, proxy.reply_port
        fields: dict[str, object] = {
            "instance_id": instance_id,
            "host": host,
            "advertise_host": advertised,
            "peer_port": peer_port,
            "lookup_port": lookup_port,
            "admin_port": 0,
            "insecure": self.network is not None,
            "cluster_key": self.cluster_key,
            "transfer_channel": self.transport,
            "fetch_timeout_s": FETCH_TIMEOUT_S,
            "stall_timeout_s": STALL_TIMEOUT_S,
            "heartbeat_interval_s": HEARTBEAT_S,
            "enable_controller": True,
            "controller_pull_url": f"tcp://{controller}:{pull}",
            "controller_reply_url": f"tcp://{controller}:{reply}",
        }
        return KVMeshConfig(**(fields | changed))  # type: ignore[arg-type]

    def _surroundings(self, name: str) -> tuple[Sequence[str], dict[str, str]]:
        environment = {"UCX_TLS": os.environ.get("UCX_TLS", "tcp")}  # no short cut within one host
        prefix: list[str] = []
        if self.network:
            prefix = self.network.inside(self.network.reader if name == "reader" else self.network.holder)
            environment["UCX_NET_DEVICES"] = DATA
        if self.kind == "small_disks" and name == "holder":
            small = str(self.folder / "small")
            environment |= {"KVMESH_SMALL": small, "TMPDIR": small}
            prefix = ["unshare", "--mount", "--propagation", "private", "sh", "-c", _SMALL_DISKS, "sh"]
        return prefix, environment


def wait_until(condition: Callable[[], bool], timeout_s: float) -> bool:
    """Poll what has no event to wait for."""
    until_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > until_s:
            return False
        time.sleep(0.02)
    return True
