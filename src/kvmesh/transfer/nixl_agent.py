"""The part of NIXL's Python interface that we use, typed, with its traps handled.

Seen with nixl 1.5.1 and UCX 1.23, and the reason for what is done here:

- The wrapper gives the progress thread a delay of zero: it spins. The thread is woken by events all the same, so the
delay only
  sets how often it looks around in vain: 10 ms cost 0.5 % of a core idle (1 ms: 2 to 3 %) and no throughput.
- Releasing a transfer does not stop it; destroying the agent does, in 2 to 4 ms, whatever the peer does.
- Destroying an agent in the middle of a READ over UCX's tcp makes the *holder* abort (fatal error, endpoint timeout).
  Removing the remote agent first prevents it, except where the holder had been stopped. A fetching process that dies
  can have the same effect, rarely. Hence `destroy` removes first, and the holder's agent lives in a process of its own
  (`nixl_holder`).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.abc
import importlib.machinery
import ipaddress
import os
import secrets
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

from kvmesh.errors import NixlError

PROGRESS_DELAY_US = 10_000

_MODULES = ("nixl._api", "nixl_cu13._api", "nixl_cu12._api")
_UCX_DEFAULTS = {
    # Dead links are noticed in 5 to 7 s instead of 19 s (READ) or never (WRITE).
    "UCX_TCP_KEEPIDLE": "2s",
    "UCX_TCP_KEEPINTVL": "1s",
    "UCX_TCP_KEEPCNT": "3",
    "UCX_TCP_USER_TIMEOUT": "5s",
    "UCX_KEEPALIVE_INTERVAL": "2s",
    # Destroying an agent with a transfer under way is what we do on a deadline; it needs no three warnings each time.
    "UCX_LOG_LEVEL": "error",
}
_create_lock = threading.Lock()


Region = tuple[int, int]
"""(address, length in bytes)."""


@functools.cache
def load() -> Any:
    """NIXL's Python module. Raises TransferError that lists why each of its packages could not be imported."""
    os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")  # read when it is imported
    failures = []
    with _without_torch():
        for name in _MODULES:
            try:
                return importlib.import_module(name)
            except ImportError as error:  # noqa: PERF203 - three rounds
                failures.append(f"{name}: {error}")
    raise NixlError(
        "NIXL", expected="an importable package", found="; ".join(failures), hint="install kvmesh[nixl] or use tcp"
    )


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    """Keep NIXL's meta package from importing torch, seconds and 200 MB, for nothing but its CUDA version.

    It looks for that on disk first, and that still works; a torch that is loaded already is used as it is.
    """
    finder = _TorchRefuser()
    if "torch" not in sys.modules:
        sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.meta_path.remove(finder)


class _TorchRefuser(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds torch as usual, and fails to load it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "torch":
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None:
            spec.loader = self
        return spec

    def exec_module(self, module: ModuleType) -> None:
        raise ImportError(f"{module.__name__} is not needed for NIXL")


def unavailable() -> str | None:
    """Why NIXL cannot be used in this process; None when it can."""
    try:
        load()
    except NixlError as error:
        return str(error)
    return None


def prepare_environment(host: str) -> None:
    """Set UCX up before the first agent of this process; what the operator has set stays.

    UCX listens on every interface unless it is confined, so a node that is on loopback keeps it there. UCX_TLS is
    passed through.
    """
    for name, value in _UCX_DEFAULTS.items():
        os.environ.setdefault(name, value)
    if _is_loopback(host):
        os.environ.setdefault("UCX_NET_DEVICES", "lo")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Read:
    """One READ under way."""

    def __init__(self, handle: Any, *, is_done: bool) -> None:
        self.handle = handle
        self.is_done = is_done


class Agent:
    """One NIXL agent, for one thread at a time.

    Bytes arrive in registered memory only inside `read` and `is_done` (without a progress thread), or any time before
    `destroy` has returned (RDMA).
    """

    def __init__(self, role: str, *, backends: Sequence[str] = ("UCX",), progress_thread: bool) -> None:
        """Make an agent: 0.4 s for the first of a process, 40 ms and about 5 MB for each further one.

        Args:
            role: part of the name, for NIXL's own logs. Names are unique over restarts, because a peer that knew an
            agent of
                the same name would take the new one for it.
            backends: NIXL backends, in order of preference.
            progress_thread: the agent is read from by others; otherwise progress is made by polling `is_done`.

        Raises NixlError.
        """
        api = load()
        self.name = f"{socket.gethostname()}-{os.getpid()}-{role}-{secrets.token_hex(4)}"
        configuration = api.nixl_agent_config(
            enable_prog_thread=progress_thread, enable_listen_thread=False, backends=list(backends)
        )
        with _create_lock, _progress_delay(api), _translated("agent"):
            self._agent = api.nixl_agent(self.name, configuration)
        self._reads: list[Read] = []
        self._peers: list[str] = []

    def register(self, regions: Sequence[Region]) -> None:
        """Make memory usable for transfers. With RDMA this pins it. Raises NixlError."""
        with _translated("memory registration"):
            self._agent.register_memory([(address, length, 0, "") for address, length in regions], "DRAM")

    def metadata(self) -> bytes:
        """What another agent needs to read from this one. Raises NixlError."""
        with _translated("metadata"):
            return bytes(self._agent.get_agent_metadata())

    def add_peer(self, metadata: bytes) -> str:
        """Get to know another agent; returns its name. Only for metadata from a peer we trust: NIXL may abort on
        garbage.

        Raises NixlError.
        """
        with _translated("peer's metadata"):
            name = self._agent.add_remote_agent(metadata)
        peer = name.decode() if isinstance(name, bytes) else str(name)
        self._peers.append(peer)
        return peer

    def read(self, local: Sequence[Region], remote: Sequence[Region], peer: str) -> Read:
        """Start to read `remote` regions of `peer` into `local` ones. On one host (CMA) it is over when this returns.

        Raises NixlError.
        """
        with _translated("READ"):
            handle = self._agent.initialize_xfer(
                "READ",
                self._agent.get_xfer_descs([(address, length, 0) for address, length in local], "DRAM"),
                self._agent.get_xfer_descs([(address, length, 0) for address, length in remote], "DRAM"),
                peer,
            )
            read = Read(handle, is_done=False)
            self._reads.append(read)
            read.is_done = self._state(self._agent.transfer(handle))
        return read

    def is_done(self, read: Read) -> bool:
        """Make progress and look. Raises NixlError when the transfer failed, such as by the loss of the peer."""
        if not read.is_done:
            with _translated("READ"):
                read.is_done = self._state(self._agent.check_xfer_state(read.handle))
        return read.is_done

    def release(self, read: Read) -> None:
        """Forget a READ that is done. Raises NixlError."""
        self._reads.remove(read)
        with _translated("READ"):
            self._agent.release_xfer_handle(read.handle)

    def destroy(self) -> None:
        """End the agent. When this returns, nothing will write into its memory any more. Never raises; safe to call
        twice.
        """
        for read in self._reads:
            with contextlib.suppress(Exception):  # "still active" is the expected answer
                self._agent.release_xfer_handle(read.handle)
            read.handle = None
        self._reads.clear()
        for peer in self._peers:
            with contextlib.suppress(Exception):  # already disconnected
                self._agent.remove_remote_agent(peer)
        self._peers.clear()
        self._agent = None  # the last reference: runs the C++ destructor, without the interpreter's lock

    @staticmethod
    def _state(state: str) -> bool:
        if state not in {"DONE", "PROC"}:
            raise NixlError("NIXL READ", expected="DONE or PROC", found=state)
        return state == "DONE"


@contextlib.contextmanager
def _translated(thing: str) -> Iterator[None]:
    try:
        yield
    except NixlError:
        raise
    except Exception as error:  # its errors share no base class with anything
        raise NixlError(f"NIXL {thing}", found=f"{type(error).__name__}: {error}") from None


@contextlib.contextmanager
def _progress_delay(api: Any) -> Iterator[None]:
    """While this is open, new agents get our progress delay: the wrapper builds their configuration and hard-codes
    zero.
    """
    bindings = api.nixlBind

    class Patched:
        def __getattr__(self, name: str) -> Any:
            return getattr(bindings, name)

        @staticmethod
        def nixlAgent(name: str, configuration: Any) -> Any:  # noqa: N802 - the binding's name
            configuration.pthrDelay = PROGRESS_DELAY_US
            return bindings.nixlAgent(name, configuration)

    api.nixlBind = Patched()
    try:
        yield
    finally:
        api.nixlBind = bindings
