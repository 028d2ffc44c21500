"""Things to put in the way of a connection: a TCP proxy that changes bytes, and a ZMQ proxy that loses messages."""

from __future__ import annotations

import contextlib
import random
import select
import socket
import threading
from collections.abc import Callable

import zmq

PIECE_BYTES = 1 << 16


class CorruptingProxy:
    """Passes TCP connections on; while `is_corrupting`, one byte of each large piece towards the client is changed.

    Small pieces are left alone, so that what is hit is mostly chunk data, the case that only a checksum notices.
    """

    def __init__(self, listen: tuple[str, int], target: tuple[str, int], seed: int) -> None:
        self.is_corrupting = False
        self.changed = 0
        self._target = target
        self._random = random.Random(seed)
        self._listener = socket.create_server(listen)
        self._closing = threading.Event()
        threading.Thread(target=self._accept, name="chaos-proxy", daemon=True).start()

    def close(self) -> None:
        self._closing.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError), socket.create_connection(self._target, 5) as holder:
            holder.settimeout(None)
            others = {client: holder, holder: client}
            while not self._closing.is_set():
                for readable in select.select(list(others), [], [], 0.5)[0]:
                    data = bytearray(readable.recv(PIECE_BYTES))
                    if not data:
                        return
                    if readable is holder and self.is_corrupting and len(data) > 4096:
                        data[self._random.randrange(len(data))] ^= 1 + self._random.randrange(255)
                        self.changed += 1
                    others[readable].sendall(data)


class LossyProxy:
    """Between one node and its controller: passes messages on, and loses `loss` of them (0 to 1).

    What the node sends to the pull socket, and what the controller sends on the reply socket, is lost; what the node
    asks on the reply socket arrives. The shares can be changed while it runs.
    """

    def __init__(self, pull_url: str, reply_url: str, seed: int) -> None:
        self.up_loss = self.down_loss = 0.0
        self.lost = 0
        self._random = random.Random(seed)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._events, self.pull_port = self._bound(zmq.PULL)
        self._requests, self.reply_port = self._bound(zmq.DEALER)
        self._pull = self._connected(zmq.PUSH, pull_url)
        self._reply = self._connected(zmq.DEALER, reply_url)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="chaos-zmq", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        self._thread.join()
        self._context.destroy(linger=0)

    def _bound(self, kind: int) -> tuple[zmq.Socket[bytes], int]:
        made = self._context.socket(kind)
        made.linger = 0
        made.bind("tcp://127.0.0.1:0")
        endpoint = made.getsockopt(zmq.LAST_ENDPOINT)
        assert isinstance(endpoint, bytes)
        return made, int(endpoint.rpartition(b":")[2])

    def _connected(self, kind: int, url: str) -> zmq.Socket[bytes]:
        made = self._context.socket(kind)
        made.linger = 0
        made.connect(url)
        return made

    def _run(self) -> None:
        ways: dict[zmq.Socket[bytes], tuple[zmq.Socket[bytes], Callable[[], float]]] = {
            self._events: (self._pull, lambda: self.up_loss),
            self._requests: (self._reply, lambda: 0.0),
            self._reply: (self._requests, lambda: self.down_loss),
        }
        poller = zmq.Poller()
        for source in ways:
            poller.register(source, zmq.POLLIN)
        while not self._closing.is_set():
            for source, _ in poller.poll(100):
                frames = source.recv_multipart()
                target, loss = ways[source]
                if self._random.random() < loss():
                    self.lost += 1
                    continue
                with contextlib.suppress(zmq.Again):
                    target.send_multipart(frames, zmq.NOBLOCK)
