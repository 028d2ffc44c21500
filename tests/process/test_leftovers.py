"""Whatever ends in whatever way, nothing of ours stays: processes, names in /dev/shm, descriptors."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from kvmesh.transfer.nixl_agent import unavailable
from support.stand_ins import make_config, running_engine

pytestmark = [pytest.mark.process, pytest.mark.timeout(120)]

ENGINE = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what runs in the background without it
from kvmesh.bench.stand_in import StandInEngine, make_key
from kvmesh.config import KVMeshConfig
engine = StandInEngine(KVMeshConfig.from_wire(bytes.fromhex(sys.argv[1])), slots=8, chunk_bytes=65536)
engine.start()
engine.put([make_key('a')])
print(engine.node.pid, flush=True)
time.sleep(600)
"""
CHANNELS = [
    "tcp",
    pytest.param("nixl", marks=pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))),
]


NOT_OURS = ("psm_", "vllm_")
"""What servers of vLLM leave there when they are killed; other tests of this machine may be doing that."""


def shared_names() -> set[str]:
    """Names in /dev/shm of this user that could be ours."""
    names = set()
    for path in Path("/dev/shm").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_uid == os.getuid() and not path.name.startswith(NOT_OURS):
                names.add(path.name)
    return names


def abandoned(names: set[str]) -> set[str]:
    """Names that no process uses. What other tests have made meanwhile is in use."""
    left = {f"/dev/shm/{name}" for name in names}
    for process in Path("/proc").glob("[0-9]*") if left else ():
        with contextlib.suppress(OSError):
            used = (process / "maps").read_text(errors="replace")
            for fd in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    used += f"{fd.readlink()}\n"
            left = {name for name in left if name not in used}
    return left


class Family:
    """An engine process of its own, its node, and whatever that has started."""

    def __init__(self, channel: str) -> None:
        config = make_config(None, "doomed", transfer_channel=channel)
        self.engine = subprocess.Popen(
            [sys.executable, "-c", ENGINE, config.to_wire().hex()], stdout=subprocess.PIPE, text=True
        )
        assert self.engine.stdout is not None
        self.node = psutil.Process(int(self.engine.stdout.readline()))
        self.others = self.node.children(recursive=True)
        assert len(self.others) == (1 if channel == "nixl" else 0)

    def end(self) -> None:
        self.engine.kill()
        self.engine.wait()
        assert self.engine.stdout is not None
        self.engine.stdout.close()


@pytest.fixture(params=CHANNELS)
def family(request: pytest.FixtureRequest) -> Iterator[Family]:
    before = shared_names()
    made = Family(request.param)
    everybody = [made.node, *made.others]
    yield made
    if made.engine.poll() is None:
        everybody += psutil.Process(made.engine.pid).children(recursive=True)
    made.end()
    assert not psutil.wait_procs(everybody, timeout=20)[1]
    wait_until(lambda: not abandoned(shared_names() - before))


def test_a_killed_engine(family: Family) -> None:
    """Its node ends by itself, and what that has started too."""
    family.engine.kill()
    family.engine.wait()
    assert not psutil.wait_procs([family.node, *family.others], timeout=20)[1]


def test_a_killed_node(family: Family) -> None:
    """What it has started ends, and the engine has a new one."""
    family.node.kill()
    assert not psutil.wait_procs(family.others, timeout=20)[1]
    wait_until(lambda: len(psutil.Process(family.engine.pid).children()) == 1)


def test_a_stopped_node_of_a_killed_engine(family: Family) -> None:
    """A node that does not run cannot end itself; it does so as soon as it runs again."""
    family.node.send_signal(signal.SIGSTOP)
    family.engine.kill()
    family.engine.wait()
    family.node.send_signal(signal.SIGCONT)
    assert not psutil.wait_procs([family.node, *family.others], timeout=20)[1]


def test_a_killed_serving_process(family: Family) -> None:
    """The node goes on without it; it is started again when somebody asks."""
    for other in family.others:
        other.kill()
    wait_until(lambda: all(other.status() == psutil.STATUS_ZOMBIE for other in family.others))
    assert family.node.status() != psutil.STATUS_ZOMBIE


def test_an_interrupted_engine(family: Family) -> None:
    """Ctrl-C reaches the whole terminal; the order in which they end does not matter."""
    family.engine.send_signal(signal.SIGINT)
    family.node.send_signal(signal.SIGINT)
    family.engine.wait()
    assert not psutil.wait_procs([family.node, *family.others], timeout=20)[1]


def test_an_engine_that_comes_and_goes_leaves_no_descriptor() -> None:
    """In the process that had it, after good and bad ends of its nodes."""
    with running_engine(make_config(None, "first")):
        pass
    before = psutil.Process().num_fds()
    for _ in range(2):
        with running_engine(make_config(None, "again")) as engine:
            assert engine.node.pid is not None
            os.kill(engine.node.pid, signal.SIGKILL)
            assert engine.wait_node(restarts=1)
    assert psutil.Process().num_fds() == before


def wait_until(check: Callable[[], bool], timeout_s: float = 20.0) -> None:
    until_s = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < until_s, "waited in vain"
        time.sleep(0.01)
