"""The engine's end of the link against nodes that die, stop and lie."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace

import psutil
import pytest

from kvmesh.bench.stand_in import make_key, stand_in_format
from kvmesh.config import KVMeshConfig
from kvmesh.core.ledger import SlotLedger
from kvmesh.core.reasons import MissReason
from kvmesh.errors import StartupError
from kvmesh.node import fetch_jobs
from kvmesh.node import handle as handle_module
from kvmesh.node.handle import NodeHandle
from kvmesh.node.state import DOWN, NodeState
from kvmesh.transfer.pool import HostPool
from kvmesh.wire import link
from kvmesh.wire.framing import FrameBuffer, pack_frame

CHUNK_BYTES = 4096
READY = link.Ready("liar", "0" * 16, "127.0.0.1", 7, 0)
NODE = """
import socket, sys
link = socket.socket(fileno=int(sys.argv[1]))
link.recv(1 << 20)  # the Start
for step in sys.argv[2].split():
    if step == 'linger':
        while link.recv(1 << 20):
            pass
    elif step == 'read':
        link.recv(1 << 20)
    else:
        link.sendall(bytes.fromhex(step))
"""


def said(*messages: link.Message) -> str:
    return b"".join(pack_frame(link.encode(message)) for message in messages).hex()


class LyingHandle(NodeHandle):
    """Starts `NODE`, which says what the test wants, instead of a node. The script may be changed between lives."""

    script = ""

    def _command(self, link_fd: int) -> list[str]:
        return [sys.executable, "-S", "-E", "-c", NODE, str(link_fd), self.script]


@pytest.fixture
def make() -> Iterator[object]:
    pool, ledger = HostPool.create(8, CHUNK_BYTES), SlotLedger.create(8, CHUNK_BYTES)
    handles: list[LyingHandle] = []

    def build(script: str) -> LyingHandle:
        handle = LyingHandle(KVMeshConfig().to_wire(), stand_in_format(CHUNK_BYTES), ledger, pool.segments)
        handle.script = script
        handles.append(handle)
        return handle

    yield build
    for handle in handles:
        handle.close()
        assert handle.pid is None or not psutil.pid_exists(handle.pid)
    pool.close()
    ledger.close()


def wait_for(check: object, timeout_s: float = 20.0) -> None:
    until_s = time.monotonic() + timeout_s
    while not check():  # type: ignore[operator]
        assert time.monotonic() < until_s, "waited in vain"
        time.sleep(0.002)


DEEP = pack_frame(b"\x96\xa9Directory\xc2\xc2\x01" + b"\x91" * 20_000 + b"\x90" * 2).hex()


@pytest.mark.parametrize(
    "lie",
    [
        pack_frame(b"\xff" * 20).hex(),
        "ffffffff",
        "00000000",
        DEEP,
        said(link.Publish([1], fetched=False)),
        said(link.FetchDone(1, [None], -1, 0.0, [])),
        said(link.Directory(connected=True, ever_connected=True, peers=-1)),
    ],
    ids=["no msgpack", "too long", "empty", "nested too deep", "wrong direction", "negative bytes", "negative peers"],
)
def test_a_node_that_lies_is_killed_and_replaced(make, lie):
    """Its jobs fail once it is dead, nothing of what it said stays, and the next one is started."""
    handle = make(f"{said(READY, link.Visible([make_key('a')], [], reset=False))} read {lie} linger")
    handle.start()
    first = handle.pid
    wait_for(lambda: handle.is_visible(make_key("a")))
    handle.script = f"{said(READY)} linger"
    handle.fetch(1, "r", [make_key("a")], [0], 5.0)
    wait_for(lambda: handle.restarts == 1)
    (finished,) = handle.take_finished()
    assert (finished.job_id, finished.reasons) == (1, [MissReason.NODE_DOWN])
    assert not psutil.pid_exists(first)
    assert not handle.is_visible(make_key("a"))
    assert handle.state.alive


def test_reports_of_jobs_that_nobody_gave_out_are_ignored(make):
    """Unknown, misshapen or reported twice: each job ends once, the node stays."""
    done = link.FetchDone(1, [None], CHUNK_BYTES, 0.1, ["x"])
    lies = (link.FetchDone(99, [None], 0, 0.0, []), link.FetchDone(1, [None] * 3, 0, 0.0, []), done, done, READY)
    marker = link.Visible([make_key("end")], [], reset=False)
    handle = make(f"{said(READY)} read {said(*lies, marker)} linger")
    handle.start()
    handle.fetch(1, "r", [make_key("a")], [0], 5.0)
    wait_for(lambda: handle.is_visible(make_key("end")))
    assert [each.job_id for each in handle.take_finished()] == [1]
    assert not handle.has_jobs()
    assert handle.restarts == 0


@pytest.mark.parametrize("first", [DEEP, said(link.Directory(True, True, 1)), "ffffffff", "", pack_frame(b"x").hex()])
def test_a_node_that_does_not_start_is_one_error(make, first):
    with pytest.raises(StartupError, match="node"):
        make(first).start()


def test_a_failed_start_says_what_the_node_said(make):
    with pytest.raises(StartupError, match="port 7 is taken"):
        make(f"{said(link.Failed('port 7 is taken'))} linger").start()


def test_closing_while_a_node_is_being_started_leaves_none_behind(make, monkeypatch):
    """The end of the engine may come in the middle of a restart."""
    monkeypatch.setattr(handle_module, "FIRST_RESTART_DELAY_S", 0.0)
    handle = make(f"{said(READY)} linger")
    handle.start()
    started = threading.Event()
    popen = subprocess.Popen

    def slow_popen(*args, **options):
        started.set()
        time.sleep(0.1)  # close() runs meanwhile
        return popen(*args, **options)

    monkeypatch.setattr(subprocess, "Popen", slow_popen)
    os.kill(handle.pid, signal.SIGKILL)
    started.wait(10)
    handle.close()
    children = [child for child in psutil.Process().children() if str(NODE) in child.cmdline()]
    assert not children
    assert not any(thread.is_alive() for thread in handle._threads)
    assert not handle.state.alive


def test_a_node_that_cannot_have_its_port_back_takes_another(make, monkeypatch):
    """Somebody's connection may have got the very port in the moment in between, for minutes."""
    monkeypatch.setattr(handle_module, "FIRST_RESTART_DELAY_S", 0.0)
    handle = make(f"{said(READY)} linger")
    handle.start()
    asked = []
    launch = handle._child.launch

    def note(start):
        asked.append(start.peer_port)
        if len(asked) > 1:
            handle.script = f"{said(READY)} linger"
        return launch(start)

    monkeypatch.setattr(handle._child, "launch", note)
    handle.script = f"{said(link.Failed('port 7 is taken'))} linger"
    os.kill(handle.pid, signal.SIGKILL)
    wait_for(lambda: handle.restarts == 1)
    assert asked == [READY.peer_port, 0]


def test_closing_leaves_no_descriptor(make):
    before = psutil.Process().num_fds()
    handle = make(f"{said(READY)} linger")
    handle.start()
    handle.close()
    handle.close()
    assert psutil.Process().num_fds() == before


def test_giving_up_is_not_told_to_a_dead_node(make):
    """A drain right after the node's death: the message must not be the first thing its successor reads."""
    handle = make("")
    handle._jobs.add(1, chunks=1, timeout_s=1e9)
    drained = threading.Thread(target=handle.drain)
    drained.start()
    handle._jobs.fail_all(MissReason.NODE_DOWN)
    drained.join(10)
    assert not drained.is_alive()
    assert handle._outgoing.empty()


def test_what_waits_for_a_node_is_bounded(make, monkeypatch):
    """A node that reads nothing, and an engine that stores and evicts: slots to look at again, instead of a queue."""
    monkeypatch.setattr(handle_module, "MAX_OUTGOING", 20)
    monkeypatch.setattr(handle_module, "MAX_SLOTS_PER_MESSAGE", 3)
    handle = make("")
    ours, theirs = socket.socketpair()
    with contextlib.closing(ours), contextlib.closing(theirs):
        handle._child.connection, handle._state = ours, NodeState(True, True, True, 1)
        for turn in range(1000):
            handle.publish([turn % 8], fetched=False)
            handle.retract([turn % 8])
        assert handle._outgoing.qsize() <= 20
        assert handle._missed_slots == set(range(8))
        writer = threading.Thread(target=handle._write)
        writer.start()
        heard, buffer = [], FrameBuffer(1 << 20)
        theirs.settimeout(10)
        while sum(len(each.slots) for each in heard[20:] if isinstance(each, link.Publish)) < 8:
            heard += [link.to_node_decoder.decode(frame) for frame in buffer.feed(theirs.recv(65536))]
        handle._outgoing.put(None)
        writer.join(10)
        assert {slot for each in heard[20:] if isinstance(each, link.Retract) for slot in each.slots} == set(range(8))
        assert not handle._missed_slots
        handle._child.connection, handle._state = None, DOWN


def test_what_cannot_be_said_costs_itself(make, caplog):
    """A name that is no text, say: what comes after it is told all the same."""
    done = link.FetchDone(2, [None], CHUNK_BYTES, 0.1, ["x"])
    handle = make(f"{said(READY)} read {said(done)} linger")
    handle.start()
    handle.record(link.RequestRecord(request_id="\ud800", prompt_tokens=1, keys=[]))
    handle.fetch(2, "r", [make_key("a")], [0], 20.0)
    wait_for(lambda: handle._jobs.wait(0))
    (finished,) = handle.take_finished()
    assert finished.reasons == [None]
    assert "kind=RequestRecord" in caplog.text


def test_a_large_clear_is_told_in_pieces(make, monkeypatch):
    """A pool of millions of slots that is thrown away fits no single frame."""
    monkeypatch.setattr(handle_module, "MAX_SLOTS_PER_MESSAGE", 3)
    handle = make("")
    handle._state = NodeState(True, True, True, 1)
    handle.retract(list(range(8)))
    told = []
    while not handle._outgoing.empty():
        told.append(handle._outgoing.get()[1])
    assert max(len(message.slots) for message in told) <= 3
    assert {slot for message in told for slot in message.slots} == set(range(8))
    handle._state = DOWN


def test_a_node_that_talks_but_does_not_listen_is_killed(make, monkeypatch):
    """Chatter does not keep the engine from seeing that its own words are not read."""
    monkeypatch.setattr(handle_module, "DEAF_S", 0.0)
    handle = make(f"{said(READY)} " + " ".join([said(link.Directory(True, True, 1))] * 3) + " linger")
    handle.start()
    handle._sending_since_s = time.monotonic() - 1
    handle.script = f"{said(READY)} linger"
    wait_for(lambda: handle.restarts >= 1)


@pytest.mark.parametrize("notices", [True, False])
def test_a_node_is_not_killed_because_the_engine_was_stopped(make, monkeypatch, notices):
    """A container is paused for a minute: when it goes on, the node's answer to a fetch may still be on its way."""
    stopped_s = 0.0
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + stopped_s)
    for module in (handle_module, fetch_jobs):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(handle_module, "WAKE_S", 0.05)
    if not notices:
        monkeypatch.setattr(handle_module, "STOPPED_S", 1e9)
    handle = make(f"{said(READY)} linger")
    handle.start()
    handle.fetch(1, "r", [make_key("a")], [0], 5.0)
    time.sleep(0.2)
    stopped_s = 60.0
    if notices:
        time.sleep(0.5)
        assert not handle.take_finished()
        assert handle.restarts == 0
    else:
        wait_for(handle.take_finished)


@pytest.mark.parametrize(
    "message",
    [link.Visible([make_key("a")], [], reset=False), link.Answered([make_key("a")], []), link.Directory(True, True, 1)],
    ids=lambda message: type(message).__name__,
)
def test_what_is_shown_of_a_node_does_not_change_uncounted(make, message):
    """Who shows it looks at the count alone after most steps."""
    handle = make("")
    before = handle.changes
    handle._on_message(message)
    told = handle.changes
    handle._lost()
    assert before < told < handle.changes
