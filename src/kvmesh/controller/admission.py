"""Who may connect to the controller: ZMQ's questions (ZAP, ZeroMQ's RFC 27) answered, and refused handshakes logged.

Runs on the controller's loop. What strangers send never gets here: ZMQ asks after a CURVE handshake that was right so
far, and tells of the others.
"""

from __future__ import annotations

import hmac
import logging
import os
import socket
from collections import Counter
from collections.abc import Callable, Sequence

import zmq
from zmq.utils import z85

from kvmesh.controller.intake import Intake
from kvmesh.controller.log import LogLimiter, log
from kvmesh.controller.refusals import Refusals
from kvmesh.controller.sockets import Sockets
from kvmesh.wire.curve import ZAP_DOMAIN, CurveKeys, SocketEvent, parse_event

logger = logging.getLogger(__name__)

_ZAP_FRAMES = 7
"""Version, request, domain, address, routing id, mechanism, the client's public key."""


def answer_zap(frames: Sequence[bytes], keys: CurveKeys) -> list[bytes]:
    """The answer to one question: yes for the public key that the members of this cluster share, no for all else."""
    version, request = (frames[0], frames[1]) if len(frames) > 1 else (b"1.0", b"")
    is_member = (
        len(frames) == _ZAP_FRAMES
        and version == b"1.0"
        and frames[2] == ZAP_DOMAIN
        and frames[5] == b"CURVE"
        and hmac.compare_digest(frames[6], z85.decode(keys.node_public))
    )
    status, text = (b"200", b"") if is_member else (b"400", b"not a member of this cluster")
    return [version, request, status, text, b"", b""]


class Admission:
    """Answers for the sockets that ZMQ asks about, and says who was turned away."""

    def __init__(self, sockets: Sockets, clock: Callable[[], float], refusals: Refusals | None = None) -> None:
        """`refusals` is where people will look for those who were turned away."""
        self._sockets = sockets
        self._refusals = refusals or Refusals()
        self._clock = clock
        self._limiter = LogLimiter()
        self._addresses: dict[int, str] = {}
        """Peer address by descriptor, of the connections that are open."""
        self._failed: dict[str, SocketEvent] = {}
        """By socket: the handshake that has failed, until its connection's end is told, which is next."""
        self.refused: Counter[str] = Counter()
        """Refused handshakes by socket."""
        self.intakes = {name: self._intake(name, watcher) for name, watcher in sockets.watchers.items()}
        if sockets.zap is not None:
            self.intakes["zap"] = Intake(sockets.zap, self._on_question)

    def _intake(self, name: str, watcher: zmq.Socket[bytes]) -> Intake:
        return Intake(watcher, lambda frames: self._on_event(name, frames))

    def _on_question(self, frames: list[zmq.Frame]) -> None:
        zap, keys = self._sockets.zap, self._sockets.curve
        assert zap is not None
        assert keys is not None
        zap.send_multipart(answer_zap([frame.bytes for frame in frames], keys))
        self.intakes["zap"].wake()

    def _on_event(self, name: str, frames: list[zmq.Frame]) -> None:
        told = parse_event([frame.bytes for frame in frames])
        if told is None:
            return
        if told.event == zmq.EVENT_ACCEPTED:
            self._addresses[told.value] = _peer_address(told.value)
        elif told.has_failed:
            self._failed[name] = told
        elif told.event == zmq.EVENT_DISCONNECTED:
            address = self._addresses.pop(told.value, "unknown")
            failure = self._failed.pop(name, None)
            if failure is not None and failure.is_final:  # else it merely broke off, as when a port is probed
                self._refuse(name, address, failure)

    def _refuse(self, name: str, address: str, failure: SocketEvent) -> None:
        self.refused[name] += 1
        reason = self._reason(failure)
        host = address.rpartition(":")[0] or address
        self._refusals.add(host, f"It tried to connect to the {name} port, but {reason}", self._clock())
        suppressed = self._limiter.allow(f"{reason} {host}", self._clock())
        if suppressed is None:
            return
        log(
            logger,
            logging.WARNING,
            "handshake_refused",
            socket=name,
            peer=address,
            reason=reason,
            suppressed=suppressed,
        )

    def _reason(self, failure: SocketEvent) -> str:
        if self._sockets.curve is None:
            return "it has a cluster key and this controller has none" if failure.is_mismatch else "it speaks no ZMTP"
        return "it has no cluster key" if failure.is_mismatch else "its cluster key is another one"


def _peer_address(descriptor: int) -> str:
    """Where a connection comes from. ZMQ tells only its descriptor, which may be closed by now, and even belong to a
    later connection: good enough for a log line, and whoever is refused comes again.
    """
    try:
        with socket.socket(fileno=os.dup(descriptor)) as connection:
            host, port = connection.getpeername()[:2]
    except (OSError, ValueError, TypeError):
        return "unknown"
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
