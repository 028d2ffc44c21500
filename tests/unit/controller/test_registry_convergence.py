"""Whatever is delayed, lost, cut, stopped or restarted: when it ends, every replica is right."""

from __future__ import annotations

import secrets

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvmesh.controller import fanout
from kvmesh.wire import directory as wire
from unit.controller.makers import make_format, make_keys, make_member
from unit.controller.simulation import INTERVAL_S, TIMEOUT_S, Cluster, SimulatedNode

FORMATS = (make_format(), make_format(chunk_tokens=128))
KEYS = make_keys(12)
MAX_NODES = 5

which = st.integers(0, MAX_NODES - 1)
some_keys = st.frozensets(st.sampled_from(KEYS), max_size=5)


class ClusterMachine(RuleBasedStateMachine):
    """Random lives of up to five nodes of two formats."""

    def __init__(self) -> None:
        super().__init__()
        self.cluster = Cluster()
        self.names = 0

    @initialize(keys=st.lists(some_keys, min_size=3, max_size=3))
    def begin(self, keys: list[frozenset[bytes]]) -> None:
        for kind, held in zip((0, 0, 1), keys, strict=True):
            self.join(kind, held)
        self.cluster.settle()

    def node(self, index: int) -> SimulatedNode:
        return self.cluster.nodes[index % len(self.cluster.nodes)]

    @precondition(lambda self: len(self.cluster.nodes) < MAX_NODES)
    @rule(kind=st.sampled_from((0, 0, 0, 1)), keys=some_keys)
    def join(self, kind: int, keys: frozenset[bytes]) -> None:
        self.names += 1
        node = self.cluster.add(make_member(f"n{self.names}", peer_port=8000 + self.names, format=FORMATS[kind]))
        node.inventory = set(keys)
        node.register()

    @precondition(lambda self: self.cluster.nodes)
    @rule(index=which, added=some_keys, removed=some_keys)
    def change(self, index: int, added: frozenset[bytes], removed: frozenset[bytes]) -> None:
        self.node(index).change(set(added), set(removed - added))

    @precondition(lambda self: self.cluster.nodes)
    @rule(index=which, what=st.sampled_from(("request", "event", "notice")), times=st.integers(1, 4))
    def deliver(self, index: int, what: str, times: int) -> None:
        for _ in range(times):
            getattr(self.cluster, f"deliver_{what}")(self.node(index))

    @rule()
    def settle(self) -> None:
        self.cluster.settle()

    @rule()
    def flush(self) -> None:
        self.cluster.flush()

    @rule()
    def send_owed(self) -> None:
        self.cluster.send(self.cluster.registry.next_snapshot(self.cluster.now_s))

    @precondition(lambda self: self.cluster.nodes)
    @rule(index=which)
    def lose_event(self, index: int) -> None:
        if self.node(index).events:
            self.node(index).events.popleft()

    @precondition(lambda self: self.cluster.nodes)
    @rule(index=which)
    def lose_notice(self, index: int) -> None:
        if self.node(index).notices:
            self.node(index).notices.popleft()

    @precondition(lambda self: self.cluster.nodes)
    @rule(index=which)
    def beat(self, index: int) -> None:
        self.node(index).beat()

    @precondition(lambda self: self.cluster.nodes)
    @rule(index=which)
    def reconnect(self, index: int) -> None:
        self.cluster.reconnect(self.node(index))

    @precondition(lambda self: self.cluster.nodes)
    @rule(index=which, reads=st.booleans())
    def stop_or_go_on_reading(self, index: int, reads: bool) -> None:
        self.node(index).reads = reads

    @precondition(lambda self: self.cluster.nodes)
    @rule(index=which, back=st.booleans())
    def die(self, index: int, back: bool) -> None:
        if back:
            self.cluster.restart(self.node(index)).register()
        else:
            self.cluster.kill(self.node(index))

    @precondition(lambda self: self.cluster.nodes)
    @rule(index=which)
    def leave(self, index: int) -> None:
        node = self.node(index)
        self.cluster.send(self.cluster.registry.on_request(wire.Leave(*node.who), node.peer, self.cluster.now_s))
        self.cluster.kill(node)

    @rule()
    def restart_controller(self) -> None:
        self.cluster.restart_controller()

    @rule(seconds=st.sampled_from((0.5, INTERVAL_S, TIMEOUT_S + 1)))
    def wait(self, seconds: float) -> None:
        self.cluster.now_s += seconds
        self.cluster.send(self.cluster.registry.tick(self.cluster.now_s))

    @invariant()
    def integrity(self) -> None:
        self.cluster.registry.check_integrity()

    @invariant()
    def formats_never_mix(self) -> None:
        """No frame about a chunk reaches a member of another format than its publisher's."""
        formats = {node.peer: node.member.format for node in self.cluster.nodes}
        publishers = {node.who: node.member.format for node in self.cluster.nodes}
        for send in self.cluster.sent:
            message = send.message
            for one in message.changes if isinstance(message, wire.Batch) else [message]:
                if isinstance(one, (wire.Changes, wire.Snapshot)):
                    publisher = publishers.get((one.instance_id, one.incarnation))
                    assert publisher is None or all(formats.get(peer, publisher) == publisher for peer in send.to)
        self.cluster.sent.clear()

    def teardown(self) -> None:
        """The trouble ends; a few heartbeats later everybody knows everything."""
        for node in self.cluster.nodes:
            node.reads = True
        self.cluster.pass_time(16)
        self.cluster.check_converged()
        for node in self.cluster.nodes:
            assert not node.refusals


ClusterMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestConvergence = ClusterMachine.TestCase


def test_large_inventory_goes_out_in_parts_below_the_limits(monkeypatch):
    """No part is larger than a receiver accepts, and together they are the inventory."""
    cluster = Cluster()
    a = cluster.add(make_member("a"))
    a.inventory = {secrets.token_bytes(36) for _ in range(2 * fanout.SNAPSHOT_PART_KEYS + 1)}
    a.registered = True
    cluster.registry.on_request(wire.Register(a.member), a.peer, cluster.now_s)
    whole = wire.Snapshot(*a.who, 0, list(a.inventory), first=True, last=True)
    cluster.registry.on_event(whole, wire.encode(whole), cluster.now_s)
    cluster.flush()
    b = cluster.add(msgspec.structs.replace(make_member("b"), peer_port=1))
    cluster.registry.on_request(wire.Register(b.member), b.peer, cluster.now_s)
    parts = [send.message for send in cluster.registry.next_snapshot(cluster.now_s)]
    assert len(parts) == 3
    assert max(len(part.keys) for part in parts) <= fanout.SNAPSHOT_PART_KEYS
    assert {key for part in parts for key in part.keys} == a.inventory
