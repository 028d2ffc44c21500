"""tcp in place of a better way that does not work, and back."""

from __future__ import annotations

import logging
import threading
import time

import pytest

from kvmesh.core.reasons import MissReason
from kvmesh.transfer.base import Deadline
from kvmesh.transfer.fake import FakeTransport, Fault
from kvmesh.transfer.fallback import FallbackTransport
from kvmesh.transfer.pool import HostPool
from support.transfer_holder import Store, content, items, key

CHUNKS, CHUNK_BYTES = 4, 8192
HIT = [None] * CHUNKS


def soon(seconds: float = 10.0, stall_s: float = 10.0) -> Deadline:
    return Deadline(time.monotonic() + seconds, stall_s)


class Ways:
    """Both ways to a peer, and the transport over them."""

    def __init__(self, store: Store, pool: HostPool, retry_s: float) -> None:
        self.pool = pool
        self.better, self.tcp = (FakeTransport(store.pool, store.locate, pool) for _ in range(2))
        self.better.name, self.tcp.name = "better", "tcp"
        self.transport = FallbackTransport(self.better, self.tcp, "peer", retry_s=retry_s)

    def fetch(self, deadline: Deadline | None = None) -> list[MissReason | None]:
        """The reasons, and that progress has told the same once."""
        heard = []
        outcomes = self.transport.fetch(items(CHUNKS), deadline or soon(), heard.append)
        assert heard == outcomes
        return [outcome.reason for outcome in outcomes]

    def all_fetched(self) -> tuple[int, int]:
        return self.better.statistics().fetched_chunks, self.tcp.statistics().fetched_chunks


@pytest.fixture
def make():
    store, pool = Store(CHUNKS, CHUNK_BYTES), HostPool.create(CHUNKS, CHUNK_BYTES)
    made = []

    def ways(retry_s: float = 60.0) -> Ways:
        made.append(Ways(store, pool, retry_s))
        return made[-1]

    yield ways
    for one in made:
        one.transport.close()
    pool.close()
    store.close()


def test_the_better_way_is_used_as_long_as_it_works(make):
    ways = make()
    assert ways.transport.warm_up(soon()) is None
    assert ways.fetch() == HIT
    assert ways.transport.name == "better"
    assert ways.all_fetched() == (CHUNKS, 0)
    assert ways.transport.fetch([], soon()) == []
    assert ways.transport.fetch(items(CHUNKS), soon())[0].reason is None


@pytest.mark.parametrize("reason", [MissReason.PEER_UNREACHABLE, MissReason.PEER_LOST])
def test_what_fails_quickly_is_had_over_tcp_at_once(make, reason, caplog):
    ways = make()
    ways.better.faults[key(0)] = Fault(reason=reason)
    with caplog.at_level(logging.INFO):
        assert [ways.fetch() for _ in range(3)] == [HIT] * 3
    assert ways.transport.name == "tcp"
    assert ways.all_fetched() == (0, 3 * CHUNKS)
    assert bytes(ways.pool.row(3)) == content(3, CHUNK_BYTES)
    assert [record.message for record in caplog.records] == [
        f"peer peer cannot be reached by better, using tcp until it can: {reason.value}"
    ]
    assert ways.transport.statistics().fetched_chunks == 3 * CHUNKS


def test_what_fails_slowly_is_had_over_tcp_the_next_time(make):
    """A stalled peer would stall the other way as well: one fetch does not pay for both."""
    ways = make()
    ways.better.faults[key(0)] = Fault(until=threading.Event())
    assert ways.fetch(soon(60, 0.01)) == [MissReason.PEER_STALLED] * CHUNKS
    assert ways.fetch() == HIT
    ways = make()
    ways.better.faults[key(0)] = Fault(until=threading.Event())
    assert ways.fetch(soon(0.01, 60)) == [MissReason.DEADLINE] * CHUNKS
    assert ways.fetch() == HIT


@pytest.mark.parametrize("reason", [MissReason.EVICTED, MissReason.STALE, MissReason.FORMAT_MISMATCH])
def test_what_tcp_would_not_change_stays_with_the_better_way(make, reason):
    ways = make()
    ways.better.faults[key(0)] = Fault(reason=reason)
    assert ways.fetch()[0] is reason
    assert ways.transport.name == "better"
    assert ways.all_fetched() == (0, 0)


def test_a_fetch_that_has_brought_something_is_not_repeated(make):
    ways = make()
    ways.better.faults[key(2)] = Fault(reason=MissReason.PEER_LOST)
    assert ways.fetch() == [None, None, MissReason.PEER_LOST, MissReason.PEER_LOST]
    assert ways.transport.name == "better"


def test_a_peer_that_is_gone_is_gone(make, caplog):
    ways = make()
    ways.better.unreachable = ways.tcp.unreachable = True
    assert ways.transport.warm_up(soon()) is MissReason.PEER_UNREACHABLE
    assert ways.fetch() == [MissReason.PEER_UNREACHABLE] * CHUNKS
    assert "using tcp" not in caplog.text


def test_no_time_is_left_for_tcp(make):
    ways = make()
    ways.better.unreachable = True
    past = Deadline(time.monotonic() - 1, 1)
    assert ways.transport.warm_up(past) is MissReason.PEER_UNREACHABLE
    assert make().fetch(past) == HIT, "the fake does not look at the time"
    late = make()
    late.better.unreachable = True
    assert late.fetch(past) == [MissReason.PEER_UNREACHABLE] * CHUNKS


def test_a_way_that_takes_long_to_open_is_used_once_it_stands(make, caplog):
    """As with nixl and a large pool: fetches go over tcp until then."""
    ways = make(retry_s=0.01)
    ways.better.unreachable = True
    assert ways.transport.warm_up(soon()) is None
    with caplog.at_level(logging.INFO):
        assert ways.fetch() == HIT
        ways.better.unreachable = False
        until_s = time.monotonic() + 30
        while ways.transport.name == "tcp":
            assert time.monotonic() < until_s
            assert ways.fetch() == HIT
        assert ways.fetch() == HIT
    assert ways.all_fetched()[0] >= CHUNKS
    assert "peer peer is reached by better again" in caplog.text


def test_closing_closes_both(make):
    ways = make(retry_s=0.0)
    ways.better.unreachable = True
    assert ways.fetch() == HIT
    ways.transport.close()
    ways.transport.close()
    assert ways.fetch() == [MissReason.PEER_LOST] * CHUNKS
