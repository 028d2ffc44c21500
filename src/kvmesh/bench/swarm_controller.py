"""A swarm's link to the controller: each instance with a DEALER and a PUSH of its own, as a node has them.

The first instances of each process decode all that they hear and measure delays; the others count bytes, which their
heartbeats have to tell, and decode only what they must answer.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import zmq

from kvmesh.bench.swarm import SimulatedInstance, SwarmPlan, SwarmStatistics
from kvmesh.wire import directory as wire
from kvmesh.wire.auth import ClusterKey
from kvmesh.wire.curve import CurveKeys, secure_node

WITNESSES = 2
"""Instances per process that decode what they hear."""
SEND_QUEUE_FRAMES = 10_000
_TAG_END = 20


@dataclass(frozen=True)
class ControllerUrls:
    """Where the controller is."""

    pull: str
    reply: str
    cluster_key: str | None = field(default=None, repr=False)
    asks: bool = False
    """The instances ask who holds a chunk, so they are told no inventories."""


@dataclass(slots=True)
class _Session:
    """One instance's connection."""

    instance: SimulatedInstance
    dealer: zmq.Socket[bytes]
    push: zmq.Socket[bytes]
    is_witness: bool
    registration: int = 0
    received_bytes: int = 0
    is_joined: bool = False
    """Has been a member before."""
    is_registered: bool = False
    """The controller's answer to Register has come, and it has not said since that it does not know us."""
    sequences: dict[str, int] = field(default_factory=dict)
    """Of others, as heard; witnesses only."""


class ControllerLink:
    """See `kvmesh.bench.swarm.Link`."""

    def __init__(self, urls: ControllerUrls, plan: SwarmPlan) -> None:
        self.statistics = SwarmStatistics()
        self._urls = urls
        self._curve = None if urls.cluster_key is None else CurveKeys.derive(ClusterKey(urls.cluster_key))
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, 2 * plan.instances + 64)
        self._poller = zmq.Poller()
        self._sessions: dict[zmq.Socket[bytes], _Session] = {}

    def join(self, instance: SimulatedInstance) -> None:
        dealer = self._connect(zmq.DEALER, self._urls.reply)
        push = self._connect(zmq.PUSH, self._urls.pull)
        session = _Session(instance, dealer, push, is_witness=len(self._sessions) < WITNESSES)
        instance.session = session
        self._sessions[dealer] = session
        self._poller.register(dealer, zmq.POLLIN)
        self._register(session)

    def publish(self, instance: SimulatedInstance, added: bytes, removed: bytes) -> None:
        session = instance.session
        assert isinstance(session, _Session)
        member = instance.member
        gone = [removed] if removed else []
        changes = wire.Changes(member.instance_id, member.incarnation, instance.sequence, [added], gone)
        self._tell(session, changes)

    def beat(self, instance: SimulatedInstance) -> None:
        session = instance.session
        assert isinstance(session, _Session)
        if not session.is_registered:
            self._register(session)
            return
        member = instance.member
        statistics = wire.NodeStatistics(published_chunks=len(instance.inventory))
        beat = wire.Heartbeat(
            member.instance_id,
            member.incarnation,
            instance.sequence,
            statistics,
            session.registration,
            session.received_bytes,
        )
        self._send(session.dealer, wire.encode(beat))

    def poll(self, timeout_s: float) -> None:
        for socket, _ in self._poller.poll(int(timeout_s * 1000)):
            session = self._sessions[socket]
            while True:
                try:
                    frame = socket.recv(zmq.NOBLOCK)
                except zmq.Again:
                    break
                self._take(session, frame)

    def close(self) -> None:
        for session in self._sessions.values():
            member = session.instance.member
            self._send(session.dealer, wire.encode(wire.Leave(member.instance_id, member.incarnation)))
        self._context.destroy(linger=500)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _connect(self, kind: int, url: str) -> zmq.Socket[bytes]:
        made = self._context.socket(kind)
        made.setsockopt(zmq.LINGER, 0)
        made.setsockopt(zmq.SNDHWM, SEND_QUEUE_FRAMES)
        made.setsockopt(zmq.RCVHWM, 0)  # the swarm is never the slow one: what it does not read would be measured
        if self._curve is not None:
            secure_node(made, self._curve)
        made.connect(url)
        return made

    def _take(self, session: _Session, frame: bytes) -> None:
        self.statistics.notices += 1
        self.statistics.received_bytes += len(frame)
        kind = tag_of(frame)
        if kind not in {"Registered", "HeartbeatAck", "Refused", "Ask"}:
            session.received_bytes += len(frame)
            if not session.is_witness and kind != "Resync":
                return
        elif kind == "Ask":
            return
        notice = wire.notice_decoder.decode(frame)
        if isinstance(notice, wire.Changes):
            self._hear(session, [notice])
        elif isinstance(notice, wire.Batch):
            self._hear(session, notice.changes)
        elif isinstance(notice, wire.Snapshot) and notice.last:
            session.sequences[notice.instance_id] = notice.sequence
        elif isinstance(notice, wire.Registered):
            self._registered(session, notice)
        elif isinstance(notice, wire.HeartbeatAck) and not notice.known and session.is_registered:
            self._register(session)
        elif isinstance(notice, wire.Resync):
            self.statistics.resyncs += 1
            self._upload(session)
        elif isinstance(notice, wire.Refused):
            self.statistics.refused += 1

    def _register(self, session: _Session) -> None:
        session.is_registered = False
        self._send(session.dealer, wire.encode(wire.Register(session.instance.member, asks=self._urls.asks)))

    def _registered(self, session: _Session, notice: wire.Registered) -> None:
        session.is_registered = True
        session.registration, session.received_bytes = notice.registration, 0
        session.sequences.clear()
        if not session.is_joined:
            session.is_joined = True
            self.statistics.joined += 1
        self._upload(session)

    def _hear(self, session: _Session, heard: list[wire.Changes]) -> None:
        now_ns = time.monotonic_ns()
        own = session.instance.member.instance_id
        for changes in heard:
            if changes.instance_id == own:
                continue
            self.statistics.changes_heard += 1
            known = session.sequences.get(changes.instance_id)
            if known is not None and changes.sequence > known + 1:
                self.statistics.gaps += 1
            session.sequences[changes.instance_id] = max(known or 0, changes.sequence)
            for key in changes.added:
                self.statistics.hear(key, now_ns)

    def _upload(self, session: _Session) -> None:
        instance, member = session.instance, session.instance.member
        keys = list(instance.inventory)
        starts = range(0, len(keys), wire.MAX_KEYS_PER_MESSAGE) or range(1)
        for start in starts:
            part = keys[start : start + wire.MAX_KEYS_PER_MESSAGE]
            is_last = start == starts[-1]
            who = member.instance_id, member.incarnation
            self._tell(session, wire.Snapshot(*who, instance.sequence, part, start == 0, is_last))

    def _tell(self, session: _Session, event: wire.Changes | wire.Snapshot) -> None:
        self._send(session.push, wire.encode(event))

    @staticmethod
    def _send(socket: zmq.Socket[bytes], frame: bytes) -> None:
        """Without waiting; what the queue does not take is lost, as with a node."""
        try:
            socket.send(frame, zmq.NOBLOCK)
        except zmq.Again:
            return


def tag_of(frame: bytes) -> str:
    """The name of a message's class, read off its encoding: an array whose first element is the name."""
    if len(frame) < 2 or not 0xA0 <= frame[1] <= 0xBF:
        return ""
    return frame[2 : 2 + min(frame[1] - 0xA0, _TAG_END)].decode("ascii", "replace")
