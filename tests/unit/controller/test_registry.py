from __future__ import annotations

import logging
from collections import Counter

import msgspec
import pytest

from kvmesh.controller import downstream, fanout, registry
from kvmesh.controller.formats import incompatibilities
from kvmesh.controller.instances import Peer, Send
from kvmesh.controller.registry import SendFailure
from kvmesh.controller.views import instance_view
from kvmesh.wire import directory as wire
from unit.controller.makers import make_format, make_keys, make_member
from unit.controller.simulation import INTERVAL_S, TIMEOUT_S, Cluster, SimulatedNode

OTHER_FORMAT = make_format(chunk_tokens=128)


def told(
    sends: list[Send], kind: type[wire.Message] | tuple[type[wire.Message], ...]
) -> list[tuple[wire.Message, tuple[Peer, ...]]]:
    return [(send.message, send.to) for send in sends if isinstance(send.message, kind)]


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


@pytest.fixture
def pair(cluster: Cluster) -> tuple[SimulatedNode, SimulatedNode]:
    """Two members of one format that know of each other."""
    nodes = cluster.add(make_member("a")), cluster.add(make_member("b", peer_port=8201))
    cluster.pass_time(2)
    cluster.check_converged()
    cluster.sent.clear()
    return nodes


class TestRegistering:
    def test_newcomer_is_told_of_others_and_others_of_it(self, cluster, pair):
        """Registered lists everybody else, of every format; everybody else gets MemberUp."""
        c = cluster.add(make_member("c", format=OTHER_FORMAT))
        c.register()
        cluster.deliver_request(c)
        (answer, to), *_ = told(cluster.sent, wire.Registered)
        assert to == (c.peer,)
        assert {member.instance_id for member in answer.members} == {"a", "b"}
        cluster.flush()
        ((up, to),) = told(cluster.sent, wire.MemberUp)
        assert up.member == c.member
        assert set(to) == {pair[0].peer, pair[1].peer}

    def test_other_protocol_version_is_refused(self, cluster):
        """The answer says which versions met."""
        sends = cluster.registry.on_request(wire.Register(make_member("a"), protocol=99), cluster.new_peer(), 0.0)
        (send,) = sends
        assert send.message.code == "protocol_version"
        assert "99" in send.message.text
        assert not cluster.registry.instances

    def test_registering_again_changes_nothing_for_others(self, cluster, pair):
        """The same incarnation may register as often as it likes; the others hear nothing of it."""
        pair[0].register()
        cluster.settle()
        assert not told(cluster.sent, wire.MemberUp)
        assert not told(cluster.sent, wire.MemberDown)
        cluster.check_converged()

    def test_repeats_are_answered_once(self, cluster, pair):
        """Who is not answered soon enough asks again; it is sent members and inventories once all the same."""
        a, _ = pair
        c = cluster.add(make_member("c"))
        for _ in range(5):
            c.register()
            cluster.deliver_request(c)
            cluster.now_s += INTERVAL_S / 4
        cluster.settle()
        assert len(told(cluster.sent, wire.Registered)) == 1
        of_a = [to for message, to in told(cluster.sent, wire.Snapshot) if message.instance_id == a.who[0]]
        assert of_a == [(c.peer,)]
        assert cluster.registry.counters.repeated == 4
        cluster.check_converged()

    def test_who_waits_for_an_answer_is_alive(self, cluster, pair):
        """Its repeats are all that is heard of it, when we are behind for longer than the time-out."""
        c = cluster.add(make_member("c"))
        for _ in range(4):
            c.register()
            cluster.deliver_request(c)
            cluster.now_s += TIMEOUT_S / 2
            cluster.registry.tick(cluster.now_s)
        assert "c" in cluster.registry.instances
        assert cluster.registry.counters.registrations == 3

    @pytest.mark.parametrize("change", ["connection", "asks", "address", "time"])
    def test_a_repeat_that_says_something_new_is_answered(self, cluster, pair, change):
        """Another connection has not got our answer; somebody else's wishes have changed; and after long enough we are
        the ones who may be wrong.
        """
        c = cluster.add(make_member("c"))
        c.register()
        cluster.deliver_request(c)
        again = wire.Register(c.member)
        if change == "connection":
            cluster.reconnect(c)
        elif change == "asks":
            again = wire.Register(c.member, asks=True)
        elif change == "address":
            again = wire.Register(msgspec.structs.replace(c.member, peer_port=9999))
        else:
            cluster.now_s += downstream.ANSWER_HEARTBEATS * INTERVAL_S
        cluster.sent.clear()
        cluster.send(cluster.registry.on_request(again, c.peer, cluster.now_s))
        assert [to for _, to in told(cluster.sent, wire.Registered)] == [(c.peer,)]

    def test_heartbeats_from_before_the_answer_prove_no_loss(self, cluster, pair):
        """A controller that is behind reads them after the Register; who has sent them need not register once more."""
        a, _ = pair
        cluster.reconnect(a)
        cluster.send(cluster.registry.on_request(wire.Register(a.member), a.peer, cluster.now_s))
        for _ in range(5):
            beat = wire.Heartbeat(*a.who, a.sequence, wire.NodeStatistics(), registration=10**6)
            (ack,) = cluster.registry.on_request(beat, a.peer, cluster.now_s)
            assert ack.message.known
        assert not cluster.registry.instances["a"].downstream.lost

    def test_newcomers_that_come_together_are_told_in_one_frame(self, cluster, pair):
        """And nothing of what they hold goes out before it."""
        newcomers = [cluster.add(make_member(f"n{index}")) for index in range(5)]
        for node in newcomers:
            node.inventory = set(make_keys(2, node.who[0]))
            node.register()
            cluster.deliver_request(node)
            cluster.deliver_notice(node)
            node.change(set(make_keys(1, "new" + node.who[0])), set())
            while node.events:
                cluster.deliver_event(node)
        while sends := cluster.registry.next_snapshot(cluster.now_s):
            cluster.send(sends)
        assert {part.instance_id for part, _ in told(cluster.sent, wire.Snapshot)} == {"a", "b"}
        assert not told(cluster.sent, (wire.Changes, wire.Batch, wire.MemberUp))
        cluster.flush()
        ((ups, to),) = told(cluster.sent, wire.MembersUp)
        assert {member.instance_id for member in ups.members} == {node.who[0] for node in newcomers}
        assert {node.peer for node in pair} <= set(to)
        cluster.settle()
        assert len(told(cluster.sent, wire.MembersUp)) == 1
        cluster.check_converged()

    def test_who_has_gone_before_it_was_told_of_is_not_told_of(self, cluster, pair):
        """A MemberUp after the MemberDown would bring it back."""
        c, d = (cluster.add(make_member(name)) for name in "cd")
        for node in (c, d):
            node.register()
            cluster.deliver_request(node)
        cluster.send(cluster.registry.on_request(wire.Leave(*c.who), c.peer, cluster.now_s))
        cluster.kill(c)
        cluster.flush()
        assert [up.member.instance_id for up, _ in told(cluster.sent, wire.MemberUp)] == ["d"]
        cluster.settle()
        cluster.check_converged()

    def test_a_restart_of_the_controller_costs_each_inventory_once(self, cluster):
        """However impatient the members are while it is behind: one answer each, each inventory once to each, and few
        frames about who is a member.
        """
        nodes = [cluster.add(make_member(f"n{index}", peer_port=8000 + index)) for index in range(12)]
        for node in nodes:
            node.inventory = set(make_keys(4, node.who[0]))
        cluster.pass_time(2)
        cluster.check_converged()
        cluster.restart_controller()
        cluster.sent.clear()
        for _ in range(3):  # while it was behind, all beat and asked several times
            for node in nodes:
                node.beat()
        for _ in range(3):
            for node in nodes:
                cluster.deliver_request(node)
        for node in nodes:
            while node.notices:
                cluster.deliver_notice(node)
            node.beat()
        for node in nodes:
            while node.requests:
                cluster.deliver_request(node)
        cluster.settle()
        cluster.check_converged()
        assert cluster.registry.counters.registrations == len(told(cluster.sent, wire.Registered)) == len(nodes)
        pairs = Counter((part.instance_id, peer) for part, to in told(cluster.sent, wire.Snapshot) for peer in to)
        assert len(pairs) == len(nodes) * (len(nodes) - 1)
        assert set(pairs.values()) == {1}
        assert len(told(cluster.sent, (wire.MemberUp, wire.MembersUp))) == 1
        cluster.pass_time(3)
        assert cluster.registry.counters.registrations == len(nodes)

    def test_changed_address_is_told(self, cluster, pair):
        """The same incarnation with another port reaches the others as MemberUp."""
        pair[0].member = msgspec.structs.replace(pair[0].member, peer_port=9999)
        pair[0].register()
        cluster.settle()
        ((up, _),) = told(cluster.sent, wire.MemberUp)
        assert up.member.peer_port == 9999

    def test_connection_belongs_to_one_instance(self, cluster, pair):
        """A second instance on the connection of a living one is refused."""
        cluster.send(cluster.registry.on_request(wire.Register(make_member("z")), pair[0].peer, cluster.now_s))
        assert told(cluster.sent, wire.Refused)[0][0].code == "connection_in_use"
        assert "z" not in cluster.registry.instances

    def test_limit_of_instances(self, cluster, pair, monkeypatch):
        """Made-up instances cannot take memory without bound."""
        monkeypatch.setattr(registry, "MAX_INSTANCES", 2)
        c = cluster.add(make_member("c"))
        c.register()
        cluster.settle()
        assert [refused.code for refused in c.refusals] == ["too_many_instances"]


class TestDuplicates:
    def test_restart_at_the_same_address_replaces_at_once(self, cluster, pair):
        """A killed and restarted process need not wait for the old one's time-out; old entries vanish at once."""
        a, b = pair
        a.change(set(make_keys(3)), set())
        cluster.settle()
        assert b.replica.keys_of("a")
        again = cluster.restart(a)
        again.register()
        cluster.deliver_request(again)
        assert told(cluster.sent, wire.MemberDown)[0][0] == wire.MemberDown(*a.who, "replaced")
        cluster.settle()
        assert not b.replica.keys_of("a")
        cluster.check_converged()

    def test_living_instance_elsewhere_is_not_replaced(self, cluster, pair):
        """Two processes with one id: the second is refused, with the id and both addresses."""
        rival = cluster.add(make_member("a", peer_host="10.0.0.9"))
        rival.register()
        cluster.settle()
        (refused,) = rival.refusals
        assert refused.code == "duplicate_instance"
        for part in ("instance id a ", "127.0.0.1:8200", "10.0.0.9:8200"):
            assert part in refused.text
        assert cluster.registry.instances["a"].incarnation == pair[0].who[1]

    def test_silent_instance_elsewhere_is_replaced(self, cluster, pair):
        """A pod that moved to another address gets its id when the old one has been silent for 1.5 intervals."""
        cluster.kill(pair[0])
        moved = cluster.add(make_member("a", peer_host="10.0.0.9"))
        cluster.now_s += INTERVAL_S * 1.5 + 0.01
        moved.register()
        cluster.settle()
        assert not moved.refusals
        assert cluster.registry.instances["a"].incarnation == moved.who[1]

    def test_two_living_processes_with_one_address_do_not_take_turns(self, cluster, pair):
        """Copied settings on two hosts, both advertising localhost: one of them wins, the other is told why."""
        first = pair[0]
        second = cluster.add(msgspec.structs.replace(first.member, incarnation="f" * 16))
        cluster.pass_time(4)
        assert cluster.registry.instances["a"].incarnation == second.who[1]
        assert {refused.code for refused in first.refusals} == {"duplicate_instance"}
        assert cluster.registry.counters.registrations == 3

    def test_same_incarnation_with_another_format_starts_over(self, cluster, pair):
        """No entry survives in the group of the former format."""
        a, b = pair
        a.change(set(make_keys(2)), set())
        cluster.settle()
        a.member = msgspec.structs.replace(a.member, format=OTHER_FORMAT)
        a.register()
        cluster.settle()
        cluster.registry.check_integrity()
        assert not cluster.registry.instances["b"].group.replica.keys_of("a")
        assert not b.replica.keys_of("a")


class TestContact:
    def test_heartbeat_of_a_stranger_is_answered_with_known_false(self, cluster):
        """So a node learns that the controller was restarted."""
        beat = wire.Heartbeat("a", "0" * 16, 0, wire.NodeStatistics())
        (send,) = cluster.registry.on_request(beat, cluster.new_peer(), 0.0)
        assert send.message == wire.HeartbeatAck(cluster.registry.incarnation, known=False)

    def test_heartbeat_of_a_replaced_incarnation_is_unknown(self, cluster, pair):
        again = cluster.restart(pair[0])
        again.register()
        cluster.settle()
        beat = wire.Heartbeat(*pair[0].who, 0, wire.NodeStatistics())
        (send,) = cluster.registry.on_request(beat, pair[0].peer, cluster.now_s)
        assert send.message.known is False

    def test_silence_ends_membership(self, cluster, pair):
        """After the time-out everybody is told, and the entries are gone."""
        a, b = pair
        a.change(set(make_keys(3)), set())
        cluster.settle()
        cluster.kill(a)
        for _ in range(int(TIMEOUT_S / INTERVAL_S)):
            cluster.pass_time()
            assert "a" in cluster.registry.instances
        cluster.pass_time()
        assert told(cluster.sent, wire.MemberDown)[0][0] == wire.MemberDown(*a.who, "timeout")
        assert not b.replica.keys_of("a")
        assert [gone.reason for gone in cluster.registry.departed.values()] == ["timeout"]

    def test_events_count_as_signs_of_life(self, cluster, pair):
        """A node whose heartbeats are late behind bulk is not dropped."""
        a, _ = pair
        for index in range(10):
            cluster.now_s += 1.0
            a.change(set(make_keys(1, f"{index}-")), set())
            cluster.settle()
            cluster.send(cluster.registry.tick(cluster.now_s))
        assert "a" in cluster.registry.instances

    def test_suspect_before_dropped(self, cluster, pair):
        cluster.registry.tick(cluster.now_s)
        instance = cluster.registry.instances["a"]
        assert cluster.registry.state(instance, cluster.now_s) == "up"
        assert cluster.registry.state(instance, cluster.now_s + INTERVAL_S * 1.6) == "suspect"

    def test_own_pause_is_not_held_against_members(self, cluster, pair):
        """A controller that was stopped for a minute drops nobody before having read what waits in its sockets."""
        cluster.registry.tick(cluster.now_s)
        cluster.now_s += 60
        assert cluster.registry.tick(cluster.now_s) == []
        for _ in range(int(TIMEOUT_S) + 1):
            cluster.now_s += 1.0
            cluster.registry.tick(cluster.now_s)
        assert not cluster.registry.instances, "but silence after it is"

    def test_being_behind_is_not_held_against_members(self, cluster, pair):
        """Heartbeats that have come and wait to be read are no silence."""
        cluster.registry.tick(cluster.now_s)
        for _ in range(int(TIMEOUT_S) + 5):
            cluster.now_s += 1.0
            assert cluster.registry.tick(cluster.now_s, behind_s=TIMEOUT_S) == []
        cluster.now_s += 1.0
        cluster.registry.tick(cluster.now_s)
        assert not cluster.registry.instances

    def test_leaving_is_told(self, cluster, pair):
        a, b = pair
        cluster.send(cluster.registry.on_request(wire.Leave(*a.who), a.peer, cluster.now_s))
        assert told(cluster.sent, wire.MemberDown) == [(wire.MemberDown(*a.who, "left"), (b.peer,))]
        cluster.registry.check_integrity()


class TestInventories:
    def test_changes_are_forwarded_as_they_came(self, cluster, pair):
        """The publisher's own frame, to everybody of its format but itself."""
        a, b = pair
        changes = wire.Changes(*a.who, 1, make_keys(2), [])
        frame = wire.encode(changes)
        assert not cluster.registry.on_event(changes, frame, cluster.now_s)
        (send,) = cluster.registry.flush(cluster.now_s)
        assert send.frame is frame
        assert send.to == (b.peer,)

    def test_old_changes_go_nowhere(self, cluster, pair):
        a, _ = pair
        a.change(set(make_keys(1)), set())
        again = a.events[0]
        cluster.settle()
        assert cluster.registry.on_event(again, wire.encode(again), cluster.now_s) == []
        assert cluster.registry.flush(cluster.now_s) == []

    def test_gap_asks_the_publisher_and_spares_the_others(self, cluster, pair):
        """The others get the snapshot that the publisher sends, not a gap of their own."""
        a, _ = pair
        cluster.now_s += 10
        a.change(set(make_keys(1)), set())
        a.events.clear()  # lost
        a.change(set(make_keys(2)), set())
        cluster.deliver_event(a)
        assert told(cluster.sent, wire.Resync) == [(wire.Resync(*a.who), (a.peer,))]
        assert not told(cluster.sent, wire.Changes)
        cluster.settle()
        cluster.check_converged()
        assert not told(cluster.sent, wire.SnapshotRequest)

    def test_resync_is_not_asked_for_again_and_again(self, cluster, pair):
        a, _ = pair
        cluster.now_s += 10
        a.sequence = 10
        for index in range(20):
            a.change(set(make_keys(1, str(index))), set())
            cluster.deliver_event(a)
        assert len(told(cluster.sent, wire.Resync)) == 1

    def test_lost_last_change_is_noticed_on_a_quiet_cluster(self, cluster, pair):
        """The heartbeat's number is ahead of ours for longer than a message can be under way."""
        a, _ = pair
        cluster.now_s += 10
        a.change(set(make_keys(3)), set())
        a.events.clear()
        cluster.pass_time(1)
        assert not told(cluster.sent, wire.Resync), "it may still be under way"
        cluster.pass_time(4)
        assert len(told(cluster.sent, wire.Resync)) == 1
        cluster.check_converged()

    def test_slow_upload_is_not_a_gap(self, cluster, pair):
        """While parts of a snapshot still come in, nobody is asked for another."""
        a, _ = pair
        cluster.now_s += 10
        a.inventory = set(make_keys(60))
        a.sequence = 5
        a.upload(part_keys=3)
        for _ in range(19):
            cluster.now_s += INTERVAL_S
            cluster.deliver_event(a)
            a.beat()
            cluster.deliver_request(a)
        assert not told(cluster.sent, wire.Resync)
        cluster.settle()
        cluster.check_converged()

    def test_newcomer_gets_every_inventory_of_its_format_in_parts(self, cluster, pair, monkeypatch):
        """And none of another format."""
        monkeypatch.setattr(fanout, "SNAPSHOT_PART_KEYS", 4)
        a, _ = pair
        a.change(set(make_keys(10)), set())
        other = cluster.add(make_member("x", format=OTHER_FORMAT))
        other.change(set(make_keys(5, "x")), set())
        cluster.pass_time(2)
        cluster.sent.clear()
        c = cluster.add(make_member("c"))
        cluster.pass_time(1)
        parts = [message for message, to in told(cluster.sent, wire.Snapshot) if c.peer in to]
        assert [(part.instance_id, len(part.keys), part.first, part.last) for part in parts] == [
            ("a", 4, True, False),
            ("a", 4, False, False),
            ("a", 2, False, True),
            ("b", 0, True, True),
        ]
        cluster.check_converged()

    def test_newcomers_that_come_together_share_one_encoding(self, cluster, pair):
        _, _ = pair
        newcomers = [cluster.add(make_member(f"n{index}")) for index in range(5)]
        for node in newcomers:
            node.register()
            cluster.deliver_request(node)
        cluster.sent.clear()
        while sends := cluster.registry.next_snapshot(cluster.now_s):
            cluster.send(sends)
        (of_a,) = [to for message, to in told(cluster.sent, wire.Snapshot) if message.instance_id == "a"]
        assert set(of_a) == {node.peer for node in newcomers}

    def test_snapshot_request(self, cluster, pair):
        """Only members of the publisher's format get an answer."""
        a, b = pair
        x = cluster.add(make_member("x", format=OTHER_FORMAT))
        cluster.pass_time(2)
        for asking, answered in ((b.peer, True), (x.peer, False), (cluster.new_peer(), False), (a.peer, False)):
            cluster.registry.on_request(wire.SnapshotRequest(*a.who), asking, cluster.now_s)
            assert bool(cluster.registry.next_snapshot(cluster.now_s)) is answered
        cluster.registry.on_request(wire.SnapshotRequest("a", "0" * 16), b.peer, cluster.now_s)
        assert not cluster.registry.next_snapshot(cluster.now_s), "another life is meant"

    def test_strangers_events_are_ignored(self, cluster, pair):
        event = wire.Changes("ghost", "0" * 16, 1, make_keys(1), [])
        assert cluster.registry.on_event(event, wire.encode(event), cluster.now_s) == []
        assert cluster.registry.counters.strangers == 1


class TestBatches:
    """Changes of several publishers go out together, encoded once."""

    @pytest.fixture
    def four(self, cluster):
        nodes = [cluster.add(make_member(name, peer_port=8200 + index)) for index, name in enumerate("abcd")]
        cluster.pass_time(2)
        cluster.check_converged()
        cluster.sent.clear()
        return nodes

    def test_one_frame_for_all_that_follow(self, cluster, four):
        """Whatever came since the last flush, in the order in which it came; also to its publishers."""
        a, b, *_ = four
        for node, salt in ((a, "1"), (b, "2"), (a, "3")):
            node.change(set(make_keys(1, salt)), set())
            cluster.deliver_event(node)
        cluster.flush()
        ((batch, to),) = told(cluster.sent, wire.Batch)
        assert [(one.instance_id, one.sequence) for one in batch.changes] == [("a", 1), ("b", 1), ("a", 2)]
        assert set(to) == {node.peer for node in four}
        cluster.settle()
        cluster.check_converged()

    def test_who_waits_for_an_inventory_gets_the_rest(self, cluster, four):
        """A member that is owed a snapshot of one publisher gets the others' changes meanwhile."""
        a, b, c, d = four
        cluster.registry.on_request(wire.SnapshotRequest(*a.who), d.peer, cluster.now_s)
        for node in (a, b):
            node.change(set(make_keys(1, node.who[0])), set())
            cluster.deliver_event(node)
        cluster.flush()
        got = {peer: send.message for send in cluster.sent for peer in send.to}
        assert isinstance(got[c.peer], wire.Batch)
        assert isinstance(got[d.peer], wire.Changes)
        assert got[d.peer].instance_id == "b"
        cluster.settle()
        cluster.check_converged()

    def test_a_single_publisher_is_spared_its_own(self, cluster, four):
        a, *others = four
        for salt in "12":
            a.change(set(make_keys(1, salt)), set())
            cluster.deliver_event(a)
        cluster.flush()
        ((_, to),) = told(cluster.sent, wire.Batch)
        assert set(to) == {node.peer for node in others}

    def test_size_is_bounded(self, cluster, four, monkeypatch):
        """Much at once becomes several frames, and what is held goes out by itself when it becomes too much."""
        monkeypatch.setattr(fanout, "MAX_BATCH_KEYS", 10)
        monkeypatch.setattr(fanout, "MAX_HELD_KEYS", 50)
        a, *_ = four
        for index in range(10):
            a.change(set(make_keys(6, str(index))), set())
            cluster.deliver_event(a)
        sizes = [len(message.added) for message, _ in told(cluster.sent, wire.Changes)]
        assert sizes == [6] * 9, "two of them are more than a batch may hold"
        cluster.settle()
        cluster.check_converged()

    def test_changes_of_one_that_has_left_hurt_nobody(self, cluster, four):
        a, b, *_ = four
        for node in (a, b):
            node.change(set(make_keys(2, node.who[0])), set())
            cluster.deliver_event(node)
        cluster.send(cluster.registry.on_request(wire.Leave(*a.who), a.peer, cluster.now_s))
        cluster.kill(a)
        cluster.flush()
        cluster.settle()
        cluster.check_converged()


class TestSlowMembers:
    def test_full_queue_costs_changes_and_is_made_good_by_a_snapshot(self, cluster, pair):
        """Nothing is kept for a member that does not read; it catches up later."""
        a, b = pair
        b.reads = False
        for index in range(50):
            a.change(set(make_keys(1, f"{index}-")), set())
        cluster.settle()
        assert not b.notices
        assert len(told(cluster.sent, wire.Batch)) == 1, "one try was enough"
        b.reads = True
        cluster.pass_time(2)
        cluster.check_converged()

    def test_window_bounds_what_is_under_way(self, cluster, pair, monkeypatch):
        """A member that reports no progress gets no more than a window of bulk."""
        monkeypatch.setattr(downstream, "WINDOW_BYTES", 10_000)
        a, b = pair
        for index in range(100):
            a.change(set(make_keys(10, f"{index}-")), set())
            cluster.deliver_event(a)
            cluster.flush()
        under_way = sum(size_bytes for _, size_bytes in b.notices)
        assert 10_000 <= under_way < 12_000
        assert cluster.registry.instances["b"].downstream.outstanding_bytes == under_way
        cluster.pass_time(2)
        cluster.check_converged()

    def test_half_a_snapshot_is_started_over(self, cluster, pair, monkeypatch):
        """A queue that fills up between two parts: the member is owed the whole again."""
        monkeypatch.setattr(fanout, "SNAPSHOT_PART_KEYS", 4)
        a, b = pair
        a.change(set(make_keys(12)), set())
        cluster.settle()
        cluster.registry.on_request(wire.SnapshotRequest(*a.who), b.peer, cluster.now_s)
        sends = cluster.registry.next_snapshot(cluster.now_s)
        for send in sends[1:]:
            cluster.registry.on_send_failed(b.peer, send, SendFailure.FULL, cluster.now_s)
        assert not cluster.registry.next_snapshot(cluster.now_s), "it is left alone for a moment"
        assert len(cluster.registry.next_snapshot(cluster.now_s + 1)) == 3

    def test_lost_connection_makes_the_member_register_again(self, cluster, pair):
        """Frames to a connection that is gone: nothing more is sent there, the next heartbeat says known=False."""
        a, b = pair
        cluster.reconnect(b)
        a.change(set(make_keys(2)), set())
        cluster.settle()
        assert cluster.registry.instances["b"].downstream.lost
        cluster.pass_time(2)
        cluster.check_converged()

    def test_new_connection_makes_the_member_register_again(self, cluster, pair):
        """Even when nothing was sent meanwhile: what was under way may be lost."""
        cluster.reconnect(pair[1])
        cluster.pass_time(1)
        assert [to for _, to in told(cluster.sent, wire.Registered)] == [(pair[1].peer,)]

    def test_heartbeats_on_the_second_socket_need_no_registration_there(self, cluster, pair):
        beat = wire.Heartbeat(*pair[0].who, 0, wire.NodeStatistics())
        (send,) = cluster.registry.on_request(beat, Peer("heartbeat", b"h1"), cluster.now_s)
        assert send.message.known
        assert send.to == (Peer("heartbeat", b"h1"),)

    def test_notice_that_never_arrived_is_noticed(self, cluster, pair):
        """A lost MemberUp would be missed by nobody else; the byte count shows it."""
        a, _ = pair
        cluster.pass_time(2)
        c = cluster.add(make_member("c"))
        c.register()
        cluster.deliver_request(c)
        cluster.flush()
        assert isinstance(a.notices[-1][0], wire.MemberUp)
        a.notices.pop()
        cluster.pass_time(5)
        cluster.check_converged()

    def test_patience_grows_with_a_member_that_is_called_lost_again_and_again(self, cluster, pair):
        """What is sent to it may be late, not lost: each time it is waited for twice as long, up to a limit."""
        a, _ = pair
        patience = []
        for _ in range(7):
            beats = 0
            cluster.now_s += 10 * INTERVAL_S
            while not cluster.registry.instances["a"].downstream.lost:
                beats += 1
                beat = wire.Heartbeat(*a.who, a.sequence, wire.NodeStatistics(), registration=10**6)
                cluster.registry.on_request(beat, a.peer, cluster.now_s)
            patience.append(beats)
            cluster.registry.on_request(wire.Register(a.member), a.peer, cluster.now_s)
        assert patience == [2, 4, 8, 16, 32, 32, 32]

    def test_full_queue_for_a_membership_notice_means_lost(self, cluster, pair):
        _, b = pair
        b.reads = False
        c = cluster.add(make_member("c"))
        c.register()
        cluster.deliver_request(c)
        cluster.flush()
        assert cluster.registry.instances["b"].downstream.lost
        b.reads = True
        cluster.pass_time(3)
        cluster.check_converged()

    def test_member_that_does_not_count_is_left_in_peace(self, cluster):
        """A node that reports no byte counts is never called lost because of them."""
        member, peer = make_member("plain"), cluster.new_peer()
        cluster.registry.on_request(wire.Register(member), peer, cluster.now_s)
        for _ in range(10):
            cluster.now_s += INTERVAL_S
            beat = wire.Heartbeat(member.instance_id, member.incarnation, 0, wire.NodeStatistics())
            ack = cluster.registry.on_request(beat, peer, cluster.now_s)[0].message
            assert ack.known
            other = make_member(f"other{cluster.now_s}")
            cluster.registry.on_request(wire.Register(other), cluster.new_peer(), cluster.now_s)


class TestFormats:
    def test_differences_are_told_and_logged_once(self, cluster, pair, caplog):
        """WARNING where somebody expects sharing: the model name is the same. With the field and both values."""
        caplog.set_level(logging.INFO)
        x = cluster.add(make_member("x", format=OTHER_FORMAT))
        cluster.pass_time(2)
        x.register()
        cluster.settle()
        lines = [record for record in caplog.records if "incompatible_formats" in record.getMessage()]
        assert [record.levelname for record in lines] == ["WARNING"]
        assert "chunk_tokens (ours '128', theirs '256')" in lines[0].getMessage()
        pairs = list(incompatibilities(cluster.registry.groups))
        assert sorted((pair.ours, pair.theirs, pair.same_model) for pair in pairs) == [
            ("a", "x", True),
            ("b", "x", True),
        ]
        assert pairs[0].differences[0].field == "chunk_tokens"

    def test_other_models_are_no_warning(self, cluster, pair, caplog):
        caplog.set_level(logging.INFO)
        cluster.add(make_member("x", format=make_format(model_name="Other")))
        cluster.pass_time(1)
        lines = [record for record in caplog.records if "incompatible_formats" in record.getMessage()]
        assert [record.levelname for record in lines] == ["INFO"]

    def test_group_goes_with_its_last_member(self, cluster, pair):
        x = cluster.add(make_member("x", format=OTHER_FORMAT))
        cluster.pass_time(1)
        assert len(cluster.registry.groups) == 2
        cluster.send(cluster.registry.on_request(wire.Leave(*x.who), x.peer, cluster.now_s))
        assert len(cluster.registry.groups) == 1
        cluster.registry.check_integrity()

    def test_the_same_keys_in_two_formats_do_not_meet(self, cluster, pair):
        a, b = pair
        x = cluster.add(make_member("x", format=OTHER_FORMAT))
        x.change(set(make_keys(3)), set())
        a.change(set(make_keys(3)), set())
        cluster.pass_time(2)
        assert b.replica.holders(make_keys(1)[0]) == ("a",)
        cluster.check_converged()


def test_fetch_reports_are_summed_up(cluster, pair):
    """Totals count all, the list the last 200, and unknown reasons become `other`."""
    a, _ = pair
    report = wire.FetchReport(
        instance_id="a",
        incarnation=a.who[1],
        request_id="r",
        holders=("b",),
        transport="tcp",
        chunks_asked=4,
        chunks_fetched=2,
        fetched_bytes=200,
        seconds=0.5,
        misses={"evicted": 1, "made\nup": 1},
    )
    for _ in range(250):
        assert cluster.registry.on_event(report, wire.encode(report), cluster.now_s) == []
    activity = cluster.registry.activity
    assert activity.totals.fetches == 250
    assert activity.totals.fetched_bytes == 50_000
    assert activity.misses == {"evicted": 250, "other": 250}
    assert [activity.recent[0].number, activity.recent[-1].number] == [51, 250]
    stranger = msgspec.structs.replace(report, incarnation="0" * 16)
    cluster.registry.on_event(stranger, wire.encode(stranger), cluster.now_s)
    assert activity.totals.fetches == 250


def test_corrupt_chunks_are_counted_against_who_delivered_them(cluster, pair, caplog):
    """One warning that names both sides; reports about oneself, strangers and other formats count for nobody."""
    a, b = pair
    x = cluster.add(make_member("x", format=OTHER_FORMAT))
    cluster.pass_time(1)
    report = wire.FetchReport(
        instance_id="a",
        incarnation=a.who[1],
        request_id="r",
        holders=("b",),
        transport="tcp",
        chunks_asked=4,
        chunks_fetched=2,
        fetched_bytes=200,
        seconds=0.5,
        misses={"corrupt": 2},
        corrupt={"b": 2, "a": 5, "x": 5, "stranger": 5},
    )
    for _ in range(10):
        cluster.registry.on_event(report, wire.encode(report), cluster.now_s)
    counts = {each.who[0]: cluster.registry.instances[each.who[0]].corrupt_chunks for each in (a, b, x)}
    assert counts == {"a": 0, "b": 20, "x": 0}
    (line,) = [record.getMessage() for record in caplog.records if "corrupt_chunks" in record.getMessage()]
    assert "instance=b" in line
    assert "reported_by=a" in line
    seen = instance_view(cluster.registry, cluster.registry.instances["b"], cluster.now_s)
    assert seen.corrupt_chunks == 20
