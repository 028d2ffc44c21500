"""What a fetch over shared memory does when the holder's process dies, stops, or reuses its slots meanwhile."""

from __future__ import annotations

import contextlib
import signal
import time

import pytest

from kvmesh.core.reasons import MissReason
from kvmesh.transfer.base import Deadline
from kvmesh.transfer.pool import HostPool
from kvmesh.transfer.shm import ShmTransport
from support.keys import environment_security
from support.transfer_holder import HolderProcess, content, hello, items

CHUNKS, CHUNK_BYTES = 24, 1 << 20

pytestmark = [pytest.mark.process, pytest.mark.timeout(60)]


def soon(seconds: float = 30.0) -> Deadline:
    return Deadline(time.monotonic() + seconds, seconds)


class Fetcher:
    def __init__(self, holder, **options):
        self.pool = HostPool.create(CHUNKS, CHUNK_BYTES)
        self.transport = ShmTransport(
            holder.target,
            hello(CHUNK_BYTES, "me", "0" * 16),
            self.pool,
            security=environment_security(),
            **options,
        )

    def fetch(self, count=CHUNKS, progress=None) -> list[MissReason | None]:
        """Reasons; checks that each hit has the right bytes."""
        outcomes = self.transport.fetch(items(count), soon(), progress)
        for index, outcome in enumerate(outcomes):
            if outcome.reason is None:
                assert bytes(self.pool.row(index)) == content(index, CHUNK_BYTES), f"chunk {index} is wrong"
        return [outcome.reason for outcome in outcomes]

    def close(self):
        self.transport.close()
        self.pool.close()


@pytest.fixture
def holder():
    with HolderProcess(CHUNKS, CHUNK_BYTES, shm=True) as holder:
        yield holder


@contextlib.contextmanager
def fetching(holder, **options):
    with contextlib.closing(Fetcher(holder, **options)) as fetcher:
        yield fetcher


def test_a_peer_that_is_killed_in_the_middle_is_lost_and_comes_back(holder):
    """Its memory is still there and would be right; but it is let go, and what replaces the peer is attached to."""
    with fetching(holder, threads=1) as fetcher:

        def kill(_):
            if holder.process.poll() is None:
                holder.process.kill()
                holder.process.wait()
                while fetcher.transport.statistics().connections:
                    time.sleep(0.001)

        assert fetcher.fetch(progress=kill) == [None] + [MissReason.PEER_LOST] * (CHUNKS - 1)
        with HolderProcess(CHUNKS, CHUNK_BYTES, shm=True, port=holder.port):
            assert fetcher.fetch() == [None] * CHUNKS


def test_a_stopped_peer_is_read_from(holder):
    """Its node has no part in a fetch, and its engine keeps the ledger. A new connection is another matter."""
    with fetching(holder) as fetcher:
        assert fetcher.transport.warm_up(soon()) is None
        holder.process.send_signal(signal.SIGSTOP)
        assert fetcher.fetch() == [None] * CHUNKS
        with fetching(holder) as late:
            assert late.transport.warm_up(Deadline(time.monotonic() + 30, 0.1)) is MissReason.PEER_STALLED
        holder.process.send_signal(signal.SIGCONT)


def test_slots_reused_all_the_time_never_give_wrong_bytes(holder):
    """The holder's owner rewrites slots as fast as it can, with the same chunks and others, while we fetch."""
    with fetching(holder) as fetcher:
        holder.tell("churn", 8)
        seen: list[MissReason | None] = []
        for tries in range(2000):  # how many find a slot at rest is up to the machine
            seen += fetcher.fetch()
            if tries >= 40 and None in seen:
                break
    assert set(seen) <= {None, MissReason.STALE, MissReason.EVICTED, MissReason.TRUNCATED}
    assert None in seen
