"""A network for pods: a bridge on this machine, a namespace with an address for each pod, and service addresses.

Needs root and iproute2. The addresses are of the block reserved for measuring networks (RFC 2544), so that nobody's own
are hidden. Names are resolved by a hosts file per pod, as `ip netns exec` puts it in place.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from typing_extensions import Self

NETNS_FILES = Path("/etc/netns")


def unavailable() -> str | None:
    """Why pods cannot have a network here; None when they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [tool for tool in ("ip", "unshare", "mount") if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)} not found"
    probe = f"kvp{os.getpid() % 100000}"
    try:
        ip("link", "add", probe, "type", "bridge")
    except OSError as error:
        return f"no bridge can be made here: {error}"
    ip("link", "del", probe)
    return None


class PodNetwork:
    """A context manager."""

    def __init__(self) -> None:
        self._tag = f"kv{os.getpid() % 100000}"
        self.bridge = f"{self._tag}br"
        self._subnet = _free_subnet()
        self._next_pod, self._next_service = 10, 200
        self._spaces: list[str] = []
        self.host = f"{self._subnet}.1"
        """This machine, as pods see it."""

    def __enter__(self) -> Self:
        # A bridge without an address of its own takes the lowest of its ports: a pod that comes or goes may change it,
        # and what others know of the way to a service is then wrong for half a minute.
        ip("link", "add", self.bridge, "address", "02:00:00:00:00:01", "type", "bridge")
        ip("addr", "add", f"{self.host}/24", "dev", self.bridge)
        ip("link", "set", self.bridge, "up")
        return self

    def __exit__(self, *_: object) -> None:
        for space in list(self._spaces):
            self.remove(space)
        with contextlib.suppress(OSError):
            ip("link", "del", self.bridge)

    def add_pod(self) -> tuple[str, str]:
        """(namespace, address) of a new pod."""
        number, self._next_pod = self._next_pod, self._next_pod + 1
        space, address = f"{self._tag}-{number}", f"{self._subnet}.{number}"
        outside = f"{self._tag}v{number}"
        ip("netns", "add", space)
        self._spaces.append(space)
        ip("link", "add", outside, "type", "veth", "peer", "name", "eth0", "netns", space)
        ip("link", "set", outside, "master", self.bridge, "up")
        ip("-n", space, "addr", "add", f"{address}/24", "dev", "eth0")
        ip("-n", space, "link", "set", "eth0", "up")
        ip("-n", space, "link", "set", "lo", "up")
        return space, address

    def add_service_address(self) -> str:
        """A new address on the bridge, for a service."""
        number, self._next_service = self._next_service, self._next_service + 1
        address = f"{self._subnet}.{number}"
        ip("addr", "add", f"{address}/24", "dev", self.bridge)
        return address

    def write_hosts(self, space: str, names: Sequence[tuple[str, str]]) -> None:
        """Which names (address, name) the pod resolves; a name may have several addresses."""
        folder = NETNS_FILES / space
        folder.mkdir(parents=True, exist_ok=True)
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for address, name in names)]
        (folder / "hosts").write_text("\n".join(lines) + "\n")

    def remove(self, space: str) -> None:
        """Take a pod's namespace away; its link goes with it."""
        with contextlib.suppress(OSError, ValueError):
            ip("netns", "del", space)
            self._spaces.remove(space)
        shutil.rmtree(NETNS_FILES / space, ignore_errors=True)
        with contextlib.suppress(OSError):
            NETNS_FILES.rmdir()

    @staticmethod
    def connections(space: str) -> set[tuple[str, int]]:
        """(address, port) of everything that the pod is connected to, by its own doing."""
        listening = {line.split()[3].rpartition(":")[2] for line in _ss(space, "-ltnH")}
        found = set()
        for line in _ss(space, "-tnH", "state", "established"):
            local, remote = line.split()[2:4]
            if local.rpartition(":")[2] not in listening:
                host, _, port = remote.rpartition(":")
                found.add((host.strip("[]").removeprefix("::ffff:"), int(port)))
        return found


class Forwarder:
    """What a cluster does for a service: takes connections on its address and hands each to one of its pods in turn."""

    def __init__(self, address: str, port: int, targets: Callable[[], Sequence[tuple[str, int]]]) -> None:
        self._targets = targets
        self._turn = 0
        self._listener = socket.create_server((address, port))
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stopping.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()

    def _accept(self) -> None:
        while not self._stopping.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            targets = self._targets()
            if not targets:
                client.close()  # as a cluster refuses a service without endpoints
                continue
            self._turn += 1
            target = targets[self._turn % len(targets)]
            threading.Thread(target=self._forward, args=(client, target), daemon=True).start()

    def _forward(self, client: socket.socket, target: tuple[str, int]) -> None:
        with client, contextlib.suppress(OSError), socket.create_connection(target, timeout=5) as server:
            server.settimeout(None)
            other = {client: server, server: client}
            with selectors.DefaultSelector() as selector:
                for one in other:
                    selector.register(one, selectors.EVENT_READ)
                while selector.get_map() and not self._stopping.is_set():
                    for key, _ in selector.select(timeout=0.5):
                        source = key.fileobj
                        assert isinstance(source, socket.socket)
                        data = source.recv(1 << 16)
                        if data:
                            other[source].sendall(data)
                        else:
                            selector.unregister(source)
                            other[source].shutdown(socket.SHUT_WR)


def ip(*arguments: str) -> str:
    """Run `ip`. Raises OSError with its words."""
    return _run("ip", *arguments)


def _ss(space: str, *arguments: str) -> list[str]:
    return _run("ip", "netns", "exec", space, "ss", *arguments).splitlines()


def _free_subnet() -> str:
    used = ip("-o", "addr")
    start = os.getpid() % 100
    return next(net for step in range(100) if f"{(net := f'198.18.{100 + (start + step) % 100}')}." not in used)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")
    return done.stdout
