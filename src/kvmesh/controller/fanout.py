"""Who is sent which publisher's inventory: Changes as they come, or a Snapshot to whoever has missed some. Pure state.

- A member is owed a Snapshot of each publisher of its format. While it is, it gets none of that publisher's Changes, so
  a sequence never starts in its middle. Being too slow for Changes means being owed a Snapshot, nothing more.
- A publisher's Snapshot goes out in one piece, between two of its Changes.
- Changes are held until `flush`, which the feed calls at once when little comes and seldom when much does. What was
  held goes out as one Batch for each format, encoded once for all members that are owed nothing of it. With a thousand
  members the cost is that of the frames sent, so 500 changes in one frame cost little more than one change.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from kvmesh.controller.instances import Counters, FormatGroup, Instance, Send, address
from kvmesh.controller.newcomers import Newcomers
from kvmesh.wire import directory as wire

RESYNC_INTERVALS = 2.5
"""A number that is ahead may be in flight for so many heartbeat intervals; a Snapshot is not asked for more often."""
SNAPSHOT_PART_KEYS = 5_000
"""Keys per part that we send: 190 kB, so that a small message never waits long behind one."""
MAX_BATCH_KEYS = 10_000
"""Keys in one Batch, as for a part of a Snapshot; a single Changes may have more."""
MAX_HELD_KEYS = 50_000
"""What is held goes out when it comes to so many, whoever calls."""


class Held(NamedTuple):
    """One publisher's Changes that have not gone out yet."""

    publisher_id: str
    changes: wire.Changes
    frame: bytes
    """Its encoding, forwarded as it is when it goes out alone."""

    @property
    def keys(self) -> int:
        return len(self.changes.added) + len(self.changes.removed)


class Fanout:
    """What goes to whom, and what is owed."""

    def __init__(
        self,
        instances: Mapping[str, Instance],
        groups: Mapping[str, FormatGroup],
        newcomers: Newcomers,
        counters: Counters,
        upload_timeout_s: float,
    ) -> None:
        """
        Args:
            instances: the members, by id; the registry's own, read here.
            groups: the same by format.
            newcomers: those of them who go out with the next flush, before what they hold.
            counters: counts what happens.
            upload_timeout_s: a publisher whose Snapshot comes in parts is waited for so long between two of them.
        """
        self._instances = instances
        self._groups = groups
        self._newcomers = newcomers
        self._counters = counters
        self._upload_timeout_s = upload_timeout_s
        self._owed: dict[str, set[str]] = {}
        """Publisher to the members that are owed its Snapshot. Both are members of one group."""
        self._held: dict[str, list[Held]] = {}
        """By format id, in the order in which they came."""
        self._held_keys = 0

    # -- members -------------------------------------------------------------------------------------------------------

    def add(self, instance_id: str, group: FormatGroup) -> None:
        """A newcomer: everybody of the group waits for its inventory before it gets a change of it."""
        self._owed[instance_id] = {name for name, member in group.members.items() if not member.asks}

    def remove(self, instance_id: str, group: FormatGroup) -> None:
        """A member has gone. What it had published and is held still goes out; nobody minds it."""
        del self._owed[instance_id]
        for publisher in group.members:
            self._owed[publisher].discard(instance_id)

    def owe(self, publisher: Instance, instance_id: str) -> None:
        """This member has missed something of the publisher."""
        if self._instances[instance_id].asks:
            return
        self._owed[publisher.instance_id].add(instance_id)

    def owe_all(self, instance: Instance) -> None:
        """This member begins anew; who asks instead of following is owed nothing."""
        for publisher in instance.group.members:
            if instance.asks:
                self._owed[publisher].discard(instance.instance_id)
            elif publisher != instance.instance_id:
                self._owed[publisher].add(instance.instance_id)

    # -- changes -------------------------------------------------------------------------------------------------------

    def hold(self, publisher: Instance, changes: wire.Changes, frame: bytes, now_s: float) -> list[Send]:
        """Take Changes that continue the publisher's sequence. They go out with the next flush, or now when much is
        held.
        """
        held = Held(publisher.instance_id, changes, frame)
        self._held.setdefault(publisher.group.format_id, []).append(held)
        self._held_keys += held.keys
        return self.flush(now_s) if self._held_keys >= MAX_HELD_KEYS else []

    def has_held(self) -> bool:
        """Whether a flush has something to do."""
        return bool(self._held or self._newcomers)

    def flush(self, now_s: float) -> list[Send]:
        """Everything that is held: newcomers to everybody, then Changes to everybody that follows them."""
        held, self._held, self._held_keys = self._held, {}, 0
        sends = self._newcomers.tell()
        for format_id, changes in held.items():
            group = self._groups.get(format_id)
            if group is not None:
                for batch in _batches(changes):
                    sends += self._fan_out(group, batch, now_s)
        return sends

    def _fan_out(self, group: FormatGroup, batch: Sequence[Held], now_s: float) -> Iterator[Send]:
        """Most members get all of it. Those that are owed a Snapshot of some of the publishers get the rest."""
        publishers = {held.publisher_id for held in batch}
        owed = {publisher: self._owed.get(publisher, set()) for publisher in publishers}
        some: set[str] = set().union(*owed.values())
        if len(publishers) == 1:
            some |= publishers  # it knows its own
        whole = []
        parts: defaultdict[frozenset[str], list[Instance]] = defaultdict(list)
        """Members by the publishers that they get nothing of."""
        for instance_id, instance in group.members.items():
            if instance.downstream.lost or instance.asks:
                continue
            if not instance.downstream.open(now_s):
                self._counters.held_back += 1
                for members in owed.values():
                    members.add(instance_id)
            elif instance_id in some:
                without = frozenset(one for one in publishers if instance_id in owed[one] or instance_id == one)
                parts[without].append(instance)
            else:
                whole.append(instance)
        for publisher, members in owed.items():
            members.discard(publisher)
        if whole:
            yield _send(batch, whole)
        for without, receivers in parts.items():
            rest = [held for held in batch if held.publisher_id not in without]
            if rest:
                yield _send(rest, receivers)

    # -- snapshots -----------------------------------------------------------------------------------------------------

    def forward_part(self, publisher: Instance, part: wire.Snapshot, frame: bytes, now_s: float) -> list[Send]:
        """A part of a publisher's Snapshot as it comes in. Whoever waits for one gets it from its first part on.

        That of a newcomer waits for the flush that tells of it, and then goes to all that are owed it at once. Changes
        of the publisher that are held are older than its Snapshot: whoever gets them after it ignores them.
        """
        owed = self._owed[publisher.instance_id]
        if part.first and publisher.instance_id not in self._newcomers:
            owed -= {other for other in owed if self._instances[other].downstream.open(now_s)}
        receivers = []
        for instance_id, other in publisher.group.members.items():
            if other is publisher or other.asks or instance_id in owed or other.downstream.lost:
                continue
            if other.downstream.open(now_s):
                receivers.append(other)
            else:
                owed.add(instance_id)
                self._counters.held_back += 1
        return [address(part, frame, receivers)] if receivers else []

    def snapshots_owed(self) -> int:
        """Pairs of publisher and receiver that wait for a Snapshot."""
        return sum(map(len, self._owed.values()))

    def next_snapshot(self, now_s: float) -> list[Send]:
        """One publisher's whole inventory for all who are owed it and can take it; nothing when there is no such."""
        for publisher_id, owed in self._owed.items():
            if not owed or publisher_id in self._newcomers:
                continue
            publisher = self._instances[publisher_id]
            sequence = publisher.group.replica.sequence(publisher_id)
            if sequence is None or self._is_uploading(publisher, now_s):
                continue
            ready = [self._instances[other] for other in owed if self._instances[other].downstream.open(now_s)]
            if not ready:
                continue
            owed.difference_update(other.instance_id for other in ready)
            self._counters.snapshots_sent += len(ready)
            return [address(part, wire.encode(part), ready) for part in _parts(publisher, sequence)]
        return []

    def on_full(self, instance: Instance, message: wire.Changes | wire.Snapshot | wire.Batch) -> None:
        """This did not reach the member, whose queue is full."""
        lost = message.changes if isinstance(message, wire.Batch) else [message]
        for one in lost:
            publisher = self._instances.get(one.instance_id)
            if publisher is None or publisher is instance or publisher.incarnation != one.incarnation:
                continue
            if publisher.group is instance.group:
                self.owe(publisher, instance.instance_id)

    def check_integrity(self) -> None:
        """Raise AssertionError when what is owed names others than members of the publisher's group. For tests."""
        assert set(self._owed) == set(self._instances)
        for publisher_id, owed in self._owed.items():
            assert owed <= set(self._instances[publisher_id].group.members) - {publisher_id}
        assert self._held_keys == sum(held.keys for changes in self._held.values() for held in changes)

    def _is_uploading(self, publisher: Instance, now_s: float) -> bool:
        since_s = publisher.upload_part_at_s
        return since_s is not None and now_s - since_s < self._upload_timeout_s


def _send(batch: Sequence[Held], receivers: Sequence[Instance]) -> Send:
    if len(batch) == 1:
        return address(batch[0].changes, batch[0].frame, receivers)
    notice = wire.Batch([held.changes for held in batch])
    return address(notice, wire.encode(notice), receivers)


def _batches(held: Sequence[Held]) -> Iterator[Sequence[Held]]:
    """In order, each within the limits."""
    start, keys = 0, 0
    for index, one in enumerate(held):
        if index > start and (keys + one.keys > MAX_BATCH_KEYS or index - start >= wire.MAX_BATCH_CHANGES):
            yield held[start:index]
            start, keys = index, 0
        keys += one.keys
    yield held[start:]


def _parts(publisher: Instance, sequence: int) -> Iterator[wire.Snapshot]:
    keys: list[bytes] = list(publisher.group.replica.keys_of(publisher.instance_id))
    starts = range(0, len(keys), SNAPSHOT_PART_KEYS) or range(1)
    for start in starts:
        yield wire.Snapshot(
            publisher.instance_id,
            publisher.incarnation,
            sequence,
            keys[start : start + SNAPSHOT_PART_KEYS],
            first=start == 0,
            last=start == starts[-1],
        )
