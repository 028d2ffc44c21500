"""What this instance tells its peers to connect to, and whether they can."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Collection, Iterator

import psutil

from kvmesh.config.values import is_loopback, is_wildcard
from kvmesh.doctor.findings import INSTANCE, Finding, ok, problem, skipped, warning
from kvmesh.doctor.situation import Cluster, Situation
from kvmesh.doctor.wait import resolve

CHECK = "address.advertised"


def check(situation: Situation) -> Iterator[Finding]:
    """The advertised address of this instance."""
    config = situation.config
    if config is None or not config.share:
        yield skipped(CHECK, INSTANCE, "no configuration of an instance that shares, so no address to look at")
        return
    resolved = resolve(config.advertise_host, situation.timeout_s)
    if resolved is None:
        yield problem(
            CHECK,
            config.advertise_host,
            "this name means no address here, and so probably nowhere else",
            "set advertise_host to an address, or mend the name service",
        )
        return
    others = [] if situation.cluster is None else other_hosts(situation.cluster, config.instance_id)
    yield advertised(config.advertise_host, resolved, local_addresses(), others)


def advertised(host: str, resolved: Collection[str], local: Collection[str], others: Collection[str]) -> Finding:
    """Judge one advertised address.

    Args:
        host: as it is written.
        resolved: the addresses that it means here.
        local: the addresses of this machine's interfaces.
        others: hosts that other members advertise and that are not loopback.
    """
    if any(is_loopback(address) for address in resolved):
        if others:
            return problem(
                CHECK,
                host,
                f"only this machine can reach {host}, and members advertise addresses of other machines "
                f"({', '.join(sorted(others)[:3])}): they cannot fetch from this one",
                "set advertise_host (p2p_host) to this machine's address as the others know it",
            )
        message = f"{host} can be reached from this machine only: fine as long as all instances run here"
        return ok(CHECK, host, message)
    if not set(resolved) & set(local):
        return warning(
            CHECK,
            host,
            f"no interface of this machine has {', '.join(sorted(resolved))}",
            "fine if something forwards it to this machine (a container's host, NAT); else set advertise_host",
        )
    return ok(CHECK, host, "an address of this machine that is not loopback")


def other_hosts(cluster: Cluster, instance_id: str | None) -> set[str]:
    """Hosts that other members advertise, without loopback."""
    hosts = {
        member.peer_address.rpartition(":")[0].strip("[]")
        for member in cluster.members.instances
        if member.instance_id != instance_id
    }
    return {host for host in hosts if not is_loopback(host) and not is_wildcard(host)}


def local_addresses() -> set[str]:
    """All addresses of this machine's interfaces, without zone."""
    found = set()
    for listed in psutil.net_if_addrs().values():
        for one in listed:
            if one.family in {socket.AF_INET, socket.AF_INET6}:
                found.add(str(ipaddress.ip_address(one.address.partition("%")[0])))
    return found
