"""Commands on a pool: a made-up pool and a clock that the test moves."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmesh.bench.stand_in import make_key
from kvmesh.core.reasons import MissReason
from kvmesh.node import pool_operations
from kvmesh.node.pool_operations import MAX_WAITING, News, PoolOperations, SlotState
from kvmesh.wire.operations import (
    AnyCommand,
    ClearChunks,
    ListHot,
    PinChunks,
    Report,
    RunState,
    UnpinChunks,
    WarmChunks,
)

KEYS = [make_key(f"key-{index}") for index in range(40)]
ID, OTHER = "a" * 16, "b" * 16


class World:
    """A pool of which the test says what becomes of fetches, and the operations on it."""

    chunk_bytes = 10

    def __init__(self, *, slots: int = 32, held: int = 0, pin_max_share: float = 0.5) -> None:
        self.slots = slots
        self.now_s = 100.0
        self.chunks = dict.fromkeys(KEYS[:held], SlotState.READY)
        self.holds: Counter[bytes] = Counter()
        self.published = set(KEYS)
        """What others hold."""
        self.reasons: dict[bytes, MissReason] = {}
        self.warms: list[str] = []
        self.operations = PoolOperations(self, pin_max_share=pin_max_share, clock=lambda: self.now_s)

    def keys(self) -> list[bytes]:
        return list(self.chunks)

    def hottest(self, limit: int) -> list[bytes]:
        return list(self.chunks)[::-1][:limit]

    def state(self, key: bytes) -> SlotState:
        return self.chunks.get(key, SlotState.ABSENT)

    def release(self, keys: list[bytes]) -> None:
        for key in keys:
            assert self.chunks.pop(key) is SlotState.READY

    def hold(self, key: bytes) -> None:
        assert self.chunks[key] in (SlotState.READY, SlotState.BUSY)
        self.holds[key] += 1
        self.chunks[key] = SlotState.BUSY

    def let_go(self, key: bytes) -> None:
        self.holds[key] -= 1
        assert self.holds[key] >= 0
        if not self.holds[key]:
            self.chunks[key] = SlotState.READY

    def begin_warm(self, operation_id: str) -> None:
        self.warms.append(operation_id)

    def end_warm(self, operation_id: str) -> None:
        self.warms.remove(operation_id)

    def pull(self, operation_id: str, key: bytes) -> MissReason | None:
        assert operation_id in self.warms
        if key not in self.published:
            return MissReason.NOT_PUBLISHED
        self.chunks[key] = SlotState.WRITING
        return None

    def pulled(self, operation_id: str, key: bytes) -> MissReason | None:
        assert operation_id in self.warms
        return self.reasons.get(key)

    # -- what the test does --------------------------------------------------------------------------------------------

    def arrive(self) -> int:
        """All that is on its way comes, unless there is a reason against it. Returns how much was under way."""
        writing = [key for key, state in self.chunks.items() if state is SlotState.WRITING]
        for key in writing:
            if key in self.reasons:
                del self.chunks[key]
            else:
                self.chunks[key] = SlotState.READY
        return len(writing)

    def submit(self, command: AnyCommand, operation_id: str = ID, timeout_s: float = 10.0) -> None:
        assert self.operations.submit(operation_id, command, self.now_s + timeout_s)

    def step(self, seconds: float = 0.0) -> list[News]:
        self.now_s += seconds
        return self.operations.step(self.now_s)

    def last(self, command: AnyCommand) -> Report:
        """What one step makes of a command that needs no more."""
        self.submit(command)
        [(operation_id, report)] = self.step()
        assert operation_id == ID
        assert not self.operations.has_work()
        return report


def test_clear_everything() -> None:
    world = World(held=5)
    report = world.last(ClearChunks())
    assert (report.state, report.outcomes, report.bytes_done) == (RunState.DONE, {"cleared": 5}, 50)
    assert not world.chunks


def test_clear_waits_for_what_is_being_read_or_written() -> None:
    """Nothing is taken from under a transfer; it goes when it is idle."""
    world = World(held=3)
    world.chunks[KEYS[0]], world.chunks[KEYS[1]] = SlotState.BUSY, SlotState.WRITING
    world.submit(ClearChunks(keys=KEYS[:4]))
    [(_, report)] = world.step()
    assert (report.state, report.outcomes) == (RunState.RUNNING, {"cleared": 1, "absent": 1})
    world.chunks[KEYS[0]] = world.chunks[KEYS[1]] = SlotState.READY
    [(_, report)] = world.step()
    assert (report.state, report.chunks_done) == (RunState.DONE, 4)
    assert not world.chunks


def test_clear_gives_up_what_never_becomes_idle() -> None:
    world = World(held=2)
    world.chunks[KEYS[0]] = SlotState.BUSY
    world.submit(ClearChunks(), timeout_s=5.0)
    world.step()
    [(_, report)] = world.step(5.0)
    assert (report.state, report.outcomes) == (RunState.PARTLY, {"cleared": 1, "busy": 1})
    assert not world.operations.has_work()


def test_clear_takes_pinned_chunks_too() -> None:
    world = World(held=2)
    world.last(PinChunks(keys=KEYS[:2], seconds=60.0))
    assert world.last(ClearChunks()).outcomes == {"cleared": 2}
    assert world.operations.pinned_chunks == 0
    assert not any(world.holds.values())


def test_pin_and_unpin() -> None:
    world = World(held=3)
    report = world.last(PinChunks(keys=[*KEYS[:2], KEYS[9]], seconds=60.0))
    assert (report.state, report.outcomes, report.pinned_chunks) == (RunState.PARTLY, {"pinned": 2, "absent": 1}, 2)
    assert world.holds == {KEYS[0]: 1, KEYS[1]: 1}
    report = world.last(UnpinChunks(keys=[KEYS[0], KEYS[2]]))
    assert (report.state, report.outcomes) == (RunState.DONE, {"unpinned": 1, "absent": 1})
    assert world.last(UnpinChunks()).outcomes == {"unpinned": 1}
    assert set(world.chunks.values()) == {SlotState.READY}


def test_pins_expire_by_themselves_and_pinning_again_starts_anew() -> None:
    world = World(held=2)
    world.last(PinChunks(keys=KEYS[:2], seconds=10.0))
    world.now_s += 8.0
    world.last(PinChunks(keys=KEYS[:1], seconds=10.0))
    world.operations.expire_pins(world.now_s + 5.0)
    assert world.operations.pinned_chunks == 1
    assert world.holds[KEYS[0]] == 1, "held once, however often it is pinned"
    world.operations.expire_pins(world.now_s + 10.0)
    assert world.operations.pinned_chunks == 0


def test_pins_hold_no_more_than_their_share() -> None:
    world = World(slots=10, held=9, pin_max_share=0.3)
    report = world.last(PinChunks(keys=KEYS[:9], seconds=60.0))
    assert (report.state, report.outcomes) == (RunState.PARTLY, {"pinned": 3, "over_limit": 6})
    assert world.last(PinChunks(keys=KEYS[:3], seconds=60.0)).state is RunState.DONE, "those that are pinned already"


def test_a_reset_pool_has_no_pins() -> None:
    """The pool forgets all references with its chunks: none may be given back afterwards."""
    world = World(held=2)
    world.last(PinChunks(keys=KEYS[:2], seconds=10.0))
    world.chunks.clear()
    world.operations.forget()
    world.operations.expire_pins(world.now_s + 60.0)
    assert world.last(UnpinChunks()).chunks_total == 0


def test_warm_fetches_what_is_missing_a_window_at_a_time() -> None:
    world = World(slots=32, held=2)
    world.submit(WarmChunks(keys=KEYS[:20]))
    fetched = 0
    while world.operations.has_work():
        world.step(1.0)
        came = world.arrive()
        assert came <= 32 // 8
        fetched += came
    assert fetched == 18
    assert set(KEYS[:20]) == set(world.chunks)
    assert not world.warms


def test_warm_says_what_became_of_each_chunk() -> None:
    world = World(held=1)
    world.published -= {KEYS[1]}
    world.reasons[KEYS[2]] = MissReason.PEER_LOST
    world.submit(WarmChunks(keys=KEYS[:4]))
    world.step()
    world.arrive()
    [(_, report)] = world.step(1.0)
    assert report.state is RunState.PARTLY
    assert report.outcomes == {"present": 1, "not_published": 1, "peer_lost": 1, "fetched": 1}


def test_warm_does_not_push_out_what_it_has_fetched() -> None:
    """More than the pool holds is refused, and so is what pins leave no room for."""
    world = World(slots=10, held=4, pin_max_share=0.4)
    world.last(PinChunks(keys=KEYS[:4], seconds=60.0))
    world.submit(WarmChunks(keys=KEYS[4:14]))
    outcomes: dict[str, int] = {}
    while world.operations.has_work():
        for _, report in world.step(1.0):
            outcomes = report.outcomes
            world.arrive()
    assert outcomes == {"fetched": 6, "over_capacity": 4}


def test_warm_ends_at_its_time() -> None:
    world = World()
    world.submit(WarmChunks(keys=KEYS[:3]), timeout_s=5.0)
    world.step()
    [(_, report)] = world.step(6.0)
    assert (report.state, report.outcomes) == (RunState.FAILED, {"not_in_time": 3})
    assert not world.warms


def test_a_command_that_comes_too_late_is_not_begun() -> None:
    """An engine that was busy for long does not do what nobody waits for any more."""
    world = World(held=3)
    world.submit(ClearChunks(), timeout_s=5.0)
    [(_, report)] = world.step(6.0)
    assert report.state is RunState.FAILED
    assert "took no step" in report.text
    assert len(world.chunks) == 3


def test_hottest() -> None:
    world = World(held=3)
    assert world.last(ListHot(limit=2)).keys == [KEYS[2], KEYS[1]]


def test_every_report_says_how_much_is_pinned() -> None:
    """Pages show what the last report said: one that has nothing to do with pins must not say that there are none."""
    world = World(held=3)
    world.last(PinChunks(keys=KEYS[:2], seconds=60.0))
    assert world.last(ListHot(limit=2)).pinned_chunks == 2
    world.submit(ClearChunks(), timeout_s=-1.0)
    [(_, report)] = world.step()
    assert (report.state, report.pinned_chunks) == (RunState.FAILED, 2)


def test_commands_do_not_pile_up() -> None:
    world = World()
    for _ in range(MAX_WAITING):
        world.submit(ClearChunks())
    assert not world.operations.submit(OTHER, ClearChunks(), world.now_s + 1.0)


def test_reports_of_progress_are_rationed() -> None:
    world = World()
    world.submit(WarmChunks(keys=KEYS[:3]))
    assert len(world.step()) == 1
    assert world.step(0.01) == []
    assert len(world.step(1.0)) == 1


def test_one_step_takes_a_moment_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large clear goes on in the next steps: an engine with requests is not held up."""
    monkeypatch.setattr(pool_operations, "_BUDGET_CHUNKS", 4)
    world = World(held=40, slots=64)
    released: list[int] = []

    def release(keys: list[bytes]) -> None:
        released.append(len(keys))
        world.now_s += 0.003
        for key in keys:
            del world.chunks[key]

    monkeypatch.setattr(world, "release", release)
    world.submit(ClearChunks())
    world.step()
    assert released == [4, 4]
    while world.operations.has_work():
        world.step(1.0)
    assert not world.chunks


commands = st.one_of(
    st.builds(ClearChunks, keys=st.none() | st.lists(st.sampled_from(KEYS), max_size=8)),
    st.builds(PinChunks, keys=st.lists(st.sampled_from(KEYS), max_size=8), seconds=st.floats(0, 20)),
    st.builds(UnpinChunks, keys=st.none() | st.lists(st.sampled_from(KEYS), max_size=8)),
    st.builds(WarmChunks, keys=st.lists(st.sampled_from(KEYS), max_size=12)),
)


@given(data=st.data())
@settings(max_examples=60, derandomize=True, database=None, deadline=None)
def test_whatever_comes_in_whatever_order(data: st.DataObject) -> None:
    """Each command ends exactly once, references match pins, and pins never hold more than their share."""
    world = World(slots=16, held=10)
    ended: Counter[str] = Counter()
    submitted = 0
    for _ in range(data.draw(st.integers(1, 25))):
        match data.draw(st.sampled_from(["submit", "step", "arrive", "reset"])):
            case "submit":
                submitted += 1
                world.submit(data.draw(commands), f"{submitted:016x}", timeout_s=data.draw(st.floats(0.1, 20)))
            case "arrive":
                world.arrive()
            case "reset":
                world.chunks.clear()
                world.holds.clear()
                world.operations.forget()
            case "step":
                for operation_id, report in world.step(data.draw(st.floats(0, 5))):
                    ended.update([operation_id] if report.state.is_final else [])
                    assert report.chunks_done <= sum(report.outcomes.values()) <= report.chunks_total
        assert world.operations.pinned_chunks == sum(world.holds.values()) <= 8
    ended.update(operation_id for operation_id, report in world.step(60.0) if report.state.is_final)
    assert not world.operations.has_work()
    assert sorted(ended.values()) == [1] * submitted
