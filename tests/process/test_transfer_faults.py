"""What a fetch does when the peer's process dies, stops, is slow, lies or reuses its slots in the middle of it.

tcp and nixl keep the same promises, so they face the same tests: nixl over UCX's tcp (READs are emulated and really
under way when the fault comes), and where bytes are at stake also over what UCX prefers within one host.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time

import pytest

from kvmesh.core.reasons import MissReason
from kvmesh.transfer.base import Deadline
from kvmesh.transfer.factory import choose
from kvmesh.transfer.nixl import NixlTransport
from kvmesh.transfer.nixl_agent import prepare_environment, unavailable
from kvmesh.transfer.pool import HostPool
from kvmesh.transfer.tcp import TcpTransport
from support.keys import environment_security
from support.transfer_holder import OTHER_INCARNATION, HolderProcess, content, hello, items

CHUNKS, CHUNK_BYTES = 96, 1 << 20
PATTERN = b"\xa5" * CHUNK_BYTES
OURS = hello(CHUNK_BYTES, "me", "0" * 16)

pytestmark = [pytest.mark.process, pytest.mark.timeout(120)]

without_nixl = unavailable()
needs_nixl = [pytest.mark.nixl, pytest.mark.skipif(without_nixl is not None, reason=str(without_nixl))]
CHANNELS = ["tcp", pytest.param("nixl-tcp", marks=needs_nixl)]
NIXL_HOST = pytest.param("nixl-host", marks=needs_nixl)
everywhere = pytest.mark.parametrize("setup", [*CHANNELS, NIXL_HOST], indirect=True)
only_tcp = pytest.mark.parametrize("setup", CHANNELS[:1], indirect=True)  # where nixl shares the code
only_nixl = pytest.mark.parametrize("setup", CHANNELS[1:], indirect=True)


def soon(seconds: float = 30.0, stall_s: float = 30.0) -> Deadline:
    return Deadline(time.monotonic() + seconds, stall_s)


class Fetcher:
    """A pool and a transport towards a holder process."""

    def __init__(self, channel: str, holder: HolderProcess, target=None, ours=OURS, **options):
        self.holder = holder
        self.pool = HostPool.create(CHUNKS, CHUNK_BYTES)
        options.setdefault("security", environment_security())
        if channel == "tcp":
            self.transport = TcpTransport(target or holder.target, ours, self.pool, **options)
        else:
            prepare_environment("127.0.0.1")
            self.transport = NixlTransport(target or holder.target, ours, self.pool, **options)

    def fetch(self, count=CHUNKS, deadline=None, progress=None) -> list[MissReason | None]:
        """Reasons of the first `count` chunks. Checks that each hit has the right bytes, which may never fail."""
        outcomes = self.transport.fetch(items(count), deadline or soon(), progress)
        for index, outcome in enumerate(outcomes):
            if outcome.reason is None:
                assert bytes(self.pool.row(index)) == content(index, CHUNK_BYTES), f"chunk {index} is wrong"
        return [outcome.reason for outcome in outcomes]

    def fetch_until_whole(self) -> None:
        """Until every chunk arrives; a few fetches may be lost while the peer's NIXL process is being replaced."""
        tries = (self.fetch() for _ in range(10))
        assert any(set(found) == {None} for found in tries)

    def fill(self) -> None:
        """As the engine may do with the slots of a fetch that is over."""
        for slot in range(CHUNKS):
            self.pool.row(slot)[:] = PATTERN

    def check_untouched(self) -> None:
        for slot in range(CHUNKS):
            assert bytes(self.pool.row(slot)) == PATTERN, f"slot {slot} was written after the fetch was over"

    def close(self) -> None:
        self.transport.close()
        self.pool.close()


class Setup:
    def __init__(self, channel: str, stack: contextlib.ExitStack):
        self.channel = channel
        self.stack = stack

    def holder(self, **options) -> HolderProcess:
        tls = "tcp" if self.channel == "nixl-tcp" else ""
        nixl = self.channel != "tcp"
        return self.stack.enter_context(HolderProcess(CHUNKS, CHUNK_BYTES, nixl=nixl, ucx_tls=tls, **options))

    def fetcher(self, holder: HolderProcess, **options) -> Fetcher:
        return self.stack.enter_context(contextlib.closing(Fetcher(self.channel, holder, **options)))


@pytest.fixture(params=CHANNELS)
def setup(request):
    with contextlib.ExitStack() as stack:
        yield Setup(request.param, stack)


@contextlib.contextmanager
def ended(pid: int):
    """On leaving, wait until that process is no more."""
    watched = os.pidfd_open(pid)
    try:
        yield
        assert select.select([watched], [], [], 30)[0], f"process {pid} goes on"
    finally:
        os.close(watched)


class At:
    """Does something when the first chunk has arrived, in the fetching thread: in the middle of the fetch."""

    def __init__(self, action):
        self.action = action

    def __call__(self, outcome):
        if self.action is not None:
            action, self.action = self.action, None
            action()


@everywhere
def test_every_chunk_arrives_whole(setup):
    """And again over the same connection, which stays open."""
    holder = setup.holder()
    fetcher = setup.fetcher(holder)
    assert fetcher.transport.warm_up(soon()) is None
    connects = fetcher.transport.statistics().connects
    for _ in range(3):
        fetcher.fill()
        assert fetcher.fetch() == [None] * CHUNKS
    assert fetcher.transport.statistics().connects <= connects + 1
    assert holder.tell("statistics")["served_chunks"] == 3 * CHUNKS


def test_a_peer_that_is_killed_in_the_middle_is_lost(setup):
    holder = setup.holder()
    fetcher = setup.fetcher(holder)
    found = fetcher.fetch(progress=At(lambda: holder.send_signal(signal.SIGKILL)))
    assert found[0] is None
    assert found[-1] is MissReason.PEER_LOST
    assert set(found) == {None, MissReason.PEER_LOST}
    holder.process.wait(30)  # a process that is ending still takes connections, and loses them
    assert set(fetcher.fetch(deadline=soon(5))) == {MissReason.PEER_UNREACHABLE}


@everywhere
def test_a_fetch_ends_with_its_transport(setup):
    """As when the peer leaves, whatever the fetch is doing then: the rest is lost, and nothing is raised."""
    holder = setup.holder()
    for _ in range(5):
        fetcher = setup.fetcher(holder)
        found = fetcher.fetch(progress=At(fetcher.transport.close))
        assert found[0] is None
        assert set(found) <= {None, MissReason.PEER_LOST}


@everywhere
def test_a_peer_that_is_stopped_in_the_middle_has_stalled_and_writes_nothing_later(setup):
    """The fetch ends in the stall time; what the peer sends when it goes on reaches no slot; and it goes on serving.

    With nixl, UCX may abort the process that serves when it goes on; its successor serves then.
    """
    holder = setup.holder()
    fetcher = setup.fetcher(holder)
    found = fetcher.fetch(deadline=soon(60, 0.4), progress=At(lambda: holder.send_signal(signal.SIGSTOP)))
    assert found[0] is None
    assert found[-1] is MissReason.PEER_STALLED
    assert set(found) == {None, MissReason.PEER_STALLED}
    fetcher.fill()
    holder.send_signal(signal.SIGCONT)
    setup.fetcher(holder).fetch_until_whole()  # so that whatever was under way has arrived
    fetcher.check_untouched()
    fetcher.fetch_until_whole()


def test_a_fetch_ends_at_its_deadline_and_writes_nothing_later(setup):
    """As above, with the deadline before the stall time."""
    holder = setup.holder()
    fetcher = setup.fetcher(holder)
    deadline = soon(5, 60)

    def stop_and_hurry():
        holder.send_signal(signal.SIGSTOP)
        time.sleep(max(0.0, deadline.at_s - time.monotonic() - 0.3))

    found = fetcher.fetch(deadline=deadline, progress=At(stop_and_hurry))
    assert found[0] is None
    assert found[-1] is MissReason.DEADLINE
    fetcher.fill()
    holder.send_signal(signal.SIGCONT)
    setup.fetcher(holder).fetch_until_whole()
    fetcher.check_untouched()


def test_what_a_slow_peer_has_sent_by_the_deadline_counts(setup):
    """A slow peer is not a stalled one; its prefix is used."""
    holder = setup.holder()
    fetcher = setup.fetcher(holder)
    assert fetcher.transport.warm_up(soon()) is None
    holder.tell("delay", 0.02)
    found = fetcher.fetch(deadline=soon(0.5, 60))
    assert found[-1] is MissReason.DEADLINE
    if setup.channel == "tcp":  # nixl learns where all chunks are before it reads the first
        assert found[0] is None


@everywhere
def test_a_slot_reused_in_the_middle_is_stale(setup):
    """Never wrong bytes: the owner took the slot back after the holder had looked and before the bytes had left."""
    holder = setup.holder(racing=(3,))
    fetcher = setup.fetcher(holder)
    found = fetcher.fetch(8)
    assert found[:4] == [None, None, None, MissReason.STALE]
    assert holder.tell("statistics")["stale"] == 1


@everywhere
def test_slots_reused_all_the_time_never_give_wrong_bytes(setup):
    """The holder's owner rewrites slots as fast as it can, with the same chunks and others, while we fetch."""
    holder = setup.holder()
    fetcher = setup.fetcher(holder)
    holder.tell("churn", 8)
    seen: list[MissReason | None] = []
    for tries in range(2000):  # how many find a slot at rest is up to the machine
        seen += fetcher.fetch(24)
        if tries >= 12 and None in seen:
            break
    assert set(seen) <= {None, MissReason.STALE, MissReason.EVICTED, MissReason.TRUNCATED}
    assert None in seen


@everywhere
def test_a_wrong_byte_is_noticed(setup):
    holder = setup.holder()
    fetcher = setup.fetcher(holder)
    holder.tell("spoil", 2)
    found = fetcher.fetch(4)
    assert found[:3] == [None, None, MissReason.CORRUPT]


def test_a_chunk_that_is_gone_ends_the_prefix(setup):
    holder = setup.holder()
    fetcher = setup.fetcher(holder)
    holder.tell("forget", 5)
    holder.tell("retract", 7)
    found = fetcher.fetch(8)
    assert found[:6] == [None] * 5 + [MissReason.EVICTED]
    assert found[7] in {MissReason.EVICTED, MissReason.TRUNCATED}


@only_tcp
def test_another_incarnation_is_not_asked(setup):
    holder = setup.holder()
    fetcher = setup.fetcher(holder, target=holder.target._replace(incarnation=OTHER_INCARNATION))
    assert set(fetcher.fetch(2)) == {MissReason.PEER_UNREACHABLE}


@only_tcp
def test_another_format_is_not_exchanged(setup):
    fetcher = setup.fetcher(setup.holder(), ours=hello(CHUNK_BYTES, "me", "0" * 16, kv_layout="v2"))
    assert set(fetcher.fetch(2)) == {MissReason.FORMAT_MISMATCH}
    assert "kv_layout" in fetcher.transport.statistics().last_error


def test_a_restarted_peer_on_the_same_port_is_fetched_from_again(setup):
    """Same identity, new process: idle connections are replaced without a miss."""
    first = setup.holder()
    fetcher = setup.fetcher(first)
    assert fetcher.fetch(4) == [None] * 4
    first.__exit__()
    setup.holder(port=first.port)
    assert fetcher.fetch(4) == [None] * 4


@only_nixl
def test_the_process_that_serves_nixl_is_replaced_when_it_dies(setup):
    """UCX may abort it. Peers attach to its successor without a miss; a fetch in the middle of its death is lost."""
    holder = setup.holder()
    fetcher = setup.fetcher(holder)
    assert fetcher.fetch(4) == [None] * 4
    with ended(holder.nixl_pid):
        os.kill(holder.nixl_pid, signal.SIGKILL)
    assert fetcher.fetch(4) == [None] * 4
    holder.nixl_pid = holder.tell("statistics")["nixl_pid"]
    found = fetcher.fetch(progress=At(lambda: os.kill(holder.nixl_pid, signal.SIGKILL)))
    assert set(found) <= {None, MissReason.PEER_LOST}
    fetcher.fetch_until_whole()
    holder.nixl_pid = holder.tell("statistics")["nixl_pid"]


@only_nixl
def test_a_fabric_that_does_not_lead_to_the_peer_costs_no_hits(setup, monkeypatch):
    """NIXL is there on both sides and cannot connect: the bytes come over tcp, and over nixl once it can."""
    holder = setup.holder()
    monkeypatch.setenv("UCX_TLS", "rc")  # no such device here
    pool = setup.stack.enter_context(contextlib.closing(HostPool.create(CHUNKS, CHUNK_BYTES)))
    options = {"host": "127.0.0.1", "security": environment_security()}
    ways = choose("nixl", holder.target, OURS, pool, **options).transport
    assert ways.name == "nixl"
    assert {outcome.reason for outcome in ways.fetch(items(CHUNKS), soon())} == {None}
    assert ways.name == "tcp"
    monkeypatch.setenv("UCX_TLS", "tcp")
    until_s = time.monotonic() + 60
    while ways.name == "tcp":
        assert time.monotonic() < until_s
        assert {outcome.reason for outcome in ways.fetch(items(8), soon())} == {None}
    assert {outcome.reason for outcome in ways.fetch(items(CHUNKS), soon())} == {None}
    assert ways.name == "nixl"
    ways.close()


@only_nixl
def test_the_process_that_serves_nixl_ends_with_its_node(setup):
    """Kill -9 of the node leaves nothing behind that could be read from."""
    holder = setup.holder()
    with ended(holder.nixl_pid):
        holder.process.kill()
        holder.process.wait()
    holder.nixl_pid = None
