"""vLLM servers in a few seconds: forked from one process that has imported vLLM already.

A server is three processes (API server, engine core, worker), each of which would import PyTorch and vLLM anew: five
sixths of what a boot costs on a small machine. Here one process, `python -m support.prefork`, imports all of it once;
every server is a fork of it, and the server's own processes are forks as well, as vLLM makes them where it is free to
choose. Nothing else differs: each server runs vLLM's own entry point in a session of its own, with the command line,
variables and log file that `kvmesh.bench.cluster.Instance` gives it. `test_demo.py` and `test_kubernetes.py` start
theirs the long way, and with TEST_PREFORK=0 all do.

Threads: one per worker (OpenMP is told so before PyTorch is imported, since a fork cannot be given another number).
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from kvmesh.bench.cluster import Instance

START_TIMEOUT_S = 300.0
MESSAGE_BYTES = 1 << 18
SERVER = "vllm.entrypoints.openai.api_server"
PRELOAD = (
    SERVER,
    "vllm.entrypoints.launchers.api_server.entry",
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.models.llama",
    "vllm.v1.attention.backends.cpu_attn",
    "kvmesh.vllm.plugin",
    "kvmesh.vllm.connector",
    "kvmesh.vllm.host_copy",
    "kvmesh.vllm.policy",
    "kvmesh.vllm.spec",
    "kvmesh.vllm.tier",
)
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    # With tensor parallelism each rank has its embedding compiled as C++, for longer than all the rest of a test takes.
    "TORCHDYNAMO_DISABLE": "1",
}
"""Read when PyTorch and vLLM are imported, so the same for all servers."""


class Job(NamedTuple):
    """A server to be started."""

    arguments: list[str]
    env: dict[str, str]
    log_path: str


class Forked:
    """A server that was forked elsewhere; what `kvmesh.bench.cluster` needs of `subprocess.Popen`."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._pidfd = os.pidfd_open(pid)

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.wait(0)
        return None

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is not None:
            return self.returncode
        ended, _, _ = select.select([self._pidfd], [], [], timeout)
        if not ended:
            raise subprocess.TimeoutExpired("vllm", timeout or 0.0)
        self.returncode = forker().reap(self.pid)
        os.close(self._pidfd)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


class PreforkedInstance(Instance):
    """An instance that skips the imports."""

    def start(self) -> None:
        if os.environ.get("TEST_PREFORK") == "0":
            super().start()
            return
        at = self.command.index(SERVER)
        environment = {**os.environ, **self.env, **self.own_environment()}
        self.popen = forker().start(Job(list(self.command[at + 1 :]), environment, str(self.log_path)))


class Forker:
    """The process that servers are forked from. One thread may use it."""

    def __init__(self) -> None:
        """Start it. It ends, and kills what it has started, when this process ends."""
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for side in (self._socket, theirs):
            side.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MESSAGE_BYTES)
        self._socket.settimeout(START_TIMEOUT_S)
        folder = Path(__file__).resolve().parent.parent
        path = os.pathsep.join((str(folder), os.environ.get("PYTHONPATH", ""))).rstrip(os.pathsep)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "support.prefork", str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            env={**os.environ, "PYTHONPATH": path, **ENVIRONMENT},
            start_new_session=True,
        )
        theirs.close()

    def start(self, job: Job) -> Forked:
        """Fork a server; waits for the imports the first time."""
        return Forked(self._ask({"start": job._asdict()}))

    def reap(self, pid: int) -> int:
        """The exit status of a server that has ended, as `subprocess` gives it."""
        return self._ask({"reap": pid})

    def close(self) -> None:
        """End it, and what it has started."""
        self._socket.close()
        self._process.wait()

    def _ask(self, question: dict[str, object]) -> int:
        self._socket.send(json.dumps(question).encode())
        answer = self._socket.recv(MESSAGE_BYTES)
        assert answer, "the process that vLLM servers are forked from has ended"
        return int(json.loads(answer))


@functools.cache
def forker() -> Forker:
    """The one of this process; started when it is first asked for."""
    made = Forker()
    atexit.register(made.close)
    return made


def serve(asked: socket.socket) -> Job | None:
    """Carry out what is asked, until nobody asks any more: None then. In each fork: the server that it is to become."""
    pids: set[int] = set()
    while data := asked.recv(MESSAGE_BYTES):
        question = json.loads(data)
        if "start" in question:
            job = Job(**question["start"])
            pid = os.fork()
            if pid == 0:
                asked.close()
                return job
            pids.add(pid)
            asked.send(json.dumps(pid).encode())
            continue
        pid, status = os.waitpid(question["reap"], 0)
        pids.discard(pid)
        asked.send(json.dumps(os.waitstatus_to_exitcode(status)).encode())
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    return None


def become(job: Job) -> None:
    """Turn this fork into the server; ends when the server does."""
    os.setsid()
    log = os.open(job.log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for standard in (1, 2):
        os.dup2(log, standard)
    os.close(log)
    os.environ.clear()
    os.environ.update(job.env)
    tempfile.tempdir = None  # asked for while importing, with other variables
    sys.argv = [SERVER, *job.arguments]
    runpy.run_module(SERVER, run_name="__main__", alter_sys=True)


def preload() -> None:
    """Import what servers need, and have vLLM fork their processes."""
    for name in PRELOAD:
        importlib.import_module(name)
    system = importlib.import_module("vllm.utils.system_utils")
    assert hasattr(system, "_maybe_force_spawn"), "this vLLM chooses how it makes processes elsewhere"
    # Called each time before a process is made; on the CPU platform vLLM has set `spawn` by then.
    system._maybe_force_spawn = lambda: os.environ.__setitem__("VLLM_WORKER_MULTIPROC_METHOD", "fork")
    # A worker waits for its next step with `sched_yield` in a loop, for a second after each step. On Linux 6.18 nobody
    # else gets the processor meanwhile (measured), so a fetch that the engine waits for may find its holder stopped.
    distributed = importlib.import_module("vllm.distributed.utils")
    assert hasattr(distributed, "USE_SCHED_YIELD"), "this vLLM waits in another way"
    distributed.USE_SCHED_YIELD = False


def main() -> None:
    """Import, then fork on demand; the argument is the descriptor of the socket that asks."""
    asked = socket.socket(fileno=int(sys.argv[1]))
    preload()
    job = serve(asked)
    if job is not None:
        become(job)


if __name__ == "__main__":
    main()
