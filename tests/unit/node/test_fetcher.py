"""Fetch jobs over fake transports: who is asked again, who is left alone, and that every job ends."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest

from kvmesh.core.gate import Policy, Saved, Verdict
from kvmesh.core.reasons import MissReason
from kvmesh.core.replica import Replica
from kvmesh.node import fetcher as fetcher_module
from kvmesh.node.fetcher import Fetcher, make_items
from kvmesh.node.peers import CORRUPT_LIMIT, UNDELIVERED_LIMIT, Peers
from kvmesh.transfer.fake import FakeTransport, Fault
from kvmesh.transfer.pool import HostPool
from support.transfer_holder import Store, key
from unit.controller.makers import make_format, make_member

CHUNKS, CHUNK_BYTES, POOL_SLOTS = 4, 4096, 12
KEYS = [key(index) for index in range(CHUNKS)]
SLOTS = list(range(CHUNKS))


class World:
    """A fetcher and some holders that hold everything, all in this process."""

    def __init__(self, *holders: str, stall_s: float = 5.0) -> None:
        self.pool = HostPool.create(POOL_SLOTS, CHUNK_BYTES)
        self.store = Store(CHUNKS, CHUNK_BYTES)
        self.replica = Replica()
        self.threads = ThreadPoolExecutor(1)
        self.transports: dict[str, FakeTransport] = {}
        self.made = 0
        self.aborted = False
        self.peers = Peers(make_format(), self.make_transport, self.threads)
        self.quarantined: list[tuple[str, bytes]] = []
        self.fetcher = Fetcher(
            self.replica,
            self.peers,
            self.pool,
            stall_s=stall_s,
            abort=self.abort,
            quarantine=self.quarantine,
            policy=Policy(),
        )
        for name in holders:
            self.join(name)

    def join(self, name: str) -> None:
        member = make_member(name, format=make_format())
        self.peers.add(member)
        self.replica.member_up(name, member.incarnation)
        self.replica.apply_snapshot(name, member.incarnation, 0, KEYS, first=True, last=True)

    def make_transport(self, member: object) -> FakeTransport:
        self.made += 1
        made = FakeTransport(self.store.pool, self.store.locate, self.pool)
        self.transports[member.instance_id] = made  # type: ignore[attr-defined]
        return made

    def abort(self) -> None:
        self.aborted = True

    def quarantine(self, instance_id: str, incarnation: str, bad: bytes) -> None:
        self.quarantined.append((instance_id, bad))
        self.replica.quarantine(instance_id, incarnation, bad)

    async def fetch(self, timeout_s: float = 5.0) -> list[MissReason | None]:
        result = await self.fetcher.fetch(make_items(KEYS, SLOTS), timeout_s)
        return [outcome.reason for outcome in result.outcomes]

    def close(self) -> None:
        self.fetcher.close()
        self.threads.shutdown()
        self.store.close()
        self.pool.close()


@pytest.fixture
def world() -> Iterator[World]:
    made = World("a")
    yield made
    made.close()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Breakers let everybody through at once."""
    monkeypatch.setattr("kvmesh.core.breaker.Breaker.allows", lambda self, now_s: True)
    return


async def test_a_corrupt_chunk_puts_its_holder_in_quarantine_for_it(world: World) -> None:
    """It is a miss, counted for the holder; the holder is used for its other chunks, and others for that one."""
    world.transports["a"].faults[KEYS[1]] = Fault(is_corrupt=True)
    result = await world.fetcher.fetch(make_items(KEYS, SLOTS), 5.0)
    reasons = [outcome.reason for outcome in result.outcomes]
    assert reasons == [None, MissReason.CORRUPT, MissReason.TRUNCATED, MissReason.TRUNCATED]
    assert result.corrupt == {"a": 1}
    assert world.quarantined == [("a", KEYS[1])]
    assert world.replica.holders(KEYS[1]) == ()
    assert world.replica.holders(KEYS[2]) == ("a",)
    world.join("b")
    assert await world.fetch() == [None] * CHUNKS
    assert world.peers.get("a").corrupt_chunks == 1  # type: ignore[union-attr]


async def test_another_holder_delivers_what_came_corrupt_in_the_same_job(world: World) -> None:
    world.join("b")
    for name in ("a", "b"):
        world.transports[name].faults[KEYS[2]] = Fault(is_corrupt=name == "a")
    assert await world.fetch() == [None] * CHUNKS


@pytest.mark.usefixtures("clock")
async def test_a_peer_with_repeated_corruption_gets_the_longest_pause(world: World) -> None:
    peer = world.peers.get("a")
    assert peer is not None
    pauses = []
    for index in range(CORRUPT_LIMIT):
        world.transports["a"].faults[KEYS[index]] = Fault(is_corrupt=True)
        await world.fetcher.fetch(make_items([KEYS[index]], [0]), 5.0)
        pauses.append(peer.breaker._pause_s)
    assert pauses[-1] == pytest.approx(15.0)
    assert pauses[0] < 1
    assert peer.breaker.is_open


@pytest.mark.parametrize("reason", [MissReason.STALE, MissReason.EVICTED])
async def test_what_is_announced_and_never_comes_is_not_asked_for_for_ever(world: World, reason: MissReason) -> None:
    """An entry that the holder forgot to take back costs a few misses, not one for every request."""
    world.transports["a"].faults[KEYS[0]] = Fault(reason=reason)
    for _ in range(UNDELIVERED_LIMIT - 1):
        assert (await world.fetch())[0] is reason
        assert not world.quarantined
    await world.fetch()
    assert world.quarantined == [("a", KEYS[0])]
    assert (await world.fetch())[0] is MissReason.NOT_PUBLISHED


async def test_a_success_in_between_forgives(world: World) -> None:
    for _ in range(2 * UNDELIVERED_LIMIT):
        world.transports["a"].faults[KEYS[0]] = Fault(reason=MissReason.STALE)
        await world.fetch()
        world.transports["a"].faults.clear()
        assert await world.fetch() == [None] * CHUNKS
    assert not world.quarantined


async def test_a_peer_that_delivers_nothing_until_the_deadline_is_left_alone(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the deadline is shorter than the stall time, a cut link must not cost every request its deadline."""
    monkeypatch.setattr(fetcher_module, "FAIR_TIME_S", 0.05)
    world.transports["a"].faults[KEYS[0]] = Fault(until=threading.Event())
    assert await world.fetch(timeout_s=0.1) == [MissReason.DEADLINE] * CHUNKS
    assert (await world.fetch(timeout_s=0.1))[0] is MissReason.BREAKER_OPEN


async def test_a_peer_without_a_fair_chance_is_not_blamed_and_may_be_probed_again(world: World) -> None:
    peer = world.peers.get("a")
    assert peer is not None
    peer.breaker.failed(0.0)  # long ago: half open
    world.transports["a"].faults[KEYS[0]] = Fault(until=threading.Event())
    assert await world.fetch(timeout_s=0.01) == [MissReason.DEADLINE] * CHUNKS
    assert peer.breaker.is_open
    world.transports["a"].faults.clear()
    assert await world.fetch() == [None] * CHUNKS
    assert not peer.breaker.is_open


async def test_giving_up_makes_no_transport_for_a_peer_that_has_left(world: World) -> None:
    """Nobody would ever close it."""
    blocked = threading.Event()
    world.transports["a"].faults[KEYS[0]] = Fault(until=blocked)
    job = asyncio.create_task(world.fetch())
    while not world.fetcher._active:
        await asyncio.sleep(0)
    world.peers.remove("a")
    made = world.made
    world.fetcher.give_up()
    blocked.set()
    reasons = await job
    assert set(reasons) == {MissReason.PEER_LOST} or MissReason.DRAINING in reasons
    assert world.made == made
    world.fetcher.resume()


async def test_a_transport_that_raises_ends_the_process(world: World) -> None:
    """Its slots may still be written into, and nothing less would stop that."""

    def broken(*_: object) -> None:
        raise RuntimeError("bug")

    world.transports["a"].fetch = broken  # type: ignore[assignment,method-assign]
    with pytest.raises(RuntimeError, match="bug"):
        await world.fetch()
    assert world.aborted


async def test_many_peers_are_not_all_connected_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond a number a connection is made by the first fetch."""
    monkeypatch.setattr("kvmesh.node.peers.MAX_WARM_PEERS", 2)
    world = World(*(f"peer-{index}" for index in range(5)))
    world.threads.shutdown()
    assert sum(each.statistics().connects for each in world.transports.values()) == 2
    world.close()


def test_what_peers_note_of_keys_is_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvmesh.node.peers.MAX_UNDELIVERED", 3)
    peer = world.peers.get("a")
    assert peer is not None
    for index in range(100):
        assert not peer.note(key(index), MissReason.STALE)
    assert len(peer._undelivered) == 3


def test_another_format_is_no_peer(world: World) -> None:
    other = msgspec.structs.replace(make_format(), chunk_tokens=7)
    assert not world.peers.add(make_member("c", format=other))
    assert world.peers.usable("c") is MissReason.PEER_UNREACHABLE


# -- many holders ------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each chunk is a piece of its own."""
    monkeypatch.setattr("kvmesh.core.plan.PIECE_BYTES", CHUNK_BYTES)


@pytest.mark.usefixtures("small_pieces")
async def test_a_prefix_comes_from_all_its_holders(world: World) -> None:
    world.join("b")
    result = await world.fetcher.fetch(make_items(KEYS, SLOTS), 5.0)
    assert sorted(result.holders) == ["a", "b"]
    assert [outcome.reason for outcome in result.outcomes] == [None] * CHUNKS
    for index in SLOTS:
        assert bytes(world.pool.row(index)) == bytes(world.store.pool.row(index))


@pytest.mark.usefixtures("small_pieces")
async def test_what_a_failed_holder_owed_is_asked_of_another_at_once(world: World) -> None:
    """Without waiting for the holders that are still delivering."""
    for name in ("b", "c"):
        world.join(name)
    blocked = threading.Event()
    world.transports["a"].faults = {key: Fault(reason=MissReason.PEER_LOST) for key in KEYS}
    world.transports["b"].faults = {key: Fault(until=blocked) for key in KEYS}
    job = asyncio.create_task(world.fetcher.fetch(make_items(KEYS, SLOTS), 30.0))
    c = world.transports["c"]
    while c.statistics().fetched_chunks < 2 and not job.done():  # its own, and one of those of a
        await asyncio.sleep(0.001)
    assert not job.done()
    blocked.set()
    assert [outcome.reason for outcome in (await job).outcomes] == [None] * CHUNKS


async def test_a_fetch_that_finds_no_thread_ends_at_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long those take that were there before it; and its peer is not blamed for it."""
    monkeypatch.setattr(fetcher_module, "MAX_THREADS", 1)
    world = World("a", "b")
    blocked = threading.Event()
    for name in ("a", "b"):
        world.transports[name].faults[KEYS[0]] = Fault(until=blocked)
    first = asyncio.create_task(world.fetcher.fetch(make_items(KEYS[:1], [0]), 30.0))
    await asyncio.sleep(0)
    second = asyncio.create_task(world.fetcher.fetch(make_items(KEYS[1:], [1, 2, 3]), 0.02))
    done, _ = await asyncio.wait((first, second), return_when=asyncio.FIRST_COMPLETED)
    assert done == {second}
    assert {outcome.reason for outcome in second.result().outcomes} == {MissReason.DEADLINE}
    peer = world.peers.get("b")
    assert peer is not None
    assert not peer.breaker.is_open
    assert peer.rate.rate is None
    blocked.set()
    assert [outcome.reason for outcome in (await first).outcomes] == [None]
    assert not world.fetcher._active
    world.close()


# -- one fetch per key -------------------------------------------------------------------------------------------------


async def test_who_asks_for_what_is_under_way_gets_a_copy(world: World) -> None:
    """The holder is asked once; the second job has its own bytes, and the first is not over before."""
    blocked = threading.Event()
    world.transports["a"].faults[KEYS[0]] = Fault(until=blocked)
    first = asyncio.create_task(world.fetch())
    await asyncio.sleep(0)
    second = asyncio.create_task(world.fetcher.fetch(make_items(KEYS, [4, 5, 6, 7]), 5.0))
    await asyncio.sleep(0)
    blocked.set()
    assert await first == [None] * CHUNKS
    copied = [bytes(world.pool.row(slot)) for slot in (4, 5, 6, 7)]
    assert copied == [bytes(world.store.pool.row(slot)) for slot in SLOTS]
    outcomes = (await second).outcomes
    assert [(outcome.reason, outcome.item.slot) for outcome in outcomes] == [(None, slot) for slot in (4, 5, 6, 7)]
    assert world.transports["a"].statistics().fetched_chunks == CHUNKS
    assert world.fetcher.under_way.joined_chunks == CHUNKS
    assert not world.fetcher.under_way._waiting


async def test_who_has_joined_in_vain_asks_itself(world: World) -> None:
    """The first job's deadline is not the second's."""
    blocked = threading.Event()
    world.transports["a"].faults[KEYS[0]] = Fault(until=blocked)
    first = asyncio.create_task(world.fetch(timeout_s=0.05))
    await asyncio.sleep(0)
    second = asyncio.create_task(world.fetcher.fetch(make_items(KEYS, [4, 5, 6, 7]), 30.0))
    assert await first == [MissReason.DEADLINE] * CHUNKS
    blocked.set()
    assert [outcome.reason for outcome in (await second).outcomes] == [None] * CHUNKS


async def test_who_waits_for_another_job_has_its_own_deadline(world: World) -> None:
    blocked = threading.Event()
    world.transports["a"].faults[KEYS[0]] = Fault(until=blocked)
    first = asyncio.create_task(world.fetch(timeout_s=30.0))
    await asyncio.sleep(0)
    result = await world.fetcher.fetch(make_items(KEYS, [4, 5, 6, 7]), 0.02)
    assert {outcome.reason for outcome in result.outcomes} == {MissReason.DEADLINE}
    before = bytes(world.pool.row(4))
    blocked.set()
    assert await first == [None] * CHUNKS
    assert bytes(world.pool.row(4)) == before, "nobody writes into the slots of a job that is over"


# -- the gate ----------------------------------------------------------------------------------------------------------


async def test_what_is_slower_than_computing_is_not_fetched(world: World) -> None:
    peer = world.peers.get("a")
    assert peer is not None
    peer.measured(CHUNK_BYTES, 1.0, 0)
    result = await world.fetcher.fetch(make_items(KEYS, SLOTS), 30.0, Saved(0.0, 0.5))
    assert [outcome.reason for outcome in result.outcomes] == [MissReason.GATE_REFUSED] * CHUNKS
    assert result.gate is not None
    assert result.gate.verdict is Verdict.SLOWER
    assert peer.wants_probe
    assert world.transports["a"].statistics().fetched_chunks == 0
    assert await world.fetch() == [None] * CHUNKS, "without a word about computing, everything is fetched"
    assert not peer.wants_probe


async def test_an_allowed_fetch_takes_no_longer_than_computing(world: World) -> None:
    """The link has become slow since it was measured: the error has an end."""
    peer = world.peers.get("a")
    assert peer is not None
    peer.measured(1_000_000_000, 1.0, 0)
    world.transports["a"].faults[KEYS[0]] = Fault(until=threading.Event())
    result = await world.fetcher.fetch(make_items(KEYS, SLOTS), 60.0, Saved(0.0, 0.02))
    assert {outcome.reason for outcome in result.outcomes} == {MissReason.DEADLINE}
    assert result.seconds < 30
    assert peer.rate.rate is not None
    assert peer.rate.rate.predict(CHUNK_BYTES) > 0.02, "and it is remembered"


async def test_a_deadline_does_not_make_a_slow_peer_look_faster(world: World) -> None:
    """That a chunk takes longer than the little time that there was is no news of one that takes seconds."""
    peer = world.peers.get("a")
    assert peer is not None
    peer.measured(CHUNK_BYTES, 2.0, 0)
    before = peer.rate.rate
    world.transports["a"].faults[KEYS[0]] = Fault(until=threading.Event())
    for _ in range(4):
        result = await world.fetcher.fetch(make_items(KEYS, SLOTS), 0.01)
        assert {outcome.reason for outcome in result.outcomes} == {MissReason.DEADLINE}
    assert peer.rate.rate == before


async def test_fetches_are_measured_and_failures_are_not(world: World) -> None:
    peer = world.peers.get("a")
    assert peer is not None
    world.transports["a"].faults[KEYS[0]] = Fault(reason=MissReason.PEER_LOST)
    await world.fetch()
    assert peer.rate.rate is None
    world.transports["a"].faults.clear()
    peer.breaker.succeeded()
    await world.fetch()
    assert peer.rate.rate is not None
    assert peer.pulls == 0
    rates = world.peers.rates(world.replica)
    assert [rate.instance_id for rate in rates.peers] == ["a"]
    world.join("b")
    assert world.peers.rates(world.replica).unmeasured == 1
