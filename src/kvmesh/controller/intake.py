"""Taking messages off a ZMQ socket on the asyncio loop, without a future per message."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import zmq

BATCH_MESSAGES = 100
BATCH_S = 0.01
"""One socket's turn on the loop ends after so many messages or so long, whichever comes first."""


class Intake:
    """Takes what one socket receives, some at a time, and hands each message's frames to `handle`."""

    def __init__(
        self,
        socket: zmq.Socket[bytes],
        handle: Callable[[list[zmq.Frame]], None],
        after: Callable[[bool], None] = lambda _: None,
    ) -> None:
        """`after` is called at the end of each turn, with whether nothing is left; like `handle` it must not raise."""
        self._socket = socket
        self._after = after
        self._handle = handle
        self._readable = asyncio.Event()
        self.emptied_at_s = time.monotonic()
        """When there was nothing left to be read the last time."""

    def wake(self) -> None:
        """Look again. Needed after every send: it may have used up the signal that something can be read."""
        self._readable.set()

    async def run(self) -> None:
        """Until cancelled. `handle` must not raise."""
        loop = asyncio.get_running_loop()
        descriptor = int(self._socket.getsockopt(zmq.FD))
        loop.add_reader(descriptor, self._readable.set)
        self._readable.set()
        try:
            while True:
                await self._readable.wait()
                self._readable.clear()
                while not self._drain():
                    await asyncio.sleep(0)  # others' turn
        finally:
            loop.remove_reader(descriptor)

    def _drain(self) -> bool:
        """Take a batch. True when nothing is left."""
        until_s = time.monotonic() + BATCH_S
        for _ in range(BATCH_MESSAGES):
            try:
                frames = self._receive()
            except zmq.Again:
                self.emptied_at_s = time.monotonic()
                self._after(True)
                return True
            self._handle(frames)
            if time.monotonic() > until_s:
                break
        self._after(False)
        return False

    def _receive(self) -> list[zmq.Frame]:
        """The frames of one message, as `recv_multipart` has them, which takes twice as long."""
        frames = [self._socket.recv(zmq.NOBLOCK, copy=False)]
        while frames[-1].more:
            frames.append(self._socket.recv(zmq.NOBLOCK, copy=False))
        return frames
