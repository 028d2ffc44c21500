"""The harness's end of an actor: start it, tell it, hear of its requests, kill it."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec
import psutil

from kvmesh.bench.chaos.actor import Answered, Line, Options, Reply, Sent, Status
from kvmesh.bench.cluster import tail
from kvmesh.errors import StartupError

START_TIMEOUT_S = 90.0
REPLY_TIMEOUT_S = 60.0

Heard = Callable[[Sent | Answered], None]


class Actor:
    """One engine process. `tell` from one thread; `heard` is called by a thread of the actor's own."""

    def __init__(
        self,
        name: str,
        options: Options,
        log_path: Path,
        *,
        prefix: Sequence[str] = (),
        environment: dict[str, str] | None = None,
        heard: Heard = lambda _: None,
    ) -> None:
        self.name = name
        self.options = options
        self.log_path = log_path
        self.prefix = tuple(prefix)
        """What stands before the command, such as `ip netns exec NAME`."""
        self._environment = environment or {}
        self._heard = heard
        self._replies: queue.SimpleQueue[Reply | None] = queue.SimpleQueue()
        self._process: subprocess.Popen[bytes] | None = None
        self.peer_port = 0
        self._family: set[psutil.Process] = set()
        """Every process of ours that was seen; ended at the latest by `kill`."""

    def start(self, *, wait: bool = True) -> Status | None:
        """Start the process and wait until its node serves. Raises StartupError with the node's words."""
        self._replies = queue.SimpleQueue()
        command = [*self.prefix, sys.executable, "-m", "kvmesh.bench.chaos.actor"]
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, **self._environment},
                start_new_session=True,
            )
        self._write(msgspec.json.encode(self.options))
        threading.Thread(target=self._listen, args=(self._process,), name=f"chaos-{self.name}", daemon=True).start()
        return self.started() if wait else None

    def started(self) -> Status:
        """Wait for the end of a start. Raises StartupError."""
        reply = self._reply(START_TIMEOUT_S)
        if reply.error:
            raise StartupError(self.name, found=reply.error)
        status = msgspec.json.decode(reply.value, type=Status)
        self.peer_port = status.peer_port
        self._note_family()
        return status

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def tell(self, command: str, **arguments: object) -> object:
        """Have a command carried out and wait for its answer. Raises StartupError when the actor cannot."""
        reply = self._tell(command, arguments)
        return msgspec.json.decode(reply.value)

    def status(self) -> Status:
        """The node as the actor sees it now."""
        status = msgspec.json.decode(self._tell("status", {}).value, type=Status)
        self._note_family()
        return status

    def wait_status(self, condition: Callable[[Status], bool], timeout_s: float = 30.0) -> bool:
        """Wait until the status is as wanted."""
        until_s = time.monotonic() + timeout_s
        while not condition(self.status()):
            if time.monotonic() > until_s:
                return False
            time.sleep(0.05)
        return True

    def log(self) -> str:
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def close(self) -> None:
        """End it in good order; kill what is left."""
        if self.is_running():
            with contextlib.suppress(StartupError, OSError):
                self._note_family()
                self._send("close", {})
                assert self._process is not None
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(10)
        self.kill()

    def kill(self, *, node_too: bool = True) -> None:
        """Kill -9 of the engine, and of all that it has started unless told otherwise, as when a host dies: nobody
        says good-bye.
        """
        if node_too:
            self._note_family()
            for process in self._family:
                with contextlib.suppress(psutil.Error):
                    process.suspend()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()
        if node_too:
            for process in self._family:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            self._family.clear()

    def wait_family(self, timeout_s: float = 20.0) -> list[int]:
        """Wait for the end of all that the engine has started; returns the pids of what goes on."""
        _, alive = psutil.wait_procs([one for one in self._family if one.pid != self.pid], timeout_s)
        return [one.pid for one in alive]

    def _note_family(self) -> None:
        with contextlib.suppress(psutil.Error):
            self._family.update(psutil.Process(self.pid).children(recursive=True))

    def _tell(self, command: str, arguments: dict[str, object]) -> Reply:
        self._send(command, arguments)
        reply = self._reply(REPLY_TIMEOUT_S)
        if reply.error:
            raise StartupError(f"{self.name}: {command}", found=reply.error)
        return reply

    def _send(self, command: str, arguments: dict[str, object]) -> None:
        self._write(msgspec.json.encode((command, arguments)))

    def _write(self, line: bytes) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise StartupError(self.name, found=f"{error}\n{tail(self.log())}") from None

    def _reply(self, timeout_s: float) -> Reply:
        try:
            reply = self._replies.get(timeout=timeout_s)
        except queue.Empty:
            raise StartupError(self.name, found=f"no answer for {timeout_s:g} s\n{tail(self.log())}") from None
        if reply is None:
            raise StartupError(self.name, found=f"it has ended\n{tail(self.log())}")
        return reply

    def _listen(self, process: subprocess.Popen[bytes]) -> None:
        replies = self._replies
        assert process.stdout is not None
        decoder = msgspec.json.Decoder(Line)
        with contextlib.suppress(OSError, ValueError):  # closed by `kill`
            for line in process.stdout:
                message = decoder.decode(line)
                if isinstance(message, Reply):
                    replies.put(message)
                else:
                    self._heard(message)
        replies.put(None)


def send_signal(pids: Sequence[int], number: int) -> None:
    """A signal to each of these processes; one that is gone is passed over."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


@contextlib.contextmanager
def stopped(pids: Sequence[int]) -> Iterator[None]:
    """SIGSTOP while the block runs, SIGCONT after it."""
    send_signal(pids, signal.SIGSTOP)
    try:
        yield
    finally:
        send_signal(pids, signal.SIGCONT)
