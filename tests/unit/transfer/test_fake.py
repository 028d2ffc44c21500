from __future__ import annotations

import threading
import time

import pytest

from kvmesh.core.reasons import MissReason
from kvmesh.transfer.base import Deadline
from kvmesh.transfer.fake import FakeTransport, Fault
from kvmesh.transfer.pool import HostPool
from support.transfer_holder import Store, content, items, key

CHUNKS, CHUNK_BYTES = 4, 8192


def soon(seconds: float = 10.0, stall_s: float = 10.0) -> Deadline:
    return Deadline(time.monotonic() + seconds, stall_s)


@pytest.fixture
def store():
    store = Store(CHUNKS, CHUNK_BYTES)
    yield store
    store.close()


@pytest.fixture
def fake(store):
    pool = HostPool.create(CHUNKS, CHUNK_BYTES)
    yield FakeTransport(store.pool, store.locate, pool)
    pool.close()


def reasons(fake, deadline=None):
    return [outcome.reason for outcome in fake.fetch(items(CHUNKS), deadline or soon())]


def test_without_faults_everything_arrives(fake):
    heard = []
    assert fake.warm_up(soon()) is None
    assert fake.fetch(items(CHUNKS), soon(), heard.append) == heard
    assert [outcome.reason for outcome in heard] == [None] * CHUNKS
    assert bytes(fake._pool.row(3)) == content(3, CHUNK_BYTES)
    assert fake.statistics().fetched_chunks == CHUNKS


@pytest.mark.parametrize(
    ("fault", "reason", "rest"),
    [
        (Fault(reason=MissReason.EVICTED), MissReason.EVICTED, MissReason.TRUNCATED),
        (Fault(reason=MissReason.STALE), MissReason.STALE, MissReason.TRUNCATED),
        (Fault(is_corrupt=True), MissReason.CORRUPT, MissReason.TRUNCATED),
        (Fault(reason=MissReason.PEER_LOST), MissReason.PEER_LOST, MissReason.PEER_LOST),
    ],
)
def test_a_fault_hits_its_chunk_and_the_rest_follows(fake, fault, reason, rest):
    fake.faults[key(1)] = fault
    assert reasons(fake) == [None, reason, rest, rest]


def test_a_delay_ends_with_its_event_or_with_the_fetch(fake):
    event = threading.Event()
    fake.faults[key(1)] = Fault(until=event)
    assert reasons(fake, soon(0.01, 60)) == [None] + [MissReason.DEADLINE] * 3
    assert reasons(fake, soon(60, 0.01)) == [None] + [MissReason.PEER_STALLED] * 3
    event.set()
    assert reasons(fake) == [None] * CHUNKS


def test_it_can_be_unreachable_and_closed(fake):
    fake.unreachable = True
    assert fake.warm_up(soon()) is MissReason.PEER_UNREACHABLE
    assert set(reasons(fake)) == {MissReason.PEER_UNREACHABLE}
    fake.unreachable = False
    fake.close()
    assert set(reasons(fake)) == {MissReason.PEER_LOST}
