"""The controller's control sockets, as this instance would connect to them, and the cluster key.

A real connection is made with the key of the configuration, exactly as a node makes it, and given up as soon as the
handshake is through: the controller sees a connection and no message.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from enum import Enum, auto

import zmq

from kvmesh.config.values import parse_host_port
from kvmesh.doctor.findings import CONTROLLER, INSTANCE, Finding, ok, problem, skipped, warning
from kvmesh.doctor.situation import Cluster, Situation
from kvmesh.doctor.wait import connect_error
from kvmesh.units import age
from kvmesh.wire.auth import ClusterKey
from kvmesh.wire.curve import CurveKeys, parse_event, secure_node, watch

SOCKETS = {"controller_pull_url": zmq.PUSH, "controller_reply_url": zmq.DEALER, "controller_heartbeat_url": zmq.DEALER}
"""What a node connects to each URL: a socket of another type gets no handshake."""

MECHANISM_START, MECHANISM_END = 12, 32
"""In the greeting, after signature and version."""


class Handshake(Enum):
    """How a connection to a control socket ended."""

    MADE = auto()
    KEY_MISSING_THERE = auto()
    """We have a key and the controller has none."""
    KEY_MISSING_HERE = auto()
    """We have none and the controller ends the handshake; most likely it wants one."""
    REFUSED = auto()
    """Both have a key, and not the same one; or whoever listens there speaks something else."""
    SILENT = auto()
    """Connected, and then nothing in time."""


def check(situation: Situation) -> Iterator[Finding]:
    """Every control socket that the configuration names; and who was turned away, as the controller counts it."""
    config = situation.config
    if config is None or config.directory != "controller":
        yield skipped("key.controller", INSTANCE, "no configuration that names a controller's control sockets")
    else:
        for name, kind in SOCKETS.items():
            url = getattr(config, name)
            for one in () if url is None else url.split(","):
                yield socket_finding(name, one, kind, situation)
    if situation.cluster is not None:
        yield from turned_away(situation.cluster)


def turned_away(cluster: Cluster) -> Iterator[Finding]:
    """Who tried to become a member in the last minutes and may not; else, how many since the controller's start."""
    for refusal in cluster.refusals:
        often = f"{refusal.times} times" if refusal.times > 1 else "once"
        yield problem(
            "key.refused" if "key" in refusal.reason else "member.refused",
            refusal.who,
            f"the controller turned it away ({often}, {age(refusal.age_s)}): {refusal.reason}",
            "run `kvmesh doctor --config` there; it needs the cluster's key file and an instance id of its own",
        )
    if cluster.refused_handshakes and not cluster.refusals:
        yield warning(
            "key.refused",
            CONTROLLER,
            f"{cluster.refused_handshakes} connections without the right cluster key were turned away since its start, "
            "none in the last minutes",
            "event=handshake_refused in the controller's log names their addresses",
        )


def socket_finding(name: str, url: str, kind: int, situation: Situation) -> Finding:
    """One control socket: reachable, and with our key."""
    host, port = parse_host_port(url.removeprefix("tcp://"))
    error = connect_error(host, port, situation.timeout_s)
    about = f"{name} {host}:{port}"
    if error is not None:
        advice = f"start the controller there, open the port, or mend {name}"
        return problem("key.socket", about, f"no connection: {error}", advice)
    key = situation.cluster_key
    return handshake_finding(about, shake_hands(url, kind, key, situation.timeout_s), has_key=key is not None)


def handshake_finding(about: str, result: Handshake, *, has_key: bool) -> Finding:
    """What one handshake means."""
    check_name = "key.controller"
    if result is Handshake.MADE:
        with_what = "with this instance's cluster key" if has_key else "without a cluster key, as this instance"
        return ok(check_name, about, f"the controller takes connections {with_what}")
    if result is Handshake.KEY_MISSING_THERE:
        message = "this instance has a cluster key and the controller has none: it will not become a member"
        return problem(check_name, about, message, "give the controller --cluster-key-file with the same key")
    if result is Handshake.KEY_MISSING_HERE:
        message = (
            "the controller ends the handshake: most likely it wants a cluster key, and this instance has none; or "
            "this is none of its --monitor-ports"
        )
        return problem(check_name, about, message, "set cluster_key_file or KVMESH_CLUSTER_KEY here")
    if result is Handshake.REFUSED:
        message = "the controller ends the handshake: wrong cluster key here, or this is none of its --monitor-ports"
        advice = "copy the controller's key file here, and compare the port with its --monitor-ports"
        return problem(check_name, about, message, advice)
    message = "something listens there and says nothing: no kvmesh controller, or a stopped one"
    return problem(check_name, about, message, "compare the port with the controller's --monitor-ports")


def shake_hands(url: str, kind: int, key: ClusterKey | None, timeout_s: float) -> Handshake:
    """Make a connection of a socket of this kind, as a node does, and tell how its handshake came out."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        node = context.socket(kind)
        node.setsockopt(zmq.LINGER, 0)
        if key is not None:
            secure_node(node, CurveKeys.derive(key))
        watcher = watch(context, node, "doctor")
        node.connect(url)
        result = _follow(watcher, time.monotonic() + timeout_s, has_key=key is not None)
    finally:
        context.destroy(linger=0)
    if result is Handshake.REFUSED and speaks_without_key(url, timeout_s):
        # It hung up before ZMQ could read what it speaks.
        return Handshake.KEY_MISSING_THERE
    return result


def speaks_without_key(url: str, timeout_s: float) -> bool:
    """Whether a ZMQ socket answers a greeting without security (ZMTP 3.0) with one without security."""
    host, port = parse_host_port(url.removeprefix("tcp://"))
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
    theirs = b""
    try:
        with socket.create_connection((host, port), timeout_s) as connection:
            connection.sendall(greeting)
            while len(theirs) < MECHANISM_END and (piece := connection.recv(MECHANISM_END - len(theirs))):
                theirs += piece
    except OSError:
        return False
    return theirs[MECHANISM_START:MECHANISM_END].rstrip(b"\0") == b"NULL"


def _follow(watcher: zmq.Socket[bytes], until_s: float, *, has_key: bool) -> Handshake:
    refused = Handshake.REFUSED if has_key else Handshake.KEY_MISSING_HERE
    has_failed = False
    while (left_s := until_s - time.monotonic()) > 0:
        if not watcher.poll(int(left_s * 1000) + 1):
            break
        told = parse_event(watcher.recv_multipart())
        if told is None:
            continue
        if told.event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            return Handshake.MADE
        if told.is_mismatch:
            return Handshake.KEY_MISSING_THERE if has_key else Handshake.KEY_MISSING_HERE
        if told.has_failed:
            if told.is_final or has_failed:
                return refused
            has_failed = True  # one may break off because the controller is just ending
    return refused if has_failed else Handshake.SILENT
