"""A real controller process and small made-up nodes that talk to it over real sockets."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import httpx
import zmq

from kvmesh.bench.cluster import free_ports
from kvmesh.core.replica import Replica
from kvmesh.wire import directory as wire
from kvmesh.wire.curve import secure_node
from support.keys import environment_curve

T = TypeVar("T")
N = TypeVar("N", bound=wire.Message)
FAST = ("--heartbeat-interval", "0.2", "--instance-timeout", "30")
"""Made-up nodes are silent while a test waits for something else; on a busy machine that can be long."""
IMPATIENT = ("--heartbeat-interval", "0.2", "--instance-timeout", "1")


def wait_for(check: Callable[[], T | None], timeout_s: float = 20.0) -> T:
    """The first true answer of `check`, asked again and again: for what another process does in its own time."""
    until_s = time.monotonic() + timeout_s
    while True:
        found = check()
        if found:
            return found
        assert time.monotonic() < until_s, f"waited {timeout_s} s for {check}"
        time.sleep(0.01)


class ControllerProcess:
    """`python -m kvmesh.controller` with its log. Ports are free ones unless told; that of HTTP is its own choice."""

    def __init__(self, *flags: str, ports: dict[str, int] | None = None, http_port: int = 0) -> None:
        chosen = ports or dict(zip(("pull", "reply", "heartbeat"), free_ports(3), strict=True))
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "kvmesh.controller", "--host", "127.0.0.1"),
                *("--port", str(http_port), "--monitor-ports", json.dumps(chosen), *(flags or FAST)),
            ],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
        self.log: list[str] = []
        self._grown = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._grown:
                self.log.append(line.rstrip("\n"))
                self._grown.notify_all()
        with self._grown:
            self.log.append("")  # the end
            self._grown.notify_all()

    def wait_for_line(self, pattern: str, timeout_s: float = 30.0) -> re.Match[str]:
        """The first log line that matches."""

        def find() -> re.Match[str] | None:
            return next((found for line in self.log if (found := re.search(pattern, line))), None)

        with self._grown:
            self._grown.wait_for(lambda: find() or "" in self.log, timeout_s)
            found = find()
        assert found, f"no line matches {pattern!r} in:\n" + "\n".join(self.log)
        return found

    def wait_started(self) -> ControllerProcess:
        line = self.wait_for_line(r"event=started .*").group()
        self.ports = {name: int(port) for name, port in re.findall(r"(\w+)_port=(\d+)", line)}
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.ports['http']}", trust_env=False, timeout=20)
        return self

    def get(self, path: str) -> object:
        answer = self.http.get(path)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def stop(self, number: int = signal.SIGTERM) -> int:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)
        status = self.process.wait(20)
        self._reader.join(5)
        if self.process.stderr is not None:
            self.process.stderr.close()
        if hasattr(self, "http"):
            self.http.close()
        return status


@contextlib.contextmanager
def running_controller(
    *flags: str, ports: dict[str, int] | None = None, http_port: int = 0
) -> Iterator[ControllerProcess]:
    controller = ControllerProcess(*flags, ports=ports, http_port=http_port)
    try:
        yield controller.wait_started()
    finally:
        controller.stop(signal.SIGKILL)


def secure(socket: zmq.Socket[bytes]) -> None:
    """Before it is connected: with the cluster key that these tests run with, if any."""
    curve = environment_curve()
    if curve is not None:
        secure_node(socket, curve)


class Node:
    """A made-up member: a DEALER, a PUSH, a replica of what it hears. It does nothing by itself."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], ports: dict[str, int], member: wire.Member) -> None:
        self.member = member
        self.inventory: list[bytes] = []
        self.sequence = 0
        self.replica = Replica()
        self.notices: list[wire.Notice] = []
        self.registration = 0
        self.received_bytes = 0
        self.statistics = wire.NodeStatistics()
        self.dealer = self._connect(context, zmq.DEALER, ports["reply"])
        self.push = self._connect(context, zmq.PUSH, ports["pull"])
        self.heart = self._connect(context, zmq.DEALER, ports["heartbeat"]) if ports.get("heartbeat") else self.dealer

    @staticmethod
    def _connect(context: zmq.Context[zmq.Socket[bytes]], kind: int, port: int) -> zmq.Socket[bytes]:
        made = context.socket(kind)
        made.setsockopt(zmq.LINGER, 0)
        made.setsockopt(zmq.RECONNECT_IVL, 50)
        made.setsockopt(zmq.SNDTIMEO, 20_000)
        secure(made)
        made.connect(f"tcp://127.0.0.1:{port}")
        return made

    @property
    def who(self) -> tuple[str, str]:
        return self.member.instance_id, self.member.incarnation

    def say(self, message: wire.Message) -> None:
        self.dealer.send(wire.encode(message))

    def tell(self, message: wire.Message) -> None:
        self.push.send(wire.encode(message))

    def register(self) -> wire.Registered:
        """Register and send the inventory, as a node does."""
        self.say(wire.Register(self.member))
        answer = self.expect(wire.Registered)
        self.upload()
        return answer

    def upload(self) -> None:
        self.tell(wire.Snapshot(*self.who, self.sequence, self.inventory, first=True, last=True))

    def change(self, added: list[bytes] = (), removed: list[bytes] = (), skip: int = 0) -> wire.Changes:  # type: ignore[assignment]
        self.sequence += 1 + skip
        gone = set(removed)
        self.inventory = [key for key in self.inventory if key not in gone] + list(added)
        changes = wire.Changes(*self.who, self.sequence, list(added), list(removed))
        self.tell(changes)
        return changes

    def beat(self) -> wire.HeartbeatAck:
        """One heartbeat and its answer. Sent again when none comes: it may have died with a controller."""
        for _ in range(10):
            self.send_beat()
            with contextlib.suppress(AssertionError):
                return self.expect(wire.HeartbeatAck, timeout_s=2.0)
        raise AssertionError("no heartbeat is answered")

    def send_beat(self) -> None:
        beat = wire.Heartbeat(*self.who, self.sequence, self.statistics, self.registration, self.received_bytes)
        self.heart.send(wire.encode(beat))

    def live(self) -> None:
        """What a node does all the time: beat, register again when told to, send its inventory when asked."""
        seen = len(self.notices)
        if not self.beat().known:
            self.register()
        if any(isinstance(notice, wire.Resync) for notice in self.notices[seen:]):
            self.upload()

    def drain(self, timeout_ms: int = 0) -> None:
        """Take all notices that are there, waiting for the first."""
        for socket in {self.dealer, self.heart}:
            while socket.poll(timeout_ms):
                self._take(socket.recv())
                timeout_ms = 0

    def expect(self, kind: type[N], where: Callable[[N], bool] = lambda _: True, timeout_s: float = 20.0) -> N:
        """The next notice of a kind that has not been expected before."""

        def find() -> N | None:
            self.drain(20)
            for index, notice in enumerate(self.notices):
                if isinstance(notice, kind) and where(notice):
                    del self.notices[index]
                    return notice
            return None

        return wait_for(find, timeout_s)

    def expect_holders(self, key: bytes, *holders: str) -> None:
        """Wait until the replica names exactly these."""
        wait_for(lambda: self.drain(20) or sorted(self.replica.holders(key)) == sorted(holders))

    def _take(self, frame: bytes) -> None:
        notice = wire.notice_decoder.decode(frame)
        self.notices.append(notice)
        if isinstance(notice, wire.Registered):
            self.registration, self.received_bytes = notice.registration, 0
            now = {member.instance_id: member for member in notice.members}
            for known in self.replica.members():
                if known not in now:
                    self.replica.member_down(known, self.replica.incarnation(known) or "")
            for member in now.values():
                self.replica.member_up(member.instance_id, member.incarnation)
            return
        if not isinstance(notice, (wire.HeartbeatAck, wire.Refused)):
            self.received_bytes += len(frame)
        if isinstance(notice, wire.MemberUp):
            self.replica.member_up(notice.member.instance_id, notice.member.incarnation)
        elif isinstance(notice, wire.MembersUp):
            for member in notice.members:
                if member.instance_id != self.member.instance_id:
                    self.replica.member_up(member.instance_id, member.incarnation)
        elif isinstance(notice, wire.MemberDown):
            self.replica.member_down(notice.instance_id, notice.incarnation)
        elif isinstance(notice, wire.Changes | wire.Batch):
            for changes in [notice] if isinstance(notice, wire.Changes) else notice.changes:
                self.replica.apply_changes(
                    changes.instance_id, changes.incarnation, changes.sequence, changes.added, changes.removed
                )
        elif isinstance(notice, wire.Snapshot):
            self.replica.apply_snapshot(
                notice.instance_id, notice.incarnation, notice.sequence, notice.keys, notice.first, notice.last
            )
