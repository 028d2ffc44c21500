"""Several directories made into one view of who is a member."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvmesh.bench.stand_in import stand_in_format
from kvmesh.directory.merge import Merge, Source
from kvmesh.wire.directory import Answer, Ask, Changes, Member, NodeStatistics, Snapshot, UseReport

FIRST_LIFE, SECOND_LIFE = "0" * 16, "1" * 16


def member(incarnation: str = FIRST_LIFE, name: str = "peer") -> Member:
    return Member(
        instance_id=name,
        incarnation=incarnation,
        peer_host="h",
        peer_port=1,
        admin_port=0,
        transports=("tcp",),
        format=stand_in_format(4096),
        slots=1,
        version="test",
    )


class Listener:
    def __init__(self) -> None:
        self.members: dict[str, str] = {}
        self.connected: list[bool] = []
        self.changes = 0
        self.reports = 0
        self.report: UseReport = object()  # type: ignore[assignment]  # nobody looks into it

    def on_connection(self, connected: bool) -> None:
        self.connected.append(connected)

    def on_member_up(self, member: Member) -> None:
        self.members[member.instance_id] = member.incarnation

    def on_member_down(self, instance_id: str, incarnation: str, reason: str) -> None:
        assert self.members.pop(instance_id) == incarnation

    def on_changes(self, changes: Changes) -> bool:
        self.changes += 1
        return True

    def on_snapshot(self, part: Snapshot) -> bool:
        return True

    def on_ask(self, ask: Ask, answer: Callable[[Answer], None]) -> None:
        raise AssertionError("not asked here")

    def take_use_report(self, *, whole: bool) -> UseReport | None:
        self.reports += 1
        return self.report if self.reports == 1 or whole else None

    def statistics(self) -> NodeStatistics:
        return NodeStatistics()


@pytest.fixture
def listener() -> Listener:
    return Listener()


@pytest.fixture
def merge(listener: Listener) -> Merge:
    return Merge(listener, grace_s=10)


@pytest.fixture
def both(merge: Merge) -> tuple[Source, Source]:
    """Two connected directories that name the same member."""
    sources = merge.source(), merge.source()
    for source in sources:
        source.on_connection(True)
        source.on_member_up(member())
    return sources


def test_one_flapping_directory_does_no_harm(both: tuple[Source, Source], listener: Listener) -> None:
    """While the other one names a member and is connected, it stays."""
    left, right = both
    left.on_connection(False)
    left.on_connection(True)
    left.on_member_down("peer", FIRST_LIFE, "timeout")
    left.on_member_up(member())
    right.on_connection(False)
    assert listener.members == {"peer": FIRST_LIFE}
    assert listener.connected == [True]
    left.on_connection(False)
    assert listener.connected == [True, False]


def test_who_has_left_is_gone_although_an_absent_directory_names_it(
    both: tuple[Source, Source], listener: Listener
) -> None:
    """An absent one knows no better."""
    left, right = both
    right.on_connection(False)
    left.on_member_down("peer", FIRST_LIFE, "left")
    assert not listener.members


def test_the_view_of_an_absent_directory_fades(merge: Merge, both: tuple[Source, Source], listener: Listener) -> None:
    """Kept while nobody is there who could know better; dropped when others had their time and do not name it."""
    left, right = both
    left.on_member_up(member(name="only-left"))
    for source in both:
        source.on_connection(False)
    merge.sweep(0)
    merge.sweep(1000)
    assert set(listener.members) == {"peer", "only-left"}
    right.on_connection(True)
    merge.sweep(1001)
    merge.sweep(1010)
    assert set(listener.members) == {"peer", "only-left"}
    merge.sweep(1012)
    assert set(listener.members) == {"peer"}


def test_a_replaced_life_ends_no_newer_one(both: tuple[Source, Source], listener: Listener) -> None:
    """A directory that is behind names the old life of an instance: nobody believes it, nor its chunks."""
    left, right = both
    left.on_member_up(member(SECOND_LIFE))
    right.on_member_up(member(FIRST_LIFE))
    right.on_member_down("peer", FIRST_LIFE, "replaced")
    assert listener.members == {"peer": SECOND_LIFE}
    assert right.on_changes(Changes("peer", FIRST_LIFE, 1, [], []))
    assert listener.changes == 0
    assert left.on_changes(Changes("peer", SECOND_LIFE, 1, [], []))
    assert listener.changes == 1


def test_a_replaced_life_may_be_back_when_the_newer_one_has_ended(
    both: tuple[Source, Source], listener: Listener
) -> None:
    """A node that was stopped for so long that another one took its id, and that went away again."""
    left, _ = both
    left.on_member_up(member(SECOND_LIFE))
    left.on_member_down("peer", SECOND_LIFE, "left")
    left.on_member_up(member(FIRST_LIFE))
    assert listener.members == {"peer": FIRST_LIFE}


def test_a_dropped_directory_counts_as_absent(merge: Merge, both: tuple[Source, Source], listener: Listener) -> None:
    """As the fallback is when the directory is back."""
    left, right = both
    left.on_member_up(member(name="only-left"))
    merge.drop(left)
    merge.sweep(0)
    merge.sweep(11)
    assert set(listener.members) == {"peer"}
    merge.drop(right)
    assert listener.connected == [True, False]


def test_every_directory_gets_every_report(both: tuple[Source, Source], listener: Listener) -> None:
    """Whoever asks first makes it; the other one finds it waiting."""
    left, right = both
    assert left.take_use_report(whole=False) is not None
    assert left.take_use_report(whole=False) is None
    assert right.take_use_report(whole=False) is not None
    assert right.take_use_report(whole=False) is None
