"""Opening the controller's sockets, so that a port that is taken stops the start with one sentence."""

from __future__ import annotations

import errno
import socket
from dataclasses import dataclass, field

import zmq

from kvmesh.config import ControllerConfig
from kvmesh.config.values import format_host_port
from kvmesh.errors import StartupError
from kvmesh.wire.auth import ClusterKey
from kvmesh.wire.curve import CurveKeys, secure_controller, watch
from kvmesh.wire.directory import MAX_EVENT_BYTES, MAX_REQUEST_BYTES

SEND_QUEUE_FRAMES = 2_000
"""Per connection. More is under way only inside the kernel; whoever does not read gets a snapshot later."""
RECEIVE_QUEUE_FRAMES = 200
"""Per connection. Beyond it a sender has to wait, which is all that happens to it."""
PROBE_INTERVAL_MS = 15_000
"""ZMQ's own heartbeats: they free the queues of peers that have stopped or vanished without a word."""
PROBE_TIMEOUT_MS = 30_000


@dataclass(frozen=True, slots=True)
class Sockets:
    """Everything that is bound, with the ports that came about (they may have been asked for as 0)."""

    context: zmq.Context[zmq.Socket[bytes]]
    http: socket.socket
    reply: zmq.Socket[bytes]
    heartbeat: zmq.Socket[bytes] | None
    pull: zmq.Socket[bytes]
    address: str
    http_port: int
    reply_port: int
    heartbeat_port: int | None
    pull_port: int
    curve: CurveKeys | None = None
    """None without a cluster key: everybody who can connect is let in."""
    zap: zmq.Socket[bytes] | None = None
    """Where ZMQ asks whether a client is to be let in; with a cluster key only."""
    watchers: dict[str, zmq.Socket[bytes]] = field(default_factory=dict)
    """Where ZMQ tells of handshakes, by socket."""

    def close(self) -> None:
        """Close all at once; what was not sent yet is dropped."""
        self.http.close()
        self.context.destroy(linger=0)


def open_sockets(config: ControllerConfig) -> Sockets:
    """Bind HTTP and ZMQ sockets.

    Raises:
        StartupError: the host is not an address of this machine, or a port is taken; names port and flag.
    """
    address = _address(config.host)
    http = _bind_http(config, address)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    watchers: dict[str, zmq.Socket[bytes]] = {}
    try:
        curve = None if config.cluster_key is None else CurveKeys.derive(_key(config))
        zap = None if curve is None else _bind_zap(context)  # first: without it ZMQ would let everybody in

        def make(kind: int, name: str, max_bytes: int) -> zmq.Socket[bytes]:
            made = _make(context, kind, address, max_bytes)
            if curve is not None:
                secure_controller(made, curve)
            watchers[name] = watch(context, made, name)
            return made

        pull = make(zmq.PULL, "pull", MAX_EVENT_BYTES)
        reply = make(zmq.ROUTER, "reply", MAX_REQUEST_BYTES)
        pull_port = _bind(pull, config.host, address, config.pull_port, "pull")
        reply_port = _bind(reply, config.host, address, config.reply_port, "reply")
        heartbeat, heartbeat_port = None, None
        if config.heartbeat_port is not None:
            heartbeat = make(zmq.ROUTER, "heartbeat", MAX_REQUEST_BYTES)
            heartbeat_port = _bind(heartbeat, config.host, address, config.heartbeat_port, "heartbeat")
    except BaseException:
        http.close()
        context.destroy(linger=0)
        raise
    return Sockets(
        context=context,
        http=http,
        reply=reply,
        heartbeat=heartbeat,
        pull=pull,
        address=address,
        http_port=int(http.getsockname()[1]),
        reply_port=reply_port,
        heartbeat_port=heartbeat_port,
        pull_port=pull_port,
        curve=curve,
        zap=zap,
        watchers=watchers,
    )


def _key(config: ControllerConfig) -> ClusterKey:
    assert config.cluster_key is not None
    return ClusterKey(config.cluster_key.get_secret_value())


def _bind_zap(context: zmq.Context[zmq.Socket[bytes]]) -> zmq.Socket[bytes]:
    zap = context.socket(zmq.REP)
    zap.setsockopt(zmq.LINGER, 0)
    zap.bind("inproc://zeromq.zap.01")
    return zap


def _address(host: str) -> str:
    """The address to bind; IPv4 first, because ZMQ's clients resolve names that way."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise StartupError(
            f"host {host!r} (--host)", "a name or address of this machine", str(error), "give another --host"
        ) from None
    found.sort(key=lambda entry: entry[0] != socket.AF_INET)
    return str(found[0][4][0])


def _bind_http(config: ControllerConfig, address: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    # With the protocol's number: asyncio looks for it before it turns Nagle's algorithm off, without which each answer
    # on a kept connection would wait 40 ms for an acknowledgement.
    http = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        http.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        http.bind((address, config.port))
        http.listen(128)  # only now is the port surely ours
    except OSError as error:
        http.close()
        raise _cannot_bind(config.host, config.port, "--port", error.errno) from None
    http.setblocking(False)
    return http


def _make(context: zmq.Context[zmq.Socket[bytes]], kind: int, address: str, max_bytes: int) -> zmq.Socket[bytes]:
    made = context.socket(kind)
    made.setsockopt(zmq.LINGER, 0)
    made.setsockopt(zmq.MAXMSGSIZE, max_bytes)
    made.setsockopt(zmq.RCVHWM, RECEIVE_QUEUE_FRAMES)
    made.setsockopt(zmq.SNDHWM, SEND_QUEUE_FRAMES)
    made.setsockopt(zmq.HEARTBEAT_IVL, PROBE_INTERVAL_MS)
    made.setsockopt(zmq.HEARTBEAT_TIMEOUT, PROBE_TIMEOUT_MS)
    if ":" in address:
        made.setsockopt(zmq.IPV6, 1)
    if kind == zmq.ROUTER:
        made.setsockopt(zmq.ROUTER_MANDATORY, 1)
    return made


def _bind(made: zmq.Socket[bytes], host: str, address: str, port: int, name: str) -> int:
    try:
        made.bind(f"tcp://{format_host_port(address, port)}")
    except zmq.ZMQError as error:
        raise _cannot_bind(host, port, f'--monitor-ports "{name}"', error.errno) from None
    return int(made.get_string(zmq.LAST_ENDPOINT).rstrip("\0").rpartition(":")[2])


def _cannot_bind(host: str, port: int, flag: str, number: int | None) -> StartupError:
    thing = f"{format_host_port(host, port)} ({flag})"
    if number == errno.EADDRINUSE:
        hint = f"stop the program that has it (ss -ltnp 'sport = :{port}' names it), or set {flag} to another port"
        return StartupError(thing, "a free port", "the port is in use", hint)
    if number == errno.EADDRNOTAVAIL:
        return StartupError(thing, "an address of this machine", "none of its interfaces has it", "set --host to one")
    if number == errno.EACCES:
        return StartupError(thing, "a port that this user may bind", "permission denied", f"set {flag} above 1023")
    return StartupError(thing, "an address that can be bound", errno.errorcode.get(number or 0, str(number)))
