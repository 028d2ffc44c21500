"""The tier alone: what it answers vLLM, what it tells the node, what it remembers."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from vllm.v1.kv_offload.base import LookupResult, ReqContext, ScheduleEndContext
from vllm.v1.kv_offload.tiering.base import TransferJob

from kvmesh.config import KVMeshConfig
from kvmesh.core.gate import Rate, Source, Verdict
from kvmesh.core.reasons import MissReason
from kvmesh.node.state import NodeState
from kvmesh.vllm import prefill_watch, tier_metrics
from kvmesh.vllm import tier as tier_module
from kvmesh.vllm.operated_pool import WarmState
from kvmesh.vllm.request_records import RequestState
from kvmesh.vllm.tier import PeerTier
from kvmesh.wire import link
from support.vllm_fakes import FACTS, FakeNode, configured_extra, make_offloading_config, offload_key, shared_pool

SLOTS, CHUNK_BYTES = 8, 4096
A, B, C, D = (offload_key(number) for number in range(4))
HIT, MISS = LookupResult.HIT, LookupResult.MISS


class Clock:
    now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(tier_module, "time", clock)
    return clock


@pytest.fixture
def make_tier(monkeypatch, clock):
    monkeypatch.setattr(tier_module, "NodeHandle", FakeNode)
    with shared_pool(SLOTS, CHUNK_BYTES) as view:
        made = []

        def make(**keys: object) -> PeerTier:
            extra = configured_extra(**keys)
            spec = SimpleNamespace(extra_config=extra, config=make_offloading_config(extra=extra))
            made.append(PeerTier(offloading_spec=spec, primary_kv_view=view, tier_type="PeerTier"))
            return made[-1]

        yield make
        for tier in made:
            tier.ledger.close()
            tier._primary_kv_view = None


@pytest.fixture
def tier(make_tier):
    return make_tier()


def job(job_id: int, keys, slots, context=None, *, promotion: bool = True) -> TransferJob:
    return TransferJob(
        job_id=job_id,
        keys=list(keys),
        chunk_ids=np.array(slots, dtype=np.int32),
        is_promotion=promotion,
        req_context=context or ReqContext("r1"),
    )


def counted(tier: PeerTier) -> dict[str, dict[tuple[str, ...], float]]:
    """The metrics that came together since the last call."""
    stats = tier.get_stats()
    return {} if stats is None else stats.data["data"]


def lookups(tier: PeerTier) -> dict[tuple[str, ...], float]:
    return counted(tier).get("kvmesh_lookup_chunks", {})


class TestStart:
    def test_the_node_gets_pool_format_and_configuration(self, make_tier):
        tier = make_tier(instance_id="a", fetch_timeout_s=3)
        node = tier.node
        assert node.started
        assert KVMeshConfig.from_wire(node.config_wire).instance_id == "a"
        assert (node.kv_format.chunk_bytes, node.kv_format.chunk_tokens) == (CHUNK_BYTES, 64)
        assert node.kv_format.model_name == FACTS["model_name"]
        assert [(each.offset_bytes, each.length_bytes) for each in node.segments] == [(0, SLOTS * CHUNK_BYTES)]
        assert node.ledger.slots == SLOTS

    def test_options_of_the_tier_itself_are_refused(self):
        """All options are in our configuration; one in the tier's entry would be silently lost."""
        with shared_pool(1, CHUNK_BYTES) as view, pytest.raises(TypeError, match="speed"):
            PeerTier(SimpleNamespace(), view, "PeerTier", None, speed=1)


class TestLookup:
    def test_what_a_peer_holds_is_a_hit(self, tier):
        tier.node.visible = {A}
        context = ReqContext("r1")
        assert [tier.lookup(key, context) for key in (A, B)] == [HIT, MISS]
        assert lookups(tier) == {("hit", ""): 1, ("miss", "not_published"): 1}

    def test_asking_again_is_counted_once_per_request(self, tier):
        """A waiting request asks at every step."""
        first, second = ReqContext("r1"), ReqContext("r2")
        for context in (first, first, second):
            tier.lookup(A, context)
        assert lookups(tier) == {("miss", "not_published"): 2}

    @pytest.mark.parametrize(
        ("state", "reason"),
        [
            (NodeState(False, False, False, 0), "node_down"),
            (NodeState(True, False, False, 0), "no_directory"),
            (NodeState(True, True, True, 0), "no_peers"),
            (NodeState(True, True, True, 2), "not_published"),
            (NodeState(True, False, True, 2), "no_directory"),
        ],
    )
    def test_every_miss_has_a_reason(self, tier, state, reason):
        tier.node.state = state
        assert tier.lookup(A, ReqContext("r1")) is MISS
        assert lookups(tier) == {("miss", reason): 1}


class TestMinimum:
    @pytest.fixture
    def tier(self, make_tier):
        return make_tier(min_retrieve_tokens=128)  # two chunks

    @staticmethod
    def request(*keys) -> ReqContext:
        context = ReqContext("r1")
        for position, key in enumerate(keys):
            context.set_offload_key_position(key, (position + 1) * 64)
        return context

    def test_too_short_a_run_is_not_fetched(self, tier):
        tier.node.visible = {A, C}
        assert tier.lookup(A, self.request(A, B, C)) is MISS
        assert lookups(tier) == {("miss", "below_minimum"): 1}

    def test_an_instance_that_only_publishes(self, make_tier):
        """`retrieve_locations` without the peers: nothing is fetched, and the reason says so."""
        tier = make_tier(retrieve_locations=["LocalCPUBackend"])
        tier.node.visible = {A}
        assert tier.lookup(A, ReqContext("r1")) is MISS
        assert lookups(tier) == {("miss", MissReason.SHARING_OFF.value): 1}

    def test_a_long_enough_run_is_fetched_to_its_end(self, tier):
        tier.node.visible = {A, B, C}
        context = self.request(A, B, C, D)
        assert [tier.lookup(key, context) for key in (A, B, C, D)] == [HIT, HIT, HIT, MISS]

    def test_the_run_counts_from_the_first_chunk_that_is_asked_for(self, tier):
        """What stands before it is in this engine's own pool already."""
        tier.node.visible = {A, B, C}
        assert tier.lookup(C, self.request(A, B, C)) is MISS

    def test_a_key_without_a_position_is_no_run(self, tier):
        tier.node.visible = {A, B}
        assert tier.lookup(A, self.request()) is MISS


class TestStore:
    def test_what_the_engine_computed_is_published_at_once(self, tier):
        tier.submit_store(job(5, [A, B], [2, 4], promotion=False))
        assert tier.ledger.read(2).key == A
        assert tier.ledger.read(4).key == B
        assert tier.node.published == [([2, 4], False)]
        (result,) = tier.get_finished_jobs()
        assert (result.job_id, result.success) == (5, True)
        assert list(tier.get_finished_jobs()) == []

    def test_a_store_keeps_no_engine_awake(self, tier):
        """`has_pending_work` makes the engine step; only a fetch is worth that."""
        tier.submit_store(job(5, [A], [2], promotion=False))
        assert not tier.has_pending_work()


class TestGate:
    """A prompt of four chunks of 64 tokens, all held by a peer."""

    KEYS = (A, B, C, D)

    def context(self, name="r1", count=4) -> ReqContext:
        context = ReqContext(name)
        for index, key in enumerate(self.KEYS[:count]):
            context.set_offload_key_position(key, 64 * (index + 1))
        return context

    def compute(self, tier, clock, seconds=1.0, queue_s=0.0, name="cold", keys=(10, 11, 12, 13)):
        """A prompt that nobody has is computed."""
        keys = [offload_key(number) for number in keys]
        context = ReqContext(name)
        for index, key in enumerate(keys):
            context.set_offload_key_position(key, 64 * (index + 1))
        for key in keys:
            tier.lookup(key, context)
        clock.now_s += queue_s
        tier.on_schedule_end(ScheduleEndContext(new_req_ids=[name], preempted_req_ids=[]))
        clock.now_s += seconds
        tier.submit_store(job(99, keys, [0, 1, 2, 3], context, promotion=False))

    def test_prefill_is_measured_from_being_scheduled_to_being_stored(self, tier, clock):
        self.compute(tier, clock, seconds=2.0, queue_s=10.0)
        assert tier._prefill.tokens_per_s == pytest.approx(128)
        assert tier._prefill.queue_s == pytest.approx(1.5)

    def test_what_the_peers_deliver_later_than_it_is_computed_is_a_miss_with_that_reason(self, tier, clock):
        tier.node.visible = set(self.KEYS)
        tier.node.peer = Source("peer", 0, Rate(0.0, 1.0 / CHUNK_BYTES))  # a second for each chunk
        self.compute(tier, clock, seconds=1.0)
        lookups(tier)
        context = self.context()
        assert [tier.lookup(key, context) for key in self.KEYS] == [MISS] * 4
        assert counted(tier)["kvmesh_lookup_chunks"] == {("miss", "gate_refused"): 4}
        state = context.get_state(RequestState)
        decision = state.gate
        assert (decision.verdict, decision.chunks, decision.asked) == (Verdict.SLOWER, 0, 4)
        assert decision.fetch_s == pytest.approx(4.0)
        assert decision.prefill_s == pytest.approx(1.0)
        assert state.details == {
            MissReason.GATE_REFUSED: {"fetch_s": decision.fetch_s, "prefill_s": decision.prefill_s}
        }

    def test_what_they_deliver_sooner_is_fetched_and_the_node_is_told_what_it_saves(self, tier, clock):
        tier.node.visible = set(self.KEYS)
        tier.node.peer = Source("peer", 0, Rate(0.0, 0.1 / CHUNK_BYTES))
        self.compute(tier, clock, seconds=1.0)
        context = self.context()
        assert [tier.lookup(key, context) for key in self.KEYS] == [HIT] * 4
        assert counted(tier)["kvmesh_gate_decisions"] == {("pays",): 1}
        tier.submit_load(job(1, self.KEYS, [0, 1, 2, 3], context))
        assert tier.node.saved[-1].predict(4) == pytest.approx(1.0)

    def test_before_anything_was_measured_everything_is_fetched(self, tier, clock):
        tier.node.visible = set(self.KEYS)
        assert tier.lookup(A, self.context("r1")) is HIT
        tier.node.peer = Source("peer", 0, Rate(0.0, 1.0))
        assert tier.lookup(A, self.context("r2")) is HIT
        self.compute(tier, clock)
        tier.node.peer = Source("", 0, None)
        assert tier.lookup(A, self.context("r3")) is HIT
        assert tier.lookup(A, ReqContext("r4")) is HIT

    def test_the_pull_is_capped_at_what_arrives_in_time(self, make_tier, clock):
        tier = make_tier(fetch_timeout_s=2.5)
        tier.node.visible = set(self.KEYS)
        tier.node.peer = Source("peer", 0, Rate(0.0, 1.0 / CHUNK_BYTES))
        self.compute(tier, clock, seconds=20.0)
        context = self.context()
        assert [tier.lookup(key, context) for key in self.KEYS] == [HIT, HIT, MISS, MISS]

    def test_switched_off_it_asks_nobody(self, make_tier, clock):
        tier = make_tier(fetch_gate="off")
        tier.node.visible = set(self.KEYS)
        tier.node.peer = Source("peer", 0, Rate(0.0, 1.0))
        self.compute(tier, clock)
        context = self.context()
        assert tier.lookup(A, context) is HIT
        tier.submit_load(job(1, [A], [0], context))
        assert tier.node.saved == [None]

    def test_what_an_operator_wants_is_not_weighed(self, tier, clock):
        """Warming a pool is no request that could be quicker; the node is not to refuse it either."""
        self.compute(tier, clock)
        tier.node.visible = set(self.KEYS)
        tier.node.peer = Source("peer", 0, Rate(0.0, 1.0))
        context = self.context()
        context.set_state(WarmState())
        assert [tier.lookup(key, context) for key in self.KEYS] == [HIT] * len(self.KEYS)
        tier.submit_load(job(1, self.KEYS, range(len(self.KEYS)), context))
        assert tier.node.saved == [None]

    def test_answers_and_preempted_requests_are_not_measured(self, tier, clock):
        context = self.context(count=1)
        tier.lookup(A, context)
        context.set_offload_key_position(B, 128)
        tier.submit_store(job(1, [B], [0], context, promotion=False))
        assert tier._prefill.tokens_per_s is None
        tier.lookup(C, self.context("r2"))
        tier.on_schedule_end(ScheduleEndContext(new_req_ids=[], preempted_req_ids=["r2"]))
        assert not tier._watch._requests

    def test_what_is_watched_is_bounded(self, tier, monkeypatch):
        monkeypatch.setattr(prefill_watch, "MAX_WATCHED", 3)
        for number in range(9):
            tier.lookup(A, self.context(f"r{number}"))
        assert len(tier._watch._requests) == 3


class TestFetch:
    def test_slots_are_unreadable_while_they_are_written(self, tier):
        tier.ledger.publish(3, D)
        tier.submit_load(job(1, [A], [3]))
        assert tier.ledger.read(3) is None
        assert tier.node.fetches == {1: [A]}
        assert tier.node.fetch_slots == {1: [3]}
        assert tier.node.timeouts_s == [10.0]
        assert tier.has_pending_work()
        assert list(tier.get_finished_jobs()) == []

    def test_what_has_come_is_published_in_turn(self, tier):
        """So hot prefixes spread by use."""
        tier.submit_load(job(1, [A, B], [3, 4]))
        tier.node.finish(1)
        (result,) = tier.get_finished_jobs()
        assert (result.job_id, result.success, list(result.successful_keys)) == (1, True, [A, B])
        assert (result.transfer_bytes, result.transfer_time) == (2 * CHUNK_BYTES, 0.5)
        assert [tier.ledger.read(slot).key for slot in (3, 4)] == [A, B]
        assert tier.node.published == [([3, 4], True)]
        assert not tier.has_pending_work()

    def test_of_a_partial_fetch_the_good_chunks_are_kept(self, tier):
        context = ReqContext("r1")
        tier.submit_load(job(1, [A, B, C], [3, 4, 5], context))
        tier.node.finish(1, [None, MissReason.EVICTED, MissReason.TRUNCATED])
        (result,) = tier.get_finished_jobs()
        assert (result.success, list(result.successful_keys)) == (False, [A])
        assert [tier.ledger.read(slot) is not None for slot in (3, 4, 5)] == [True, False, False]
        assert tier.node.published == [([3], True)]

    def test_of_a_failed_fetch_nothing_is_kept(self, tier):
        tier.submit_load(job(1, [A, B], [3, 4]))
        tier.node.finish(1, [MissReason.PEER_LOST] * 2)
        (result,) = tier.get_finished_jobs()
        assert (result.success, list(result.successful_keys)) == (False, [])
        assert tier.node.published == []
        assert tier.ledger.statistics().published == 0

    def test_a_job_that_nobody_asked_for_is_ignored(self, tier):
        tier.submit_load(job(1, [A], [3]))
        tier.node.finish(1)
        tier.node.finished.append(tier.node.finished[0]._replace(job_id=99))
        assert [result.job_id for result in tier.get_finished_jobs()] == [1]

    def test_a_drain_ends_every_job(self, tier):
        """The pool is about to be thrown away: every job must be reported, and nothing may write any more."""
        tier.submit_store(job(1, [A], [0], promotion=False))
        tier.submit_load(job(2, [B], [3]))
        tier.drain_jobs()
        assert sorted((result.job_id, result.success) for result in tier.get_finished_jobs()) == [(1, True), (2, False)]
        assert not tier.has_pending_work()

    def test_after_a_reset_nothing_is_fetched_before_a_store(self, tier):
        """Workers may still copy into freed slots when vLLM resets its pool; a completed store says they do not."""
        tier.node.visible.update({A, B})
        tier.drain_jobs()
        assert tier.lookup(A, ReqContext("r1")) is MISS
        assert lookups(tier) == {("miss", MissReason.DRAINING.value): 1}
        tier.submit_store(job(1, [C], [0], promotion=False))
        assert tier.lookup(A, ReqContext("r2")) is HIT

    def test_fetches_are_counted(self, tier):
        counted(tier)
        tier.submit_load(job(1, [A, B, C], [3, 4, 5]))
        tier.node.finish(1, [None, MissReason.STALE, MissReason.STALE])
        list(tier.get_finished_jobs())
        found = counted(tier)
        assert found["kvmesh_fetched_chunks"] == {(): 1}
        assert found["kvmesh_fetched_bytes"] == {(): CHUNK_BYTES}
        assert found["kvmesh_fetch_seconds"] == {(): [0.5]}
        assert found["kvmesh_fetch_missed_chunks"] == {("stale",): 2}


class TestNegativeCache:
    @pytest.fixture
    def request_that_failed(self) -> ReqContext:
        return ReqContext("r1")

    @pytest.fixture
    def tier(self, make_tier, request_that_failed):
        tier = make_tier(negative_cache_s=2)
        tier.node.visible = {A, B}
        tier.submit_load(job(1, [A], [3], request_that_failed))
        tier.node.finish(1, [MissReason.PEER_LOST])
        list(tier.get_finished_jobs())
        counted(tier)
        return tier

    def test_a_chunk_that_failed_is_left_alone_for_a_while(self, tier, clock):
        """For every request, so that a dead peer costs one fetch and not one per request."""
        assert [tier.lookup(key, ReqContext("r2")) for key in (A, B)] == [MISS, HIT]
        assert lookups(tier) == {("hit", ""): 1, ("miss", "recently_failed"): 1}
        clock.now_s += 1.9
        assert tier.lookup(A, ReqContext("r3")) is MISS
        clock.now_s += 0.2
        assert tier.lookup(A, ReqContext("r4")) is HIT

    def test_the_request_that_met_the_failure_never_tries_again(self, tier, clock, request_that_failed):
        """Otherwise it could go round in circles while a peer keeps announcing what it cannot deliver."""
        clock.now_s += 3600
        assert tier.lookup(A, request_that_failed) is MISS

    def test_the_memory_is_bounded(self, tier, monkeypatch):
        monkeypatch.setattr(tier_module, "MAX_FAILED_KEYS", 3)
        keys = [offload_key(number) for number in range(10, 16)]
        tier.submit_load(job(2, keys, range(6)))
        tier.node.finish(2, [MissReason.DEADLINE] * 6)
        list(tier.get_finished_jobs())
        assert list(tier._failed_until_s) == keys[-3:]


class TestMetrics:
    def test_nothing_is_reported_when_nothing_changed(self, tier):
        """This is asked after every step."""
        assert counted(tier)["kvmesh_node_up"] == {(): 1}
        assert tier.get_stats() is None
        tier.node.visible = {A}
        assert counted(tier)["kvmesh_visible_chunks"] == {(): 1}
        assert tier.get_stats() is None

    def test_a_step_without_news_reads_nothing_but_the_counts_of_changes(self, tier, monkeypatch):
        """What is read after every step is paid for after every step, with cold caches."""
        tier.lookup(A, ReqContext("r1"))
        assert tier.get_stats() is not None
        monkeypatch.setattr(tier_metrics, "OffloadingConnectorStats", None)
        monkeypatch.setattr(tier.node, "visible_count", None)
        assert tier.get_stats() is None

    def test_only_the_gauges_that_have_changed_are_told(self, tier):
        counted(tier)
        tier.node.visible = {A}
        assert counted(tier) == {"kvmesh_visible_chunks": {(): 1}}
        tier._prefill.queued(0.5)
        assert set(counted(tier)) == {"kvmesh_queue_delay_seconds"}

    def test_what_has_changed_and_is_the_same_again_is_no_news(self, tier):
        counted(tier)
        tier._prefill.queued(0.0)
        assert tier.get_stats() is None

    def test_a_node_that_is_down_is_shown(self, tier):
        counted(tier)
        tier.node.state = NodeState(False, False, False, 0)
        tier.node.restarts = 1
        found = counted(tier)
        assert (found["kvmesh_node_up"], found["kvmesh_node_restarts"]) == ({(): 0}, {(): 1})

    def test_every_name_is_defined_for_vllm(self, tier):
        tier.node.visible = {A}
        tier.lookup(A, ReqContext("r1"))
        tier.submit_load(job(1, [A, B], [0, 1]))
        tier.node.finish(1, [None, MissReason.STALE])
        list(tier.get_finished_jobs())
        assert set(counted(tier)) == set(PeerTier.build_metric_definitions({}))


class TestRecords:
    """What the node is told of a request, once vLLM knows what it loads."""

    @staticmethod
    def request(tokens=3 * 64 + 5, **changed):
        fields = {
            "request_id": "r1",
            "num_prompt_tokens": tokens,
            "prompt_token_ids": list(range(tokens)),
            "cache_salt": None,
            "lora_request": None,
            "mm_features": [],
        }
        return SimpleNamespace(**(fields | changed))

    @pytest.fixture
    def context(self, tier):
        context = ReqContext("r1")
        tier.on_new_request(context)
        for position, key in enumerate((A, B, C)):
            context.set_offload_key_position(key, (position + 1) * 64)
        tier.meet(self.request())
        return context

    def told(self, tier, device=0, loaded=0, **changed):
        tier.tell(self.request(**changed), device, loaded)
        (record,) = tier.node.records
        return record

    def test_a_miss_with_its_reason(self, tier, context, clock):
        tier.lookup(A, context)
        clock.now_s += 0.25
        record = self.told(tier)
        assert (record.request_id, record.prompt_tokens, record.keys) == ("r1", 197, [A, B, C])
        assert [(miss.key, miss.reason) for miss in record.misses] == [(A, MissReason.NOT_PUBLISHED)]
        assert (record.wait_s, record.separated_by, len(record.tokens_hash)) == (0.25, [], 16)

    def test_it_is_told_once(self, tier, context):
        """A request that is preempted finds its own chunks later."""
        self.told(tier)
        tier.tell(self.request(), 0, 192)
        tier.on_request_finished(context)
        assert len(tier.node.records) == 1

    def test_a_hit_that_was_never_fetched_found_the_pool_full(self, tier, context):
        """The tier says HIT, vLLM has no slot and goes on as if it were a miss."""
        tier.node.visible = {A}
        assert tier.lookup(A, context) is HIT
        assert [miss.reason for miss in self.told(tier).misses] == [MissReason.POOL_FULL]

    def test_a_chunk_that_failed_a_moment_ago_says_with_what(self, tier, context):
        tier.node.visible = {A}
        tier.submit_load(job(1, [A], [3], ReqContext("r2")))
        tier.node.finish(1, [MissReason.PEER_LOST])
        list(tier.get_finished_jobs())
        tier.lookup(A, context)
        (miss,) = self.told(tier).misses
        assert (miss.reason, miss.detail) == (MissReason.RECENTLY_FAILED, {"failed_with": "peer_lost"})

    def test_too_short_a_run_says_how_short(self, make_tier):
        tier = make_tier(min_retrieve_tokens=128)
        tier.node.visible = {A}
        context = ReqContext("r1")
        tier.on_new_request(context)
        context.set_offload_key_position(A, 64)
        tier.meet(self.request())
        tier.lookup(A, context)
        (miss,) = self.told(tier).misses
        assert miss.detail == {"held_tokens": 64.0, "min_retrieve_tokens": 128.0}

    def test_what_was_found_is_no_miss(self, tier, context):
        record = self.told(tier, device=64, loaded=128)
        assert (record.device_tokens, record.loaded_tokens, record.misses) == (64, 128, [])

    def test_chunks_that_vllm_never_asked_for(self, tier, context):
        assert self.told(tier).misses == []

    def test_a_prompt_below_one_chunk_is_told_of_too(self, tier):
        """It never reaches a lookup."""
        tier.on_new_request(ReqContext("r1"))
        short = self.request(tokens=20)
        tier.meet(short)
        tier.tell(short, 0, 0)
        (record,) = tier.node.records
        assert (record.prompt_tokens, record.keys, record.tokens_hash) == (20, [], b"")

    def test_what_enters_the_keys_beside_the_tokens(self, tier):
        context = ReqContext("r1")
        tier.on_new_request(context)
        lora = SimpleNamespace(lora_name="french")
        tier.meet(self.request(cache_salt="secret", lora_request=lora, mm_features=[object()]))
        record = self.told(tier)
        assert record.separated_by == ["cache_salt", "lora:french", "multimodal"]
        assert b"secret" not in link.encode(record)

    def test_equal_texts_have_equal_names_whatever_their_salt(self, tier):
        hashes = set()
        for salt in (None, "a"):
            tier.on_new_request(ReqContext("r1"))
            tier.meet(self.request(cache_salt=salt))
            hashes.add(self.told(tier, cache_salt=salt).tokens_hash)
            tier.node.records.clear()
            tier.on_request_finished(ReqContext("r1"))
        assert len(hashes) == 1

    def test_a_request_that_ends_early(self, tier, context):
        tier.on_request_finished(context)
        (record,) = tier.node.records
        assert (record.ended_early, record.prompt_tokens) == (True, 197)

    def test_nothing_stays_behind(self, tier, context):
        self.told(tier)
        tier.on_request_finished(context)
        assert tier._requests == {}

    def test_an_unknown_request_is_ignored(self, tier):
        tier.meet(self.request())
        tier.tell(self.request(), 0, 0)
        assert tier.node.records == []


def test_shutdown_ends_the_node(tier):
    tier.shutdown()
    assert tier.node.closed


class TestAsking:
    """`index_mode: query`: a request waits one moment for the directory's answer."""

    def test_one_question_for_all_chunks_and_one_step_of_waiting(self, tier, monkeypatch):
        node = tier.node
        node.state = NodeState(True, True, True, 1, asks=True)
        context = ReqContext("r1")
        for position, key in enumerate((A, B, C)):
            context.set_offload_key_position(key, position)
        assert [tier.lookup(key, context) for key in (A, B, C)] == [LookupResult.RETRY] * 3
        assert node.asked == [[A, B, C]]
        node.visible, node.missing = {A}, {B}
        assert tier.lookup(A, context) is LookupResult.HIT
        assert tier.lookup(B, context) is LookupResult.MISS
        assert tier.lookup(C, context) is LookupResult.RETRY
        monkeypatch.setattr(tier_module, "ASK_WAIT_S", 0.0)
        assert tier.lookup(C, context) is LookupResult.MISS
        assert tier.lookup(D, ReqContext("r2")) is LookupResult.MISS, "and nobody waits for a moment after that"
        assert node.asked.pop() == [D]
        assert len(node.asked) == 1, "nobody asks again at each step"
        assert lookups(tier) == {("hit", ""): 1, ("miss", "not_published"): 1, ("miss", "directory_slow"): 2}

    def test_nobody_waits_for_a_directory_that_is_gone(self, tier):
        tier.node.state = NodeState(True, False, True, 1, asks=True)
        assert tier.lookup(A, ReqContext("r1")) is LookupResult.MISS
        assert lookups(tier) == {("miss", "no_directory"): 1}
