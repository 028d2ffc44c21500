"""Operations on vLLM's own pool: its manager is real and keeps its books, only the node is a fake."""

from __future__ import annotations

import pytest
from vllm.v1.kv_offload.base import LookupResult

from kvmesh.core.reasons import MissReason
from kvmesh.vllm import tier as tier_module
from kvmesh.wire import link
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
from support.vllm_fakes import FakeNode, offload_key
from support.vllm_tiering import SLOTS, Engine

A, B, C, D, E, F = (offload_key(number) for number in range(6))


class Operated(Engine):
    """An engine to which a node says what operators want."""

    def __init__(self, **keys: object) -> None:
        super().__init__(**keys)
        self.operations = 0

    def operate(self, command: AnyCommand) -> str:
        self.operations += 1
        operation_id = f"{self.operations:016x}"
        assert self.node.on_request is not None
        self.node.on_request(link.Operate(operation_id, command, 10.0))
        return operation_id

    def report(self, operation_id: str) -> Report:
        """Step until it has ended; fetches come at once."""
        for _ in range(20):
            self.step()
            for job_id in list(self.node.fetches):
                self.node.finish(job_id)
            for answer in self.node.answers:
                assert isinstance(answer, link.Operated)
                if answer.operation_id == operation_id and answer.report.state.is_final:
                    return answer.report
        raise AssertionError("it does not end")

    def do(self, command: AnyCommand) -> Report:
        assert not self.manager.has_pending_work()
        operation_id = self.operate(command)
        assert self.manager.has_pending_work(), "an engine that was woken must take a step"
        report = self.report(operation_id)
        self.step()
        assert not self.manager.has_pending_work(), "and may rest afterwards"
        self.check_books()
        return report

    def check_books(self) -> None:
        """What vLLM counts is what there is."""
        primary = self.manager.primary_tier
        chunks = [primary._policy.get(key) for key in primary._policy.all_keys()]
        assert primary._num_evictable_cache_chunks == sum(chunk.ref_cnt == 0 for chunk in chunks)
        assert primary._num_write_pending_chunks == sum(chunk.ref_cnt < 0 for chunk in chunks)
        assert primary._get_num_free_chunks() == SLOTS - len(chunks)
        slots = [chunk.chunk_id for chunk in chunks]
        assert len({*slots, *primary._free_list}) == len(slots) + len(primary._free_list)
        assert set(self.readable()) <= set(primary._policy.all_keys())
        assert not [name for name in self.manager._req_state if name.startswith("warm")]


@pytest.fixture(params=["LRU", "ARC"])
def engine(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest):
    monkeypatch.setattr(tier_module, "NodeHandle", FakeNode)
    made = Operated(cache_policy=request.param)
    yield made
    made.manager.shutdown()
    made.tier.ledger.close()


def test_clear_gives_slots_back_and_retracts(engine: Operated) -> None:
    slots = engine.compute(A, B, C)
    report = engine.do(ClearChunks(keys=[A, B]))
    assert (report.state, report.outcomes) == (RunState.DONE, {"cleared": 2})
    assert set(engine.readable()) == {C}
    assert sorted(engine.node.retracted) == sorted(slots[:2])
    assert engine.do(ClearChunks()).outcomes == {"cleared": 1}
    assert len(engine.compute(A, B, C, D)) == SLOTS, "all slots can be used again"
    engine.check_books()


def test_clear_leaves_what_a_request_is_reading_until_it_is_done(engine: Operated) -> None:
    engine.compute(A)
    context = engine.request(A)
    engine.look_up(context, A)
    engine.manager.prepare_load([A], context)
    operation_id = engine.operate(ClearChunks())
    engine.step()
    assert set(engine.readable()) == {A}
    engine.manager.complete_load([A], context)
    assert engine.report(operation_id).outcomes == {"cleared": 1}
    engine.check_books()


def test_clear_leaves_what_is_being_written_until_it_is_there(engine: Operated) -> None:
    """Neither a store that is under way nor a fetch may lose its slot."""
    context = engine.request(A)
    output = engine.manager.prepare_store((A,), context)
    operation_id = engine.operate(ClearChunks())
    engine.step()
    engine.manager.complete_store(output.keys_to_store, context)
    assert engine.report(operation_id).outcomes == {"cleared": 1}
    assert engine.readable() == {}


def test_pinned_chunks_survive_pressure_and_unpinned_ones_do_not(engine: Operated) -> None:
    engine.compute(A, B)
    assert engine.do(PinChunks(keys=[A, B], seconds=60.0)).outcomes == {"pinned": 2}
    for key in (C, D, E, F):
        engine.compute(key)
    assert {A, B} <= set(engine.readable())
    engine.check_books()
    engine.do(UnpinChunks())
    for number in range(10, 20):
        engine.compute(offload_key(number))
    assert not {A, B} & set(engine.readable())
    engine.check_books()


def test_a_pinned_chunk_can_be_used(engine: Operated) -> None:
    engine.compute(A)
    engine.do(PinChunks(keys=[A], seconds=60.0))
    context = engine.request(A)
    assert engine.look_up(context, A) == [LookupResult.HIT]
    engine.manager.prepare_load([A], context)
    engine.manager.complete_load([A], context)
    engine.manager.on_request_finished(context)
    engine.check_books()


def test_pins_do_not_fill_the_pool(engine: Operated) -> None:
    engine.compute(A, B, C, D)
    assert engine.do(PinChunks(keys=[A, B, C, D], seconds=60.0)).outcomes == {"pinned": 2, "over_limit": 2}
    engine.compute(E)
    assert E in engine.readable()


def test_pins_expire_before_something_has_to_be_evicted(engine: Operated) -> None:
    engine.compute(A, B)
    engine.do(PinChunks(keys=[A, B], seconds=0.0))
    for number in range(10, 18):
        engine.compute(offload_key(number))
    assert not {A, B} & set(engine.readable())
    engine.check_books()


def test_a_reset_forgets_pins_and_ends_warms(engine: Operated) -> None:
    engine.compute(A)
    engine.do(PinChunks(keys=[A], seconds=60.0))
    engine.node.visible = {B}
    operation_id = engine.operate(WarmChunks(keys=[B]))
    engine.step()
    engine.manager.reset_cache()
    report = engine.report(operation_id)
    assert report.state is RunState.FAILED
    assert engine.do(UnpinChunks()).chunks_total == 0
    assert len(engine.compute(A, B, C, D)) == SLOTS
    engine.check_books()


def test_warm_fetches_as_a_request_would_and_publishes(engine: Operated) -> None:
    engine.compute(A)
    engine.node.visible = {B, C}
    report = engine.do(WarmChunks(keys=[A, B, C, D]))
    assert report.outcomes == {"present": 1, "fetched": 2, "not_published": 1}
    assert set(engine.readable()) == {A, B, C}
    context = engine.request(A, B, C)
    assert engine.look_up(context, A, B, C) == [LookupResult.HIT] * 3
    assert "kvmesh_lookup_chunks" not in engine.manager.get_stats().data["data"], "no request has looked anything up"


def test_what_a_warm_could_not_fetch_has_its_reason(engine: Operated) -> None:
    engine.node.visible = {A, B}
    operation_id = engine.operate(WarmChunks(keys=[A]))
    engine.step()
    [job_id] = engine.node.fetches
    engine.node.finish(job_id, [MissReason.PEER_STALLED])
    assert engine.report(operation_id).outcomes == {"peer_stalled": 1}
    engine.check_books()


def test_a_warm_of_a_full_pool_that_is_in_use(engine: Operated) -> None:
    engine.compute(A, B, C, D)
    context = engine.request(A, B, C, D)
    engine.look_up(context, A, B, C, D)
    engine.manager.prepare_load([A, B, C, D], context)
    engine.node.visible = {E}
    assert engine.report(engine.operate(WarmChunks(keys=[E]))).outcomes == {"pool_full": 1}
    engine.manager.complete_load([A, B, C, D], context)
    engine.check_books()


def test_the_hottest_are_those_used_last(engine: Operated) -> None:
    engine.compute(A, B)
    engine.compute(C)
    assert engine.do(ListHot(limit=1)).keys == [C]
    context = engine.request(A, B)
    engine.look_up(context, A, B)
    engine.manager.prepare_load([A, B], context)
    engine.manager.complete_load([A, B], context)
    engine.manager.on_request_finished(context)
    assert engine.do(ListHot(limit=3)).keys == [A, B, C], "heads of prefixes before their tails"


def test_without_an_engine_core_nobody_can_make_keys(engine: Operated) -> None:
    assert engine.node.on_request is not None
    engine.node.on_request(link.MakeKeys(1, [1, 2, 3], None))
    [answer] = engine.node.answers
    assert isinstance(answer, link.KeysMade)
    assert "hashes no blocks" in answer.error
