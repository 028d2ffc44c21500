"""Several directories at a time, made into one for the node: two controllers, or a directory and the peers themselves.

Everybody tells all of its directories the same batches under the same numbers (`kvmesh.directory.outbox`), so what
comes twice is recognised by the replica. What is decided here is who is a member: whoever any directory names; not
named any more when a directory says so and no other one that is connected names it. What a directory said that is
away now is kept, until others have been there for long enough and do not say it.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable

from kvmesh.directory.base import DirectoryListener
from kvmesh.wire.directory import Answer, Ask, Changes, Member, NodeStatistics, Snapshot, UseReport

MAX_REPLACED = 10_000
MAX_USE_REPORTS = 30
"""For a directory that is away; older ones are lost to it."""


class Merge:
    """The one view of several sources. Pure but for the listener; lives on the node's event loop."""

    def __init__(self, listener: DirectoryListener, *, grace_s: float) -> None:
        """`grace_s`: so long a member stays whom only a directory that is away has named."""
        self._listener = listener
        self._grace_s = grace_s
        self._sources: list[Source] = []
        self._current: dict[str, str] = {}
        """Incarnation by instance id, as the listener knows it."""
        self._unnamed_since_s: dict[str, float] = {}
        self._replaced: OrderedDict[tuple[str, str], None] = OrderedDict()
        """Lives that have ended because the id began another one. A directory that is behind may still name them, which
        does not end the other one; once that has ended they may come back, like a node that was stopped for long.
        """
        self._connected = False

    def source(self) -> Source:
        """A listener for one more directory."""
        source = Source(self)
        self._sources.append(source)
        return source

    def drop(self, source: Source) -> None:
        """A directory is not used any more; its members stay as if it were away."""
        self._sources.remove(source)
        self.connection_changed()

    def statistics(self) -> NodeStatistics:
        """The node's."""
        return self._listener.statistics()

    def on_ask(self, ask: Ask, answer: Callable[[Answer], None]) -> None:
        """A question to the node, from whichever directory."""
        self._listener.on_ask(ask, answer)

    def take_use_report(self, source: Source, *, whole: bool) -> UseReport | None:
        """The node's reports, each for every directory; the oldest that this one has not had."""
        if whole:
            source.use_reports.clear()
        report = self._listener.take_use_report(whole=whole)
        if report is not None:
            for one in self._sources:
                one.use_reports.append(report)
        return source.use_reports.popleft() if source.use_reports else None

    def connection_changed(self) -> None:
        """A directory has come or gone: connected is whoever has one."""
        connected = any(source.connected for source in self._sources)
        if connected != self._connected:
            self._connected = connected
            self._listener.on_connection(connected)

    def member_up(self, member: Member) -> None:
        """A directory names a member."""
        instance_id, incarnation = member.instance_id, member.incarnation
        before = self._current.get(instance_id)
        if before == incarnation:
            return
        if before is not None:
            if (instance_id, incarnation) in self._replaced:
                return
            self._replaced[instance_id, before] = None
            while len(self._replaced) > MAX_REPLACED:
                self._replaced.popitem(last=False)
        self._current[instance_id] = incarnation
        self._unnamed_since_s.pop(instance_id, None)
        self._listener.on_member_up(member)

    def member_down(self, instance_id: str, incarnation: str, reason: str) -> None:
        """A directory names it no longer."""
        if self._current.get(instance_id) == incarnation and not self._is_named(instance_id, incarnation):
            del self._current[instance_id]
            self._unnamed_since_s.pop(instance_id, None)
            self._listener.on_member_down(instance_id, incarnation, reason)

    def changes(self, changes: Changes) -> bool:
        """Changes of a member, from any side."""
        return self._current.get(changes.instance_id) != changes.incarnation or self._listener.on_changes(changes)

    def snapshot(self, part: Snapshot) -> bool:
        """A part of a member's inventory, from any side."""
        return self._current.get(part.instance_id) != part.incarnation or self._listener.on_snapshot(part)

    def sweep(self, now_s: float) -> None:
        """Let go of those whom only absent directories have named, when others had the time to name them. To be called
        now and then.
        """
        if not self._connected:
            self._unnamed_since_s.clear()
            return
        for instance_id, incarnation in list(self._current.items()):
            if self._is_named(instance_id, incarnation):
                self._unnamed_since_s.pop(instance_id, None)
            elif now_s - self._unnamed_since_s.setdefault(instance_id, now_s) > self._grace_s:
                self.member_down(instance_id, incarnation, "timeout")

    def _is_named(self, instance_id: str, incarnation: str) -> bool:
        return any(source.connected and source.named.get(instance_id) == incarnation for source in self._sources)


class Source:
    """What one of several directories says: its listener."""

    def __init__(self, merge: Merge) -> None:
        self._merge = merge
        self.connected = False
        self.use_reports: deque[UseReport] = deque(maxlen=MAX_USE_REPORTS)
        """Waiting for this directory to take them."""
        self.named: dict[str, str] = {}
        """Incarnation by id."""

    def on_connection(self, connected: bool) -> None:
        self.connected = connected
        self._merge.connection_changed()

    def on_member_up(self, member: Member) -> None:
        self.named[member.instance_id] = member.incarnation
        self._merge.member_up(member)

    def on_member_down(self, instance_id: str, incarnation: str, reason: str) -> None:
        if self.named.get(instance_id) == incarnation:
            del self.named[instance_id]
        self._merge.member_down(instance_id, incarnation, reason)

    def on_changes(self, changes: Changes) -> bool:
        return self._merge.changes(changes)

    def on_snapshot(self, part: Snapshot) -> bool:
        return self._merge.snapshot(part)

    def statistics(self) -> NodeStatistics:
        return self._merge.statistics()

    def on_ask(self, ask: Ask, answer: Callable[[Answer], None]) -> None:
        self._merge.on_ask(ask, answer)

    def take_use_report(self, *, whole: bool) -> UseReport | None:
        return self._merge.take_use_report(self, whole=whole)
