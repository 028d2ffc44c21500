"""Keys of the control sockets, and what ZMQ tells about handshakes that fail.

With a cluster key the sockets between nodes and controller speak CURVE (ZMTP's encryption and authentication, as
specified in ZeroMQ's RFC 26): a key pair for the controller and one that all nodes share, both derived from the cluster
key. A node with another cluster key expects another controller, and the handshake fails on both sides.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import zmq
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from kvmesh.wire.auth import ClusterKey

ZAP_DOMAIN = b"kvmesh"


class CurveKeys(NamedTuple):
    """Both key pairs, in Z85, as ZMQ takes them."""

    controller_public: bytes
    controller_secret: bytes
    node_public: bytes
    node_secret: bytes

    @classmethod
    def derive(cls, key: ClusterKey) -> CurveKeys:
        """The pairs that belong to a cluster key; the same on every machine."""
        controller, node = z85.encode(key.derive("curve controller")), z85.encode(key.derive("curve node"))
        return cls(zmq.curve_public(controller), controller, zmq.curve_public(node), node)

    def __repr__(self) -> str:
        return "CurveKeys(***)"


def secure_controller(socket: zmq.Socket[Any], keys: CurveKeys) -> None:
    """Make a socket, not bound yet, take members of the cluster only. Its context must have a ZAP handler already."""
    socket.setsockopt(zmq.CURVE_SERVER, 1)
    socket.setsockopt(zmq.CURVE_SECRETKEY, keys.controller_secret)
    socket.setsockopt(zmq.ZAP_DOMAIN, ZAP_DOMAIN)


def secure_node(socket: zmq.Socket[Any], keys: CurveKeys) -> None:
    """Make a socket, not connected yet, talk to the cluster's controller only."""
    socket.setsockopt(zmq.CURVE_SERVERKEY, keys.controller_public)
    socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.node_public)
    socket.setsockopt(zmq.CURVE_SECRETKEY, keys.node_secret)


_FAILURES = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
_WATCHED = _FAILURES | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED


class SocketEvent(NamedTuple):
    """One event of a watched socket."""

    event: int
    value: int
    """A descriptor for ACCEPTED and DISCONNECTED, an error number for failures."""

    @property
    def has_failed(self) -> bool:
        """A handshake came to nothing."""
        return bool(self.event & _FAILURES)

    @property
    def is_mismatch(self) -> bool:
        """One side speaks CURVE and the other does not."""
        mismatch = zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH
        return self.event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL and self.value == mismatch

    @property
    def is_final(self) -> bool:
        """ZMQ will not connect again by itself (as it does after a connection that merely broke)."""
        return self.event in {zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL, zmq.EVENT_HANDSHAKE_FAILED_AUTH}


_SocketT = TypeVar("_SocketT", bound="zmq.Socket[Any]")


def watch(context: zmq.Context[_SocketT], socket: _SocketT, name: str) -> _SocketT:
    """Have a socket, not bound or connected yet, tell its events; they are read from the socket that is returned."""
    address = f"inproc://watch-{name}-{id(socket):x}"
    socket.monitor(address, _WATCHED)
    watcher = context.socket(zmq.PAIR)
    watcher.setsockopt(zmq.LINGER, 0)
    watcher.setsockopt(zmq.RCVHWM, 0)  # with a limit ZMQ's thread would wait for us to read, and at the end we for it
    watcher.connect(address)
    return watcher


def parse_event(frames: list[bytes]) -> SocketEvent | None:
    """An event as it comes from a watcher; None for what is of no interest."""
    try:
        event = parse_monitor_message(frames)
    except (RuntimeError, ValueError):
        return None
    return SocketEvent(int(event["event"]), int(event["value"]))
