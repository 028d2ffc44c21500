"""Made-up nodes around a real registry, joined by queues that a test may delay, cut and lose from.

A node here does what the protocol asks of a node, and no more: it registers until it is answered, beats, sends its
inventory when asked, and asks for snapshots after a gap.
"""

from __future__ import annotations

import secrets
from collections import deque
from itertools import count

import msgspec

from kvmesh.controller.instances import Peer, Send
from kvmesh.controller.registry import Registry, SendFailure
from kvmesh.core.replica import Replica
from kvmesh.wire import directory as wire

INTERVAL_S = 2.0
TIMEOUT_S = 7.0


class SimulatedNode:
    """One instance. Its connections are queues: `requests` and `events` up, `notices` down."""

    def __init__(self, member: wire.Member, peer: Peer) -> None:
        self.member = member
        self.peer = peer
        self.requests: deque[wire.Request] = deque()
        self.events: deque[wire.Event] = deque()
        self.notices: deque[tuple[wire.Notice, int]] = deque()
        self.inventory: set[bytes] = set()
        self.sequence = 0
        self.replica = Replica()
        self.registered = False
        self.alive = True
        self.reads = True
        """False: the queue towards it is full."""
        self.registration = 0
        self.received_bytes = 0
        self.refusals: list[wire.Refused] = []
        self._asked: set[str] = set()

    @property
    def who(self) -> tuple[str, str]:
        return self.member.instance_id, self.member.incarnation

    def register(self) -> None:
        self.registered = False
        self.requests.append(wire.Register(self.member))

    def beat(self) -> None:
        if not self.registered:
            self.register()
            return
        statistics = wire.NodeStatistics(published_chunks=len(self.inventory))
        self.requests.append(
            wire.Heartbeat(*self.who, self.sequence, statistics, self.registration, self.received_bytes)
        )

    def change(self, added: set[bytes], removed: set[bytes]) -> None:
        self.sequence += 1
        self.inventory = (self.inventory - removed) | added
        self.events.append(wire.Changes(*self.who, self.sequence, list(added), list(removed)))

    def upload(self, part_keys: int = 3) -> None:
        keys = sorted(self.inventory)
        starts = range(0, len(keys), part_keys) or range(1)
        for start in starts:
            part = keys[start : start + part_keys]
            self.events.append(wire.Snapshot(*self.who, self.sequence, part, start == 0, start == starts[-1]))

    def receive(self, notice: wire.Notice, size_bytes: int) -> None:
        if isinstance(notice, wire.Registered):
            self._registered(notice)
            return
        if isinstance(notice, wire.Refused):
            self.refusals.append(notice)
            return
        if isinstance(notice, wire.HeartbeatAck):
            if not notice.known:
                self.register()
            return
        self.received_bytes += size_bytes
        if isinstance(notice, wire.MemberUp):
            self.replica.member_up(notice.member.instance_id, notice.member.incarnation)
        elif isinstance(notice, wire.MembersUp):
            for member in notice.members:
                if member.instance_id != self.member.instance_id:
                    self.replica.member_up(member.instance_id, member.incarnation)
        elif isinstance(notice, wire.MemberDown):
            self.replica.member_down(notice.instance_id, notice.incarnation)
        elif isinstance(notice, wire.Resync):
            self.upload()
        elif isinstance(notice, wire.Changes | wire.Batch):
            for changes in [notice] if isinstance(notice, wire.Changes) else notice.changes:
                self._apply(changes)
        else:
            applied = self.replica.apply_snapshot(
                notice.instance_id, notice.incarnation, notice.sequence, notice.keys, notice.first, notice.last
            )
            if applied.gap:
                self.requests.append(wire.SnapshotRequest(notice.instance_id, notice.incarnation))
            elif notice.last:
                self._asked.discard(notice.instance_id)

    def _apply(self, changes: wire.Changes) -> None:
        applied = self.replica.apply_changes(
            changes.instance_id, changes.incarnation, changes.sequence, changes.added, changes.removed
        )
        if applied.gap and changes.instance_id not in self._asked:
            self._asked.add(changes.instance_id)
            self.requests.append(wire.SnapshotRequest(changes.instance_id, changes.incarnation))

    def _registered(self, notice: wire.Registered) -> None:
        self.registered, self.registration, self.received_bytes = True, notice.registration, 0
        self._asked.clear()
        listed = {member.instance_id for member in notice.members}
        for known in self.replica.members():
            if known not in listed:
                self.replica.member_down(known, self.replica.incarnation(known) or "")
        for member in notice.members:
            self.replica.member_up(member.instance_id, member.incarnation)
        self.upload()


class Cluster:
    """Registry, nodes, time and the network between them."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.nodes: list[SimulatedNode] = []
        self._peers = count(1)
        self.sent: list[Send] = []
        """Everything the registry has asked to send since the test last looked."""
        self.registry = self.make_registry()

    @staticmethod
    def make_registry() -> Registry:
        return Registry(incarnation=secrets.token_hex(8), heartbeat_interval_s=INTERVAL_S, instance_timeout_s=TIMEOUT_S)

    def new_peer(self) -> Peer:
        return Peer("reply", b"peer%d" % next(self._peers))

    def add(self, member: wire.Member) -> SimulatedNode:
        node = SimulatedNode(member, self.new_peer())
        self.nodes.append(node)
        return node

    def restart(self, node: SimulatedNode) -> SimulatedNode:
        """The process dies and comes back: nothing is left of the old one but its address."""
        self.kill(node)
        return self.add(msgspec.structs.replace(node.member, incarnation=secrets.token_hex(8)))

    def kill(self, node: SimulatedNode) -> None:
        node.alive = False
        self.nodes.remove(node)

    def reconnect(self, node: SimulatedNode) -> None:
        """The connection breaks and comes back by itself; the node does not notice that notices were lost."""
        node.peer = self.new_peer()
        node.notices.clear()

    def restart_controller(self) -> None:
        self.registry = self.make_registry()
        for node in self.nodes:
            self.reconnect(node)

    # -- delivery ------------------------------------------------------------------------------------------------------

    def deliver_request(self, node: SimulatedNode) -> None:
        if node.requests:
            self.send(self.registry.on_request(node.requests.popleft(), node.peer, self.now_s))

    def deliver_event(self, node: SimulatedNode) -> None:
        if node.events:
            event = node.events.popleft()
            self.send(self.registry.on_event(event, wire.encode(event), self.now_s))

    def flush(self) -> None:
        self.send(self.registry.flush(self.now_s))

    def deliver_notice(self, node: SimulatedNode) -> None:
        if node.notices:
            node.receive(*node.notices.popleft())

    def send(self, sends: list[Send]) -> None:
        """As the feed does it."""
        self.sent += sends
        by_peer = {node.peer: node for node in self.nodes}
        full: set[Peer] = set()
        for send in sends:
            assert wire.notice_decoder.decode(send.frame) == send.message
            for peer in send.to:
                node = by_peer.get(peer)
                bulk = isinstance(send.message, (wire.Changes, wire.Batch, wire.Snapshot))
                if node is not None and node.reads and not (bulk and peer in full):
                    node.notices.append((send.message, len(send.frame)))
                    continue
                full.add(peer)
                failure = SendFailure.GONE if node is None else SendFailure.FULL
                self.registry.on_send_failed(peer, send, failure, self.now_s)

    def settle(self) -> None:
        """Deliver everything, and what comes of it, until nothing moves."""
        moving = True
        while moving:
            moving = False
            for node in self.nodes:
                while node.requests or node.events or node.notices:
                    moving = True
                    self.deliver_request(node)
                    self.deliver_event(node)
                    self.deliver_notice(node)
            if self.registry.has_held():
                moving = True
                self.flush()
            while sends := self.registry.next_snapshot(self.now_s):
                moving = True
                self.send(sends)

    def pass_time(self, intervals: int = 1) -> None:
        """Let so many heartbeat intervals go by, everybody living as they should."""
        for _ in range(intervals):
            self.now_s += INTERVAL_S
            for node in self.nodes:
                node.beat()
            self.settle()
            self.send(self.registry.tick(self.now_s))
            self.settle()

    # -- what must hold ------------------------------------------------------------------------------------------------

    def check_converged(self) -> None:
        """Everybody knows exactly what everybody else of their format holds."""
        assert sorted(self.registry.instances) == sorted(node.member.instance_id for node in self.nodes)
        for node in self.nodes:
            group = self.registry.instances[node.member.instance_id].group
            assert group.replica.keys_of(node.member.instance_id) == node.inventory
            node.replica.check_integrity()
            assert set(node.replica.members()) == set(self.registry.instances) - {node.member.instance_id}
            for other in self.nodes:
                if other is node:
                    continue
                same = other.member.format == node.member.format
                known = node.replica.keys_of(other.member.instance_id)
                assert known == (other.inventory if same else set()), (node.who, other.who)
