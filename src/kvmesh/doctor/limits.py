"""Limits of this machine and of this process, against the size of the host pool."""

from __future__ import annotations

import inspect
import resource
from collections.abc import Iterator
from pathlib import Path

import psutil

from kvmesh.doctor.findings import INSTANCE, MACHINE, Finding, ok, problem, skipped, warning
from kvmesh.doctor.situation import Situation
from kvmesh.node.peer_server import PeerServer
from kvmesh.node.peers import MAX_WARM_PEERS
from kvmesh.transfer.factory import has_rdma
from kvmesh.units import size

MAX_CONNECTIONS = int(inspect.signature(PeerServer).parameters["max_connections"].default)
"""That a node accepts, as the server itself has it."""
SPARE_DESCRIPTORS = 256
"""For the engine link, the directory, files and libraries."""
ROOM = 0.9
"""A pool that takes more of a memory limit leaves too little for the engine itself."""
UNLIMITED = 1 << 60
"""cgroup v1 writes a number near 2**63 for no limit."""


def check(situation: Situation) -> Iterator[Finding]:
    """Descriptors, locked memory, cgroup and host memory."""
    config, pool_bytes = situation.config, situation.pool_bytes
    connections = 2 if config is None else config.fetch_connections
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield descriptors(soft, connections)
    if config is None or not pool_bytes:
        yield skipped("limit.memory", INSTANCE, "no configuration, so the size of the pool is not known")
        return
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    uses_rdma = config.transfer_channel in {"auto", "nixl"} and has_rdma(situation.root / "sys/class/infiniband")
    yield locked_memory(locked, pool_bytes, uses_rdma=uses_rdma)
    yield cgroup_memory(cgroup_limit_bytes(situation.root), pool_bytes)
    memory = psutil.virtual_memory()
    yield host_memory(memory.total, memory.available, pool_bytes, is_running=situation.running is not None)


def descriptors(soft_limit: int, connections_per_peer: int) -> Finding:
    """Enough open files for a node with as many peers as it keeps connections to."""
    needed = MAX_CONNECTIONS + MAX_WARM_PEERS * connections_per_peer + SPARE_DESCRIPTORS
    if soft_limit in {resource.RLIM_INFINITY, -1} or soft_limit >= needed:
        limit = "any number of" if soft_limit in {resource.RLIM_INFINITY, -1} else str(soft_limit)
        return ok("limit.descriptors", MACHINE, f"{limit} descriptors; a node in a large cluster needs about {needed}")
    return warning(
        "limit.descriptors",
        MACHINE,
        f"{soft_limit} descriptors; a node with {MAX_WARM_PEERS} peers and more needs about {needed}, and refuses "
        "connections when it has none left",
        f"ulimit -n {max(4096, needed)}, LimitNOFILE= in the unit, or --ulimit nofile= of the container",
    )


def locked_memory(soft_limit_bytes: int, pool_bytes: int, *, uses_rdma: bool) -> Finding:
    """RDMA pins the whole pool; plain TCP pins nothing."""
    name = "limit.memlock"
    if not uses_rdma:
        return ok(name, MACHINE, "no transfer by RDMA here, so nothing has to be locked in memory")
    if soft_limit_bytes in {resource.RLIM_INFINITY, -1} or soft_limit_bytes >= pool_bytes:
        return ok(name, MACHINE, f"enough locked memory for a pool of {size(pool_bytes)}")
    return problem(
        name,
        MACHINE,
        f"{size(soft_limit_bytes)} may be locked in memory, and RDMA locks the pool of {size(pool_bytes)}: "
        "its registration will fail",
        "ulimit -l unlimited, LimitMEMLOCK=infinity, or --ulimit memlock=-1 of the container",
    )


def cgroup_memory(limit_bytes: int | None, pool_bytes: int) -> Finding:
    """The container's or unit's memory limit; the pool counts against it, also in /dev/shm."""
    name = "limit.cgroup"
    if limit_bytes is None:
        return ok(name, MACHINE, "no memory limit of a container or unit")
    told = f"the container or unit may use {size(limit_bytes)}, the pool takes {size(pool_bytes)}"
    if pool_bytes > limit_bytes:
        advice = "raise the limit, or make pool_size_gb (max_local_cpu_size) smaller"
        return problem(name, MACHINE, f"{told}: the engine will be killed when the pool fills", advice)
    if pool_bytes > ROOM * limit_bytes:
        advice = "leave memory for weights, runtime and the node, or make the pool smaller"
        return warning(name, MACHINE, f"{told}: little is left for the engine itself", advice)
    return ok(name, MACHINE, told)


def host_memory(total_bytes: int, available_bytes: int, pool_bytes: int, *, is_running: bool) -> Finding:
    """The machine's memory. Of a running instance the pool is taken already."""
    name = "limit.memory"
    told = f"the machine has {size(total_bytes)}, {size(available_bytes)} available; the pool takes {size(pool_bytes)}"
    if pool_bytes > total_bytes:
        return problem(name, MACHINE, told, "make pool_size_gb (max_local_cpu_size) smaller")
    if not is_running and pool_bytes > available_bytes:
        return warning(name, MACHINE, told, "end what uses the memory, or make the pool smaller")
    return ok(name, MACHINE, told)


def cgroup_limit_bytes(root: Path) -> int | None:
    """The smallest memory limit of the cgroups that this process is in (v1 or v2); None without any."""
    limits = []
    for path in _limit_files(root):
        try:
            text = path.read_text().strip()
        except OSError:
            continue
        if text.isdigit() and int(text) < UNLIMITED:
            limits.append(int(text))
    return min(limits, default=None)


def _limit_files(root: Path) -> Iterator[Path]:
    """Those of our own group and of all above it."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "memory" not in controllers.split(","):
            continue
        mounted = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        file = "memory.limit_in_bytes" if controllers else "memory.max"
        group = mounted / path.strip("/")
        yield from (folder / file for folder in (group, *group.parents) if folder.is_relative_to(mounted))
