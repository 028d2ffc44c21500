"""The node as a child process of its engine: started with pool and ledger in hand, killed when it must be.

One after another: the engine's reading thread starts the next one when the last is dead.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import subprocess
import threading
import time
from collections.abc import Callable

from kvmesh.errors import StartupError
from kvmesh.wire import link
from kvmesh.wire.framing import LENGTH_BYTES, pack_frame, parse_length

log = logging.getLogger("kvmesh.handle")

START_TIMEOUT_S = 60.0
GENTLE_S = 3.0
"""How long a node may take to say good-bye to the directory."""


class NodeProcess:
    """The process that is there now, and the link to it. `launch` and `kill` return when it is ready or dead."""

    def __init__(self, command: Callable[[int], list[str]]) -> None:
        """`command` is what to execute, given the number of the node's end of the link."""
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None
        self.connection: socket.socket | None = None
        """Our end of the link to the last process that was started."""
        self.sending = threading.Lock()
        """Held while a frame is written: no descriptor is closed meanwhile, and its number given to something else."""

    @property
    def pid(self) -> int | None:
        """Of the last process that was started."""
        process = self._process
        return None if process is None else process.pid

    @property
    def exit_status(self) -> int | None:
        """None while it runs, as far as anybody has looked."""
        process = self._process
        return None if process is None else process.returncode

    def launch(self, start: link.Start) -> link.Ready:
        """Start a process and wait for its first word. The one before must be dead.

        Raises StartupError with the node's own words when it cannot serve.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        descriptors = [theirs.fileno(), start.ledger_fd, *(segment.fd for segment in start.segments)]
        with theirs:
            command = self._command(theirs.fileno())
            self._process = subprocess.Popen(command, pass_fds=descriptors, stdin=subprocess.DEVNULL)
        old, self.connection = self.connection, ours
        if old is not None:
            with self.sending:  # its process is dead, so nobody is held up in there
                old.close()
        try:
            first = _first_word(ours, start)
        except (OSError, ValueError, EOFError, RecursionError) as error:
            self.kill(gentle=False)
            raise StartupError(
                "node process",
                expected="a node that is ready",
                found=f"{error!r} (exit status {self._process.returncode})",
                hint="its own log lines above say why",
            ) from error
        if isinstance(first, link.Failed):
            self.kill(gentle=False)
            raise StartupError("node process", found=first.text)
        return first

    def kill(self, *, gentle: bool) -> None:
        """Return when the process is dead. Gently: by closing the link, which lets it say good-bye to the directory."""
        process, connection = self._process, self.connection
        if gentle and connection is not None:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        if process is None:
            return
        if gentle:
            try:
                process.wait(timeout=GENTLE_S)
            except subprocess.TimeoutExpired:
                log.warning("node did not end by itself pid=%d; killing it", process.pid)
        if process.poll() is None:
            process.kill()
            process.wait()


def _first_word(connection: socket.socket, start: link.Start) -> link.Ready | link.Failed:
    """Exactly one frame, byte by byte where needed: what follows it belongs to the reading thread."""
    until_s = time.monotonic() + START_TIMEOUT_S
    connection.settimeout(START_TIMEOUT_S)
    connection.sendall(pack_frame(link.encode(start)))
    length = parse_length(_receive(connection, LENGTH_BYTES, until_s), link.MAX_FRAME_BYTES)
    message = link.to_engine_decoder.decode(_receive(connection, length, until_s))
    connection.settimeout(None)
    if not isinstance(message, link.Ready | link.Failed):
        raise ValueError(  # noqa: TRY004  (what came is wrong, not what we were called with)
            f"first message is {type(message).__name__}"
        )
    return message


def _receive(connection: socket.socket, size: int, until_s: float) -> bytes:
    data = bytearray()
    while len(data) < size:
        connection.settimeout(max(0.001, until_s - time.monotonic()))
        piece = connection.recv(size - len(data))
        if not piece:
            raise EOFError("the node ended before it was ready")
        data += piece
    return bytes(data)
