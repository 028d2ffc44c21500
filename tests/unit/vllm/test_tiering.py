"""Our tier and policy inside vLLM's own tiering manager, called as its scheduler does; only the node is a fake."""

from __future__ import annotations

import pytest
from vllm.v1.kv_offload.base import LookupResult

from kvmesh.core.reasons import MissReason
from kvmesh.vllm import compat
from kvmesh.vllm import tier as tier_module
from support.vllm_fakes import FakeNode, offload_key
from support.vllm_tiering import SLOTS, Engine

A, B, C, D, E, F = (offload_key(number) for number in range(6))
HIT, PENDING, MISS = LookupResult.HIT, LookupResult.HIT_PENDING, LookupResult.MISS


@pytest.fixture
def engine(monkeypatch):
    monkeypatch.setattr(tier_module, "NodeHandle", FakeNode)
    engine = Engine()
    yield engine
    engine.manager.shutdown()
    engine.tier.ledger.close()


def test_the_pool_is_found_in_one_file(engine):
    """Whatever this version of vLLM does to make its pool, the node can map it."""
    assert [(each.offset_bytes, each.length_bytes) for each in engine.node.segments] == [(0, SLOTS * 4096)]


def test_computed_chunks_are_published(engine):
    slots = engine.compute(A, B)
    assert engine.readable() == dict(zip((A, B), slots, strict=True))
    assert engine.node.published == [(slots, False)]
    assert not engine.manager.has_pending_work()


def test_a_prompt_that_a_peer_holds_is_fetched_then_found_in_the_pool(engine):
    engine.node.visible = {A, B}
    context = engine.request(A, B, C)
    assert engine.look_up(context, A, B, C) == [PENDING, PENDING, MISS]
    assert engine.node.fetches == {0: [A, B]}
    assert engine.manager.has_pending_work()
    assert engine.look_up(context, A, B) == [PENDING, PENDING], "nothing is asked for twice"
    assert list(engine.node.fetches) == [0]
    engine.node.finish(0)
    assert engine.look_up(context, A, B, C) == [HIT, HIT, MISS]
    assert set(engine.readable()) == {A, B}
    assert not engine.manager.has_pending_work()


def test_hits_are_shown_as_coming_from_peers(engine):
    """Cached tokens are counted by source since vLLM 0.32."""
    if compat.HIT_SOURCE is None:
        pytest.skip("this version of vLLM does not count by source")
    engine.node.visible = {A}
    context = engine.request(A)
    engine.look_up(context, A)
    engine.node.finish(0)
    engine.look_up(context, A)
    assert engine.manager.get_load_source(A, context) is compat.HIT_SOURCE


def test_of_a_partial_fetch_the_prefix_is_used(engine):
    engine.node.visible = {A, B}
    context = engine.request(A, B)
    engine.look_up(context, A, B)
    engine.node.finish(0, [None, MissReason.STALE])
    assert engine.look_up(context, A, B) == [HIT, MISS]
    assert set(engine.readable()) == {A}
    engine.compute(B)
    assert set(engine.readable()) == {A, B}


def test_a_full_pool_evicts_and_retracts_before_a_slot_is_reused(engine):
    first = engine.compute(A, B, C, D)
    (slot,) = engine.compute(E)
    assert slot in first
    assert engine.node.retracted == [slot]
    assert engine.readable()[E] == slot
    assert len(engine.readable()) == SLOTS


def test_a_fetch_too_may_evict(engine):
    """The slot is unreadable from the moment vLLM gives it to the fetch, long before the bytes come."""
    engine.compute(A, B, C, D)
    engine.node.visible = {F}
    context = engine.request(F)
    assert engine.look_up(context, F) == [PENDING]
    ((job_id, (slot,)),) = engine.node.fetch_slots.items()
    assert engine.tier.ledger.read(slot) is None
    engine.node.finish(job_id, [MissReason.DEADLINE])
    assert engine.look_up(context, F) == [MISS]
    assert len(engine.readable()) == SLOTS - 1


def test_a_store_that_failed_publishes_nothing(engine):
    context = engine.request(A)
    output = engine.manager.prepare_store((A,), context)
    engine.manager.complete_store(output.keys_to_store, context, success=False)
    assert engine.readable() == {}


def test_a_reset_ends_fetches_and_retracts_everything(engine):
    """On sleep and on new weights: nothing old may be readable, and nothing may be written any more."""
    engine.compute(A, B)
    engine.node.visible = {C}
    engine.look_up(engine.request(C), C)
    engine.manager.reset_cache()
    assert engine.readable() == {}
    assert sorted(engine.node.retracted) == [0, 1]
    assert not engine.node.has_jobs()
    assert not engine.manager.has_pending_work()
    assert len(engine.compute(D)) == 1


def test_statistics_of_all_tiers_travel_together(engine):
    engine.node.visible = {A}
    engine.look_up(engine.request(A), A)
    found = engine.manager.get_stats().data["data"]
    assert found["kvmesh_lookup_chunks"] == {("hit", ""): 1}
    assert found["kvmesh_visible_chunks"] == {(): 1}
