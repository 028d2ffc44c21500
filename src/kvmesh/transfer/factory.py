"""Which transport a node offers, and which one it uses towards a peer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from kvmesh.errors import StartupError
from kvmesh.transfer.base import PeerTransport
from kvmesh.transfer.coding import Coding
from kvmesh.transfer.fallback import FallbackTransport
from kvmesh.transfer.link import PeerTarget
from kvmesh.transfer.nixl_agent import prepare_environment, unavailable
from kvmesh.transfer.pool import HostPool
from kvmesh.transfer.security import OPEN, PeerSecurity
from kvmesh.transfer.shm import ShmTransport
from kvmesh.transfer.shm_holder import why_not_shared
from kvmesh.transfer.tcp import CONNECTIONS_PER_FETCH, TcpTransport
from kvmesh.wire.peer import Hello

_RDMA_DEVICES = Path("/sys/class/infiniband")


def has_rdma(devices: Path = _RDMA_DEVICES) -> bool:
    """Whether this host has an RDMA device, whatever its link is doing."""
    try:
        return any(devices.iterdir())
    except OSError:
        return False


def offered(channel: str, *, rdma: bool | None = None) -> tuple[str, ...]:
    """The transports that a node serves, for its Hello and for the directory. tcp always, so that any two nodes have
    one.

    Args:
        channel: `transfer_channel` of the configuration: auto, tcp, shm or nixl.
        rdma: whether there is an RDMA device; looked up when None.

    Raises StartupError when nixl was asked for by name and cannot be had.
    """
    if channel == "tcp":
        return ("tcp",)
    if channel == "shm":
        return ("shm", "tcp")
    if channel == "nixl":
        if problem := unavailable():
            raise StartupError("transfer_channel nixl", expected="NIXL", found=problem)
        return ("nixl", "tcp")
    has_device = has_rdma() if rdma is None else rdma
    return ("shm", "nixl", "tcp") if has_device and unavailable() is None else ("shm", "tcp")


class Choice(NamedTuple):
    """The transport towards one peer, and why."""

    name: str
    reason: str


def choose_name(
    channel: str,
    ours: Sequence[str],
    theirs: Sequence[str],
    *,
    why_not_shared: Callable[[], str | None],
    rdma: bool | None = None,
) -> Choice:
    """Pick a transport that both sides offer. What cannot be had is replaced by tcp, and the reason says so.

    Args:
        channel: `transfer_channel` of the configuration: auto, tcp, shm or nixl.
        ours: what this node offers (see `offered`).
        theirs: what the peer offers.
        why_not_shared: says why memory cannot be shared with the peer; None when it can. Asked only where it matters.
        rdma: whether there is an RDMA device; looked up when None.
    """
    if channel == "tcp":
        return Choice("tcp", "transfer_channel is tcp")
    if channel in {"auto", "shm"}:
        problem = why_not_shared() if "shm" in ours and "shm" in theirs else "the peer does not offer shm"
        if problem is None:
            return Choice("shm", "the peer is on this host and runs as our user")
        if channel == "shm":
            return Choice("tcp", problem)
    if "nixl" not in theirs:
        return Choice("tcp", "the peer does not offer nixl")
    if "nixl" not in ours:
        return Choice("tcp", "nixl is not available here")
    if channel == "nixl":
        return Choice("nixl", "transfer_channel is nixl")
    if has_rdma() if rdma is None else rdma:
        return Choice("nixl", "both sides offer nixl and there is an RDMA device")
    return Choice("tcp", "no RDMA device, and without one tcp costs less than nixl")


class Chosen(NamedTuple):
    """A transport, connected nowhere yet, and one line for the log."""

    transport: PeerTransport
    reason: str


def choose(
    channel: str,
    target: PeerTarget,
    ours: Hello,
    pool: HostPool,
    *,
    host: str,
    verify: bool = True,
    connections: int = CONNECTIONS_PER_FETCH,
    nixl_backends: Sequence[str] = ("UCX",),
    security: PeerSecurity = OPEN,
    coding: Coding | None = None,
    rdma: bool | None = None,
) -> Chosen:
    """The transport to use towards `target`.

    `host` is this node's own address: on loopback, UCX is confined to it. Other arguments as in `choose_name` and the
    transports themselves.
    """
    choice = choose_name(
        channel,
        ours.transports,
        target.transports,
        why_not_shared=lambda: why_not_shared(target.port, target.incarnation),
        rdma=rdma,
    )
    tcp = TcpTransport(target, ours, pool, connections=connections, verify=verify, security=security, coding=coding)
    if choice.name == "tcp":
        return Chosen(tcp, choice.reason)
    better: PeerTransport
    if choice.name == "shm":
        better = ShmTransport(target, ours, pool, threads=connections, verify=verify, security=security)
    else:
        # NIXL takes half a second and 50 MB to load, and most nodes do without it.
        from kvmesh.transfer.nixl import NixlTransport  # noqa: PLC0415

        prepare_environment(host)
        better = NixlTransport(target, ours, pool, backends=nixl_backends, verify=verify, security=security)
    return Chosen(FallbackTransport(better, tcp, str(target)), choice.reason)
