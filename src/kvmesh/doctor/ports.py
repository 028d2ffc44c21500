"""The ports of this instance: free, taken by this very instance, or by somebody else, who is named."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
from collections.abc import Iterator

import psutil

from kvmesh.config import KVMeshConfig
from kvmesh.config.model import PORT_KEYS
from kvmesh.config.values import format_host_port
from kvmesh.doctor.findings import INSTANCE, Finding, ok, problem, skipped
from kvmesh.doctor.situation import Situation

_NODE = re.compile(r"\bkvmesh(\.node\b|(\.cli)? node\b)")
"""Stands in the command line of every node: an engine's, and `kvmesh node`."""


def check(situation: Situation) -> Iterator[Finding]:
    """Every fixed port of the configuration, for each data-parallel rank that has one listed."""
    config = situation.config
    if config is None or not config.share:
        yield skipped("port.free", INSTANCE, "no configuration of an instance that shares, so no ports to look at")
        return
    for key, number in _fixed_ports(config):
        yield port(key, config.host, number, is_member=situation.running is not None)


def port(key: str, host: str, number: int, *, is_member: bool) -> Finding:
    """One port. `is_member`: this instance runs already, so that its node is who should have it."""
    name, about = f"port.{key}", f"{key} {format_host_port(host, number)}"
    error = bind_error(host, number)
    if error is None:
        return ok(name, about, "free")
    if error == errno.EACCES:
        return problem(name, about, "this user may not bind it", f"choose a {key} above 1023")
    if error == errno.EADDRNOTAVAIL:
        return problem(name, about, "no interface of this machine has this address", "set host to one that is here")
    if error != errno.EADDRINUSE:
        return problem(name, about, f"cannot be bound: {os.strerror(error)}", f"choose another host or {key}")
    owner = owner_of(number)
    is_node = owner is not None and _NODE.search(owner) is not None
    if is_member and (owner is None or is_node):
        return ok(name, about, "in use by this instance, which runs")
    if is_node:
        advice = f"choose another {key}, or end that instance"
        return problem(name, about, f"taken by another kvmesh node: {owner}", advice)
    taken = f"taken by {owner}" if owner else "taken by a process that this user cannot see"
    return problem(name, about, taken, f"choose another {key}, or end that process")


def bind_error(host: str, number: int) -> int | None:
    """The error number of binding a TCP port for a moment; None when that works."""
    try:
        found = socket.getaddrinfo(host, number, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError:
        return errno.EADDRNOTAVAIL
    family, kind, protocol, _, address = found[0]
    with socket.socket(family, kind, protocol) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as nodes do: connections of the last life are fine
        try:
            sock.bind(address)
            sock.listen(1)
        except OSError as error:
            return error.errno or errno.EINVAL
    return None


def owner_of(number: int) -> str | None:
    """Process id and command line of who listens there; None when it cannot be seen."""
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            if connection.status != psutil.CONN_LISTEN or not connection.laddr or not connection.pid:
                continue
            if connection.laddr.port != number:
                continue
            return f"pid {connection.pid}: {' '.join(psutil.Process(connection.pid).cmdline())[:120]}"
    return None


def _fixed_ports(config: KVMeshConfig) -> Iterator[tuple[str, int]]:
    for key in PORT_KEYS:
        listed = config.port_lists.get(key)
        if listed is not None:
            yield from ((key, number) for number in listed if number)
            continue
        number = getattr(config, key)
        if number:
            yield key, number
