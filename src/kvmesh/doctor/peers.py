"""A connection to every member's peer port from here, greeted and authenticated as a node does it, and one Ping.

Every member is asked as if by an instance of its own format, so that what differs between formats (`formats`) does not
hide what is wrong with addresses, ports, keys and processes.
"""

from __future__ import annotations

import secrets
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import msgspec

from kvmesh.client import Instance
from kvmesh.config.values import is_loopback, parse_host_port
from kvmesh.core.format import Format
from kvmesh.doctor.findings import Finding, ok, problem, skipped, warning
from kvmesh.doctor.situation import Situation
from kvmesh.doctor.wait import connect_error
from kvmesh.errors import (
    FormatMismatch,
    KVMeshError,
    PeerAuthenticationError,
    PeerConnectError,
    PeerError,
    PeerRefusedError,
    PeerTimeoutError,
    StartupError,
)
from kvmesh.transfer.base import Deadline
from kvmesh.transfer.link import PeerLink, PeerTarget
from kvmesh.transfer.security import PeerSecurity
from kvmesh.transfer.tls import Tls
from kvmesh.units import listed
from kvmesh.wire.peer import Hello

MAX_ASKED = 256
"""Members that are connected to; of a larger cluster, those that were heard of least recently."""
THREADS = 32


def check(situation: Situation) -> Iterator[Finding]:
    """One finding for each member."""
    if situation.cluster is None:
        return
    members = situation.cluster.members.instances
    yield from shared_addresses(members)
    try:
        security = _security(situation)
    except StartupError as error:
        yield problem("peer.tls", error.thing, str(error), "mend the TLS files of the configuration")
        return
    asked = sorted(members, key=lambda member: -member.last_contact_age_s)[:MAX_ASKED]
    with ThreadPoolExecutor(THREADS, thread_name_prefix="ask-peer") as threads:
        yield from threads.map(lambda member: ask(member, security, situation), asked)
    if len(asked) < len(members):
        yield skipped("peer.reachable", f"{len(members) - len(asked)} further members", "not connected to")


def shared_addresses(members: Iterable[Instance]) -> Iterator[Finding]:
    """Members that advertise one address: at most one of them can be there."""
    by_address: defaultdict[str, list[str]] = defaultdict(list)
    for member in members:
        by_address[member.peer_address].append(member.instance_id)
    for address, ids in by_address.items():
        if len(ids) < 2:
            continue
        loopback = is_loopback(address.rpartition(":")[0].strip("[]"))
        advice = "set advertise_host (p2p_host) to each machine's own address" if loopback else "mend advertise_host"
        message = f"all of them advertise {address}: at most one of them can be reached there"
        yield problem("address.shared", listed(ids), message, advice)


def ask(member: Instance, security: PeerSecurity, situation: Situation) -> Finding:
    """Connect, greet, prove the key, and wait for one Pong."""
    about = f"{member.instance_id} at {member.peer_address}"
    try:
        kv_format = msgspec.convert(member.format.fields, Format)
        host, port = _host_port(member.peer_address)
    except (msgspec.ValidationError, ValueError) as error:
        return skipped("peer.reachable", about, f"not connected to: this version does not understand it ({error})")
    if (blocked := connect_error(host, port, situation.timeout_s)) is not None:
        return unreachable(member, blocked)
    hello = Hello.of(f"doctor-{secrets.token_hex(3)}", secrets.token_hex(8), kv_format)
    target = PeerTarget(member.instance_id, member.incarnation, host, port)
    deadline = Deadline(time.monotonic() + situation.timeout_s, situation.timeout_s)
    started_s = time.monotonic()
    try:
        link = PeerLink.dial(target, hello, deadline, security)
    except (PeerError, FormatMismatch) as error:
        return failed(member, error, situation)
    try:
        link.ping(deadline)
    except PeerError as error:
        return failed(member, error, situation)
    finally:
        link.close()
    return ok("peer.reachable", about, f"answers from here in {(time.monotonic() - started_s) * 1000:.0f} ms")


def unreachable(member: Instance, error: str) -> Finding:
    """No connection at all. `error`: what the network says."""
    about = f"{member.instance_id} at {member.peer_address}"
    if _is_loopback(member):
        return _loopback(member, f"on this machine, nothing is there ({error})")
    return problem(
        "peer.unreachable",
        about,
        f"no connection from here: {error}",
        f"let every member reach {member.peer_address} (firewall, security group, routes), and look whether its node "
        "runs",
    )


def failed(member: Instance, error: KVMeshError, situation: Situation) -> Finding:
    """A connection came about, and then this."""
    about = f"{member.instance_id} at {member.peer_address}"
    if isinstance(error, PeerAuthenticationError):
        return _unauthenticated(about, error, situation)
    if isinstance(error, PeerRefusedError):
        return warning("peer.refused", about, f"it refuses: {error.found}", "is it draining, or full of connections?")
    if isinstance(error, PeerTimeoutError):
        return problem(
            "peer.stopped",
            about,
            f"it takes connections and does not answer for {situation.timeout_s:g} s: its node is stopped or hangs",
            "look at that process (state T: SIGCONT), or restart its engine",
        )
    if isinstance(error, PeerConnectError):  # the port answered a moment ago, so this is about who is there
        if _is_loopback(member):
            return _loopback(member, "on this machine, another node is there")
        return problem(
            "address.wrong", about, f"another node is there: {error.found}", "mend its advertise_host or peer_port"
        )
    advice = "is this a kvmesh node of this version, with the same TLS settings as here?"
    return problem("peer.protocol", about, str(error), advice)


def _loopback(member: Instance, found: str) -> Finding:
    host = _host(member)
    return problem(
        "address.loopback",
        f"{member.instance_id} at {member.peer_address}",
        f"it advertises {host}, which every machine takes for itself, and {found}: instances on other machines cannot "
        "fetch from it",
        "set advertise_host (p2p_host) there to that machine's address as the others know it",
    )


def _host(member: Instance) -> str:
    return member.peer_address.rpartition(":")[0].strip("[]")


def _is_loopback(member: Instance) -> bool:
    return is_loopback(_host(member))


def _unauthenticated(about: str, error: KVMeshError, situation: Situation) -> Finding:
    if situation.config is None and situation.cluster_key is None:
        return skipped(
            "peer.key", about, "reachable, but it wants a cluster key", "give --cluster-key-file or KVMESH_CLUSTER_KEY"
        )
    who = "this instance" if situation.config is not None else "this command"
    return problem(
        "peer.key",
        about,
        f"it and {who} do not take each other for members of one cluster: wrong cluster key, or certificate "
        f"({error.found})",
        "copy one key file (cluster_key_file) to all instances and to the controller",
    )


def _security(situation: Situation) -> PeerSecurity:
    """What this instance would show to its peers. Raises StartupError."""
    tls = None if situation.config is None or situation.config.tls is None else Tls.load(situation.config.tls)
    return PeerSecurity(None if situation.cluster_key is None else situation.cluster_key.peer_key(), tls)


def _host_port(address: str) -> tuple[str, int]:
    """As `Member.peer_address` writes it: an IPv6 address stands without brackets there. Raises ValueError."""
    host, _, port = address.rpartition(":")
    if ":" in host and not host.startswith("["):
        return host, int(port)
    return parse_host_port(address)
