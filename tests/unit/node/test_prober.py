"""Probes: who is measured beside the requests, how often, and that they cost little."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from kvmesh.core.reasons import MissReason
from kvmesh.core.replica import Replica
from kvmesh.node import prober as prober_module
from kvmesh.node.peers import Peers
from kvmesh.node.prober import REPEAT_S, UNPROBED_REPEAT_S, Prober
from kvmesh.transfer.fake import FakeTransport, Fault
from support.transfer_holder import Store, key
from unit.controller.makers import make_format, make_member

CHUNKS, CHUNK_BYTES = 4, 4096
KEYS = [key(index) for index in range(CHUNKS)]


class World:
    def __init__(self):
        self.store = Store(CHUNKS, CHUNK_BYTES)
        self.replica = Replica()
        self.threads = ThreadPoolExecutor(1)
        self.faults: dict[bytes, Fault] = {}
        self.probed: list[FakeTransport] = []
        self.told = 0
        self.peers = Peers(make_format(), lambda member: self.make(member, self.store.pool), self.threads)
        self.prober = Prober(self.replica, self.peers, self.make, CHUNK_BYTES, self.tell)

    def make(self, member, pool):
        transport = FakeTransport(self.store.pool, self.store.locate, pool, faults=self.faults)
        self.probed.append(transport)
        return transport

    def tell(self):
        self.told += 1

    def join(self, name, keys=KEYS):
        member = make_member(name, format=make_format())
        self.peers.add(member)
        self.replica.member_up(name, member.incarnation)
        self.replica.apply_snapshot(name, member.incarnation, 0, keys, first=True, last=True)
        self.probed.clear()
        return self.peers.get(name)

    def close(self):
        self.threads.shutdown()
        self.store.close()


@pytest.fixture
def world():
    world = World()
    yield world
    world.close()


async def test_a_peer_that_holds_something_is_measured_once(world):
    """And its memory is nobody's pool: what was probed is thrown away."""
    peer = world.join("a")
    assert world.prober._next(0.0) is peer
    await world.prober._probe(peer)
    assert peer.rate.rate is not None
    assert world.told == 1
    assert world.prober._next(1e12) is None


def test_who_holds_nothing_is_busy_or_left_alone_is_not_probed(world):
    nothing = world.join("nothing", keys=[])
    busy, failed, nixl = (world.join(name) for name in ("busy", "failed", "nixl"))
    busy.pulls = 1
    failed.breaker.failed(1e12)
    nixl.transport.name = "nixl"
    assert world.prober._next(0.0) is None
    busy.pulls = 0
    assert world.prober._next(0.0) is busy
    del nothing


async def test_what_is_quick_is_measured_in_two_sizes_and_the_quickest_counts(world, monkeypatch):
    """The first fetch pays for fresh memory and threads, and any one may fall into a bad moment."""
    took_s = iter([0.09, 0.004, 0.013, 0.002, 0.050, 0.080, 0.005])
    asked = []

    def fetch(transport, items):
        asked.append(len(items))
        return len(items), next(took_s)

    monkeypatch.setattr(prober_module, "_fetch", fetch)
    peer = world.join("a")
    await world.prober._probe(peer)
    assert asked == [CHUNKS, *(1, CHUNKS) * 3]
    assert peer.rate.rate.fixed_s == pytest.approx(0.001)
    assert peer.rate.rate.predict(CHUNKS * CHUNK_BYTES) == pytest.approx(0.005)


async def test_a_peer_that_a_bad_moment_made_look_slow_gets_its_chance(world, monkeypatch):
    """The engine refuses it by the rates that it was told, and tells of it; the next probe replaces the first one."""
    peer = world.join("a")
    with monkeypatch.context() as bad:
        bad.setattr(prober_module, "_fetch", lambda transport, items: (len(items), 8.0))
        await world.prober._probe(peer)
    assert peer.rate.rate.predict(CHUNKS * CHUNK_BYTES) == pytest.approx(8.0)
    assert world.prober._next(1e12) is None
    world.prober.refused(KEYS[0], ["a", "somebody else"])
    assert world.prober._next(1e12) is peer
    await world.prober._probe(peer)
    assert peer.rate.rate.predict(CHUNKS * CHUNK_BYTES) < 1.0


async def test_where_nobody_knows_what_a_peer_holds_what_was_refused_is_asked_for(world):
    """As with a node that asks the directory for each request."""
    peer = world.join("a", keys=[])
    assert world.prober._next(0.0) is None
    world.prober.refused(KEYS[1], ["a"])
    assert world.prober._next(0.0) is peer
    await world.prober._probe(peer)
    assert peer.rate.rate is not None
    assert not peer.wants_probe


def test_a_refused_peer_that_cannot_be_probed_is_forgotten_after_a_while(world):
    """So that the next request measures it."""
    peer = world.join("a")
    peer.transport.name = "nixl"
    peer.measured(CHUNK_BYTES, 5.0, 0)
    world.prober.refused(KEYS[0], ["a"])
    assert world.prober._next(100.0) is None
    assert world.prober._next(100.0 + UNPROBED_REPEAT_S - 1) is None
    assert peer.rate.rate is not None
    assert world.prober._next(100.0 + UNPROBED_REPEAT_S + 1) is None
    assert peer.rate.rate is None
    assert not peer.wants_probe
    assert world.told == 1


async def test_a_refused_peer_is_measured_again_after_a_while(world, monkeypatch):
    """It may have become faster; the longer a probe takes, the rarer it is."""
    peer = world.join("a")
    await world.prober._probe(peer)
    peer.wants_probe = True
    begin_s = prober_module.time.monotonic()
    assert world.prober._next(begin_s) is None
    assert world.prober._next(begin_s + REPEAT_S + 1) is peer
    monkeypatch.setattr(prober_module, "_fetch", lambda transport, items: (len(items), 3.0))
    await world.prober._probe(peer)
    assert world.prober._next(begin_s + 50) is None
    assert not peer.wants_probe
    peer.wants_probe = True
    assert world.prober._next(begin_s + 70) is peer


async def test_a_probe_that_brings_nothing_measures_nothing(world):
    """The peer's breaker learns of its faults from fetches."""
    peer = world.join("a")
    world.faults |= {each: Fault(reason=MissReason.PEER_LOST) for each in KEYS}
    await world.prober._probe(peer)
    assert peer.rate.rate is None
    assert world.told == 0
    assert world.prober._next(0.0) is None, "and is not repeated at once"


async def test_close_ends_a_probe_that_runs(world):
    peer = world.join("a")
    blocked = threading.Event()
    world.faults |= {each: Fault(until=blocked, reason=MissReason.PEER_LOST) for each in KEYS}
    probe = asyncio.create_task(world.prober._probe(peer))
    while world.prober._running is None:
        await asyncio.sleep(0)
    (probing,) = world.probed
    world.prober.close()
    assert probing._closed.is_set()
    blocked.set()
    await probe
    assert peer.rate.rate is None


async def test_what_is_remembered_of_probes_goes_with_the_peers(world):
    peer = world.join("a")
    await world.prober._probe(peer)
    world.peers.remove("a")
    world.prober._next(0.0)
    assert not world.prober._not_before_s


async def test_what_cannot_be_probed_costs_the_node_nothing(world, monkeypatch):
    """Such as a node without a descriptor for a probe's memory: the others get their turn all the same."""
    monkeypatch.setattr(prober_module, "LOOK_S", 0.0)
    first, second = world.join("a"), world.join("b")
    make, done = world.make, asyncio.Event()

    def fail_for_the_first(member, pool):
        if member is first.member:
            raise OSError(24, "Too many open files")
        return make(member, pool)

    world.prober._make, world.prober._measured = fail_for_the_first, done.set
    running = asyncio.create_task(world.prober.run())
    await asyncio.wait((running, asyncio.create_task(done.wait())), timeout=20, return_when=asyncio.FIRST_COMPLETED)
    assert done.is_set()
    assert second.rate.rate is not None
    running.cancel()
