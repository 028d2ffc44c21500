"""Why the controller does not take a node's connections: said once and loudly, and tried again.

ZMQ tells of handshakes that fail, not why the other side ended them. After some failures (libzmq 4.3: all that are a
fault of the protocol) it does not connect again by itself, so that a node would stay out for ever, also when its
controller is given the right key later; after others it tries ten times a second.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Coroutine

import zmq
import zmq.asyncio

from kvmesh.wire.curve import SocketEvent, parse_event, watch

log = logging.getLogger("kvmesh.directory")

PAUSE_S = 1.0
"""Between two tries when the controller turns us away."""
_CHANCES = 2
"""One handshake may break off because the controller is just ending."""


class Handshakes:
    """Watches the sockets of one node. Lives on the node's event loop."""

    def __init__(self, context: zmq.asyncio.Context, *, has_key: bool) -> None:
        self._context = context
        self._has_key = has_key
        self._watched: list[tuple[zmq.asyncio.Socket, zmq.asyncio.Socket, str]] = []
        self._said: set[str] = set()

    def watch(self, socket: zmq.asyncio.Socket, url: str) -> None:
        """Watch a socket that is about to be connected to `url`."""
        self._watched.append((socket, watch(self._context, socket, "node"), url))

    def tasks(self) -> list[Coroutine[None, None, None]]:
        """To be run as long as the sockets are."""
        return [self._follow(*watched) for watched in self._watched]

    async def _follow(self, socket: zmq.asyncio.Socket, watcher: zmq.asyncio.Socket, url: str) -> None:
        failures = 0
        while True:
            told = parse_event(await watcher.recv_multipart())
            if told is None:
                continue
            if told.event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                failures = 0
                self._said.clear()
            if not told.has_failed:
                continue
            failures += 1
            if told.is_final or failures >= _CHANCES:
                self._complain(told, url)
                with contextlib.suppress(zmq.ZMQError):  # ZMQ has given it up already
                    socket.disconnect(url)
                await asyncio.sleep(PAUSE_S)
                socket.connect(url)

    def _complain(self, told: SocketEvent, url: str) -> None:
        reason = self._reason(told)
        if reason not in self._said and (told.is_mismatch or not self._said):  # a guess is not worth a second line
            self._said.add(reason)
            log.error("the controller does not accept this node url=%s: %s", url, reason)

    def _reason(self, told: SocketEvent) -> str:
        if told.is_mismatch and self._has_key:
            return "this node has a cluster key and the controller has none; give it --cluster-key-file"
        if told.is_mismatch:
            return "it wants a cluster key and this node has none; set cluster_key_file or KVMESH_CLUSTER_KEY"
        if self._has_key:
            return "it ends the handshake; most likely it has another cluster key, or none"
        return (
            "it ends the handshake; most likely it wants a cluster key (set cluster_key_file or KVMESH_CLUSTER_KEY), "
            "or this is none of its --monitor-ports"
        )
