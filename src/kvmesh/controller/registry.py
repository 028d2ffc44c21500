"""Who is a member, who holds what, and who is told: a state machine without I/O.

    request or event + now -> [Send, ...]        on_request, on_event
    what is held           -> [Send, ...]        flush
    time passes            -> [Send, ...]        tick
    a send failed          -> state              on_send_failed
    what is still owed     -> [Send, ...]        next_snapshot, until it returns nothing

The protocol's rules stand in `kvmesh.wire.directory`; who gets whose inventory is the matter of `fanout`. Whatever else
fails to reach a member makes it lost: it is told to register again and gets everything anew.

Not thread-safe: one thread owns it. `now_s` is any clock that does not go back.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable
from enum import Enum
from itertools import count

from kvmesh.controller.activity import Activity
from kvmesh.controller.downstream import STALLED_HEARTBEATS, Downstream
from kvmesh.controller.fanout import RESYNC_INTERVALS, Fanout
from kvmesh.controller.formats import IncompatibilityLog
from kvmesh.controller.hit_rates import HitRates
from kvmesh.controller.instances import (
    Counters,
    Departed,
    DownReason,
    FormatGroup,
    Instance,
    Peer,
    Send,
    State,
    address,
)
from kvmesh.controller.log import LogLimiter, log
from kvmesh.controller.newcomers import Newcomers
from kvmesh.controller.refusals import Refusals
from kvmesh.wire import directory as wire

logger = logging.getLogger(__name__)

SILENT_INTERVALS = 1.5
"""So many heartbeat intervals without a word make a member suspect, and its id free for another."""
MAX_INSTANCES = 20_000
MAX_DEPARTED = 100
DEPARTED_SHOWN_S = 600.0


class SendFailure(Enum):
    """Why a frame could not be handed to a connection."""

    FULL = "full"
    """The queue is full: the member reads too slowly, or has stopped."""
    GONE = "gone"
    """The connection is no more."""


class Registry:
    """The directory's state. Made once per life of the controller."""

    def __init__(self, *, incarnation: str, heartbeat_interval_s: float, instance_timeout_s: float) -> None:
        self.incarnation = incarnation
        self.heartbeat_interval_s = heartbeat_interval_s
        self.instance_timeout_s = instance_timeout_s
        self.instances: dict[str, Instance] = {}
        self.groups: dict[str, FormatGroup] = {}
        """By format id. A group goes with its last member."""
        self.departed: OrderedDict[tuple[str, str], Departed] = OrderedDict()
        """By (instance id, incarnation), oldest first."""
        self.on_removed: list[Callable[[Instance, DownReason], None]] = []
        """Called with every member that goes, after it has gone."""
        self._by_peer: dict[Peer, Instance] = {}
        self.activity = Activity()
        self.refusals = Refusals()
        self.hit_rates = HitRates()
        self.counters = Counters()
        self._newcomers = Newcomers(self.instances)
        upload_timeout_s = RESYNC_INTERVALS * heartbeat_interval_s
        self._fanout = Fanout(self.instances, self.groups, self._newcomers, self.counters, upload_timeout_s)
        self._registrations = count(1)
        self._warned = IncompatibilityLog()
        self._limiter = LogLimiter()
        self._last_tick_s: float | None = None
        self._ack_known = wire.encode(wire.HeartbeatAck(incarnation, known=True))
        self._ack_unknown = wire.encode(wire.HeartbeatAck(incarnation, known=False))

    # -- requests ------------------------------------------------------------------------------------------------------

    def on_request(self, request: wire.Request, peer: Peer, now_s: float) -> list[Send]:
        """Take one message from the reply or heartbeat socket."""
        if isinstance(request, wire.Register):
            return self._register(request, peer, now_s)
        if isinstance(request, wire.Heartbeat):
            return self._heartbeat(request, peer, now_s)
        if isinstance(request, wire.SnapshotRequest):
            self._owe_snapshot(request, peer)
            return []
        if isinstance(request, wire.Query):
            return self._answer(request, now_s)
        instance = self._life(request.instance_id, request.incarnation, now_s)
        if instance is None or not isinstance(request, wire.Leave):
            return []
        log(logger, logging.INFO, "instance_left", instance=instance.instance_id, incarnation=instance.incarnation)
        return self._remove(instance, "left", now_s)

    def _answer(self, query: wire.Query, now_s: float) -> list[Send]:
        """Who holds what is asked for; strangers get no answer, and register."""
        asking = self._life(query.instance_id, query.incarnation, now_s)
        if asking is None:
            return []
        replica, places = asking.group.replica, dict[str, int]()
        holders = []
        for key in query.keys:
            names = [name for name in replica.holders(key) if name != asking.instance_id][: wire.MAX_HOLDERS]
            holders.append([places.setdefault(name, len(places)) for name in names])
        named = [(name, self.instances[name].incarnation) for name in places]
        return self._broadcast(wire.Holders(query.number, named, holders), [asking])

    def _owe_snapshot(self, request: wire.SnapshotRequest, peer: Peer) -> None:
        publisher = self.instances.get(request.instance_id)
        asking = self._by_peer.get(peer)
        if publisher is None or publisher.incarnation != request.incarnation or asking is None:
            return  # it has gone meanwhile, and the notice of that is on its way; or a stranger asks
        if asking is not publisher and asking.group is publisher.group:
            self._fanout.owe(publisher, asking.instance_id)

    def _register(self, request: wire.Register, peer: Peer, now_s: float) -> list[Send]:
        member = request.member
        if request.protocol != wire.PROTOCOL_VERSION:
            text = (
                f"instance {member.instance_id} speaks directory protocol {request.protocol}, this controller "
                f"{wire.PROTOCOL_VERSION}: run the same kvmesh version on both"
            )
            return self._refuse("protocol_version", text, member, peer, now_s)
        sends: list[Send] = []
        known = self.instances.get(member.instance_id)
        if known is not None and (known.incarnation != member.incarnation or known.member.format != member.format):
            if not self._may_replace(known, member, now_s):
                text = (
                    f"instance id {member.instance_id} is taken: an instance at {known.member.peer_address} has it and "
                    f"is alive, this one is at {member.peer_address}: give each instance an instance_id of its own"
                )
                return self._refuse("duplicate_instance", text, member, peer, now_s)
            sends += self._remove(known, "replaced", now_s)
            known = None
        if self._by_peer.get(peer, known) is not known:
            text = f"this connection is that of instance {self._by_peer[peer].instance_id}: open one for each instance"
            return self._refuse("connection_in_use", text, member, peer, now_s)
        if known is None and len(self.instances) >= MAX_INSTANCES:
            return self._refuse("too_many_instances", f"the limit is {MAX_INSTANCES} instances", member, peer, now_s)
        if known is not None and self._is_repeat(known, request, peer, now_s):
            self.counters.repeated += 1
            known.last_contact_s = now_s  # it waits for us, and says so
            return []
        return sends + self._admit(known, member, peer, now_s, asks=request.asks)

    def _is_repeat(self, known: Instance, request: wire.Register, peer: Peer, now_s: float) -> bool:
        """Whether this was asked for over the same connection, and the answer is still on its way there.

        Who joins again and again while we are behind would be sent everything again and again, and keep us behind.
        """
        is_same = (known.member, known.peer, known.asks) == (request.member, peer, request.asks)
        return is_same and known.downstream.awaits_answer(now_s, self.heartbeat_interval_s)

    def _admit(
        self, known: Instance | None, member: wire.Member, peer: Peer, now_s: float, *, asks: bool
    ) -> list[Send]:
        self.counters.registrations += 1
        self.departed.pop((member.instance_id, member.incarnation), None)
        patience = STALLED_HEARTBEATS if known is None else known.downstream.next_patience()
        downstream = Downstream(next(self._registrations), now_s, patience)
        changed = known is None or known.member != member
        if known is None:
            known = self._add(member, peer, downstream, now_s)
        self._by_peer.pop(known.peer, None)
        self._by_peer[peer] = known
        known.member, known.peer, known.downstream, known.asks = member, peer, downstream, asks
        known.last_contact_s = known.resynced_at_s = now_s
        known.upload_part_at_s = known.behind_since_s = None
        self._fanout.owe_all(known)
        others = [other for other in self.instances.values() if other is not known]
        answer = wire.Registered(
            self.incarnation,
            self.heartbeat_interval_s,
            self.instance_timeout_s,
            [other.member for other in others],
            downstream.registration,
        )
        if changed:
            self._newcomers.hold(member.instance_id)
        return [Send((peer,), answer, wire.encode(answer))]

    def _add(self, member: wire.Member, peer: Peer, downstream: Downstream, now_s: float) -> Instance:
        format_id = member.format.format_id()
        group = self.groups.get(format_id)
        if group is None:
            group = self.groups[format_id] = FormatGroup(member.format, format_id)
        self._fanout.add(member.instance_id, group)
        instance = Instance(member, group, peer, downstream, now_s, now_s, now_s)
        self.instances[member.instance_id] = group.members[member.instance_id] = instance
        group.replica.member_up(member.instance_id, member.incarnation)
        log(
            logger,
            logging.INFO,
            "instance_up",
            instance=member.instance_id,
            incarnation=member.incarnation,
            peer=member.peer_address,
            model=member.format.model_name,
            format=format_id,
            slots=member.slots,
        )
        self._warned.tell(instance, self.groups)
        return instance

    def _may_replace(self, known: Instance, member: wire.Member, now_s: float) -> bool:
        """A restarted process may take its id back at once; two living ones may not take turns with it."""
        if now_s - known.last_contact_s > SILENT_INTERVALS * self.heartbeat_interval_s:
            return True
        gone = self.departed.get((member.instance_id, member.incarnation))
        was_replaced = gone is not None and gone.reason == "replaced"
        return known.member.peer_address == member.peer_address and not was_replaced

    def _refuse(self, code: str, text: str, member: wire.Member, peer: Peer, now_s: float) -> list[Send]:
        self.counters.refused += 1
        self.refusals.add(f"{member.instance_id} at {member.peer_address}", text, now_s)
        log(logger, logging.WARNING, "refused", code=code, instance=member.instance_id, text=text)
        answer = wire.Refused(code, text)
        return [Send((peer,), answer, wire.encode(answer))]

    def _heartbeat(self, heartbeat: wire.Heartbeat, peer: Peer, now_s: float) -> list[Send]:
        instance = self._life(heartbeat.instance_id, heartbeat.incarnation, now_s)
        if instance is None:
            return [Send((peer,), wire.HeartbeatAck(self.incarnation, known=False), self._ack_unknown)]
        instance.statistics = heartbeat.statistics
        instance.rates.note(heartbeat.statistics, now_s)
        if not self._reachable(instance, heartbeat, peer, now_s):
            return [Send((peer,), wire.HeartbeatAck(self.incarnation, known=False), self._ack_unknown)]
        sends = [Send((peer,), wire.HeartbeatAck(self.incarnation, known=True), self._ack_known)]
        return sends + self._check_sequence(instance, heartbeat.sequence, now_s)

    def _reachable(self, instance: Instance, heartbeat: wire.Heartbeat, peer: Peer, now_s: float) -> bool:
        """Whether the member still gets what we send. If not, it has to register again."""
        downstream = instance.downstream
        if instance.peer.socket == peer.socket and instance.peer != peer:
            downstream.lost = True  # a new connection: what was under way on the old one is gone
        was_lost = downstream.lost
        is_older = heartbeat.registration != downstream.registration  # sent before our Registered came, if it came
        if not is_older or not downstream.awaits_answer(now_s, self.heartbeat_interval_s):
            downstream.acknowledge(heartbeat.registration, heartbeat.received_bytes)
        if downstream.lost and not was_lost:
            log(
                logger,
                logging.WARNING,
                "notices_lost",
                instance=instance.instance_id,
                sent_bytes=downstream.sent_bytes,
                received_bytes=downstream.received_bytes,
            )
        if downstream.lost:
            self.counters.lost += 1
        return not downstream.lost

    def _check_sequence(self, instance: Instance, sequence: int, now_s: float) -> list[Send]:
        """Notice a last batch that was lost: no newer one will come and show the gap."""
        have = instance.group.replica.sequence(instance.instance_id)
        if have is not None and have >= sequence:
            instance.behind_since_s = None
            return []
        if instance.behind_since_s is None or have != instance.behind_at:
            instance.behind_at, instance.behind_since_s = have, now_s
            return []
        since_s = max(instance.behind_since_s, instance.upload_part_at_s or 0.0)
        if now_s - since_s < RESYNC_INTERVALS * self.heartbeat_interval_s:
            return []
        return self._resync(instance, now_s)

    def _resync(self, instance: Instance, now_s: float) -> list[Send]:
        if now_s - instance.resynced_at_s < RESYNC_INTERVALS * self.heartbeat_interval_s:
            return []  # asked for already; if that is lost too, a heartbeat brings us here again
        instance.resynced_at_s = now_s
        instance.upload_part_at_s = None
        self.counters.resyncs += 1
        log(logger, logging.INFO, "resync", instance=instance.instance_id, incarnation=instance.incarnation)
        return self._broadcast(wire.Resync(instance.instance_id, instance.incarnation), [instance])

    # -- events --------------------------------------------------------------------------------------------------------

    def on_event(self, event: wire.Event, frame: bytes, now_s: float) -> list[Send]:
        """Take one message from the pull socket. `frame` is its encoding, forwarded as it is."""
        instance = self._life(event.instance_id, event.incarnation, now_s)
        if instance is None:
            self.counters.strangers += 1
            return []
        if isinstance(event, wire.Changes):
            return self._changes(instance, event, frame, now_s)
        if isinstance(event, wire.Snapshot):
            return self._snapshot(instance, event, frame, now_s)
        if isinstance(event, wire.UseReport):
            usage = self.hit_rates.add(event, instance.group.format_id, now_s)
            tokens = usage.peer_chunks * instance.group.format.chunk_tokens
            self.activity.save(tokens, instance.statistics.prefill_tokens_per_s)
            return []
        self.activity.add(event, now_s)
        self._note_corrupt(instance, event, now_s)
        return []

    def _note_corrupt(self, reporter: Instance, report: wire.FetchReport, now_s: float) -> None:
        """Whoever delivers wrong bytes has bad memory, a bad network or bad intentions: worth a person's look."""
        for holder_id, chunks in report.corrupt.items():
            holder = reporter.group.members.get(holder_id)
            if holder is None or holder is reporter or not chunks:
                continue
            holder.corrupt_chunks += chunks
            suppressed = self._limiter.allow(f"corrupt {holder_id}", now_s)
            if suppressed is not None:
                log(
                    logger,
                    logging.WARNING,
                    "corrupt_chunks",
                    instance=holder_id,
                    peer=holder.member.peer_address,
                    reported_by=reporter.instance_id,
                    chunks=chunks,
                    total=holder.corrupt_chunks,
                    suppressed=suppressed,
                )

    def _changes(self, instance: Instance, changes: wire.Changes, frame: bytes, now_s: float) -> list[Send]:
        replica = instance.group.replica
        before = replica.sequence(instance.instance_id)
        applied = replica.apply_changes(
            instance.instance_id, instance.incarnation, changes.sequence, changes.added, changes.removed
        )
        if applied.gap:
            self.counters.stale += 1
            return self._resync(instance, now_s)
        if replica.sequence(instance.instance_id) == before:
            self.counters.stale += 1
            return []
        return self._fanout.hold(instance, changes, frame, now_s)

    def _snapshot(self, instance: Instance, part: wire.Snapshot, frame: bytes, now_s: float) -> list[Send]:
        replica = instance.group.replica
        before = replica.sequence(instance.instance_id)
        applied = replica.apply_snapshot(
            instance.instance_id, instance.incarnation, part.sequence, part.keys, part.first, part.last
        )
        if applied.gap:
            self.counters.stale += 1
            return self._resync(instance, now_s)
        if before is not None and part.sequence < before:
            self.counters.stale += 1
            return []
        instance.upload_part_at_s = None if part.last else now_s
        return self._fanout.forward_part(instance, part, frame, now_s)

    # -- what is held and owed -----------------------------------------------------------------------------------------

    def has_held(self) -> bool:
        """Whether Changes or newcomers wait for a flush."""
        return self._fanout.has_held()

    def has_newcomers(self) -> bool:
        """Whether there are members whom the others have not been told of."""
        return bool(self._newcomers)

    def flush(self, now_s: float) -> list[Send]:
        """Tell of the newcomers and send on the Changes that have come since the last flush."""
        return self._fanout.flush(now_s)

    def snapshots_owed(self) -> int:
        """Pairs of publisher and receiver that wait for a Snapshot."""
        return self._fanout.snapshots_owed()

    def next_snapshot(self, now_s: float) -> list[Send]:
        """One publisher's whole inventory for all who are owed it and can take it; nothing when there is no such."""
        return self._fanout.next_snapshot(now_s)

    def on_send_failed(self, peer: Peer, send: Send, failure: SendFailure, now_s: float) -> None:
        """A frame of ours could not be handed to this connection."""
        instance = self._by_peer.get(peer)
        if instance is None or isinstance(send.message, (wire.HeartbeatAck, wire.Refused, wire.Ask)):
            return  # acknowledgements are not counted, and the next heartbeat asks again
        message, downstream = send.message, instance.downstream
        if isinstance(message, wire.Registered) and message.registration != downstream.registration:
            return
        downstream.sent_bytes = max(0, downstream.sent_bytes - len(send.frame))
        if failure is SendFailure.GONE or not isinstance(message, (wire.Changes, wire.Batch, wire.Snapshot)):
            downstream.lost = True
            return
        downstream.block(now_s)
        self._fanout.on_full(instance, message)

    # -- time ----------------------------------------------------------------------------------------------------------

    def tick(self, now_s: float, behind_s: float = 0.0) -> list[Send]:
        """Find members that have fallen silent. To be called about once per heartbeat interval or more often.

        `behind_s` is how old messages may be that have come and were not read yet: a controller that is behind (a
        thousand members that join at once) must not drop those who wait for it, which would make them join again.
        """
        elapsed_s = 0.0 if self._last_tick_s is None else now_s - self._last_tick_s
        self._last_tick_s = now_s
        pause_s = elapsed_s - 2 * self.heartbeat_interval_s
        if pause_s > 0:
            # We slept (stopped, swapped out), not they: their heartbeats wait in our sockets.
            log(logger, logging.WARNING, "controller_paused", seconds=elapsed_s)
            for instance in self.instances.values():
                instance.last_contact_s = max(instance.last_contact_s, now_s - self.heartbeat_interval_s)
        self.activity.tick(now_s)
        sends = []
        for instance in list(self.instances.values()):
            silence_s = now_s - instance.last_contact_s
            if silence_s <= self.instance_timeout_s + behind_s:
                continue
            self.counters.timeouts += 1
            log(logger, logging.WARNING, "instance_timeout", instance=instance.instance_id, silent_s=silence_s)
            sends += self._remove(instance, "timeout", now_s)
        while self.departed:
            oldest = next(iter(self.departed))
            if now_s - self.departed[oldest].at_s < DEPARTED_SHOWN_S and len(self.departed) <= MAX_DEPARTED:
                break
            del self.departed[oldest]
        return sends

    def state(self, instance: Instance, now_s: float) -> State:
        silence_s = now_s - instance.last_contact_s
        return "up" if silence_s <= SILENT_INTERVALS * self.heartbeat_interval_s else "suspect"

    # -- care ----------------------------------------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Raise AssertionError when the parts disagree. For tests: reads everything."""
        grouped = [instance_id for group in self.groups.values() for instance_id in group.members]
        assert sorted(grouped) == sorted(self.instances), "an instance is in no group, or in two"
        for format_id, group in self.groups.items():
            assert group.members, f"empty group {format_id}"
            group.replica.check_integrity()
            assert sorted(group.replica.members()) == sorted(group.members)
            for instance_id, instance in group.members.items():
                assert instance is self.instances[instance_id]
                assert instance.group is group
                assert instance.member.format == group.format
                assert group.replica.incarnation(instance_id) == instance.incarnation
        self._fanout.check_integrity()
        assert {peer: instance.peer for peer, instance in self._by_peer.items()} == {
            instance.peer: instance.peer for instance in self.instances.values()
        }

    def _life(self, instance_id: str, incarnation: str, now_s: float) -> Instance | None:
        """The member of this very incarnation, which we have now heard of; None for strangers."""
        instance = self.instances.get(instance_id)
        if instance is None or instance.incarnation != incarnation:
            return None
        instance.last_contact_s = now_s
        return instance

    def _remove(self, instance: Instance, reason: DownReason, now_s: float) -> list[Send]:
        instance_id, group = instance.instance_id, instance.group
        group.replica.member_down(instance_id, instance.incarnation)
        del group.members[instance_id]
        del self.instances[instance_id]
        del self._by_peer[instance.peer]
        if not group.members:
            del self.groups[group.format_id]
        self._fanout.remove(instance_id, group)
        self._newcomers.forget(instance_id)
        self.departed[instance_id, instance.incarnation] = Departed(instance.member, reason, now_s)
        self.hit_rates.forget(instance_id)
        for listener in self.on_removed:
            listener(instance, reason)
        return self._broadcast(wire.MemberDown(instance_id, instance.incarnation, reason), self.instances.values())

    def _broadcast(self, notice: wire.Notice, receivers: Iterable[Instance]) -> list[Send]:
        """One notice, encoded once, to all of these that are not lost."""
        reached = [instance for instance in receivers if not instance.downstream.lost]
        if not reached:
            return []
        return [address(notice, wire.encode(notice), reached)]
