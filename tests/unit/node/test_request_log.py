"""What a node says of a request, given what its engine tells and what the node knows around it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from kvmesh.config import KVMeshConfig
from kvmesh.core.gate import GateDecision, Verdict
from kvmesh.core.plan import FetchItem
from kvmesh.core.reasons import MissReason
from kvmesh.core.replica import Replica
from kvmesh.core.sketch import EVERYTHING, key_hash, unpack_hashes
from kvmesh.node import request_log
from kvmesh.node.explainer import Neighbourhood
from kvmesh.node.fetcher import JobResult
from kvmesh.node.memory import Memory
from kvmesh.node.peers import Peers
from kvmesh.node.request_log import RequestLog
from kvmesh.transfer.base import ChunkOutcome
from kvmesh.wire.link import Miss, RequestRecord
from unit.controller.makers import make_format, make_member

CHUNK = 256
NEW = b"y" * 32 + bytes(4)
KEYS = [f"chunk-{number}".encode().rjust(32, b"x") + bytes(4) for number in range(8)]


class Transport:
    name = "tcp"

    def warm_up(self, deadline: object) -> None: ...

    def close(self) -> None: ...


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def around():
    ours = make_format(chunk_tokens=CHUNK)
    with ThreadPoolExecutor(1) as background:
        replica = Replica()
        peers = Peers(ours, lambda member: Transport(), background)
        around = Neighbourhood(KVMeshConfig(instance_id="me"), replica, peers, Memory())
        around.member = make_member("me", format=ours)
        yield around


@pytest.fixture
def log(around, clock):
    return RequestLog(around, chunk_tokens=CHUNK, clock=clock)


@pytest.fixture
def join(around):
    """Makes another instance a peer that holds keys."""

    def add(instance_id: str, keys=()) -> None:
        member = make_member(instance_id, format=make_format(chunk_tokens=CHUNK))
        assert around.peers.add(member)
        around.replica.member_up(instance_id, member.incarnation)
        around.replica.apply_snapshot(instance_id, member.incarnation, 0, keys, True, True)

    return add


def told(log, *, keys=KEYS, found=0, on_device=0, misses=(), **fields):
    """What is said of a request of which `found` chunks were loaded and `on_device` were there."""
    record = RequestRecord(
        request_id=fields.pop("request_id", "r"),
        prompt_tokens=fields.pop("prompt_tokens", len(keys) * CHUNK + 10),
        keys=list(keys),
        device_tokens=on_device * CHUNK,
        loaded_tokens=found * CHUNK,
        misses=list(misses),
        **fields,
    )
    return log.take(record)


def fetched(log, outcomes, *, holder="peer", request_id="r"):
    """A fetch of the request has ended so; outcomes are reasons by key."""
    items = [
        ChunkOutcome(FetchItem(key, slot), reason, None if reason else b"c" * 16)
        for slot, (key, reason) in enumerate(outcomes.items())
    ]
    holders = [holder] if None in outcomes.values() else []
    log.fetched(
        request_id, "tcp", 4096, JobResult(items, holders, 0.1, {}, asked=dict.fromkeys(range(len(items)), holder))
    )


def shape(explanation):
    return [(span.first_chunk, span.chunks, span.where, span.reason) for span in explanation.spans]


class TestPlaces:
    def test_everything_was_found(self, log):
        fetched(log, dict.fromkeys(KEYS[4:]))
        one = told(log, on_device=2, found=6)
        assert shape(one) == [(0, 2, "device", None), (2, 2, "own_pool", None), (4, 4, "peer", None)]
        assert (one.chunks, one.tail_tokens, one.causes) == (8, 10, [])
        assert one.summary == "Of 8 chunks: 2 in the engine's own cache, 2 in the own pool, 4 fetched from peers."
        assert [part.holders for part in one.fetches] == [["peer"]]

    def test_a_fetch_counts_for_its_own_request_only(self, log):
        fetched(log, {KEYS[0]: None}, request_id="other")
        assert shape(told(log, keys=KEYS[:1], found=1)) == [(0, 1, "own_pool", None)]

    def test_a_prompt_below_one_chunk(self, log):
        one = told(log, keys=(), prompt_tokens=200)
        (cause,) = one.causes
        assert (cause.reason, one.chunks, one.tail_tokens) == (MissReason.BELOW_ONE_CHUNK, 0, 200)
        assert "200 tokens" in cause.text

    def test_chunks_that_nobody_asked_for(self, log):
        """As for a request for prompt log probabilities, which reads no cache."""
        assert told(log).causes[0].reason is MissReason.NOT_ASKED

    def test_a_prompt_without_keys(self, log):
        assert shape(told(log, keys=(), prompt_tokens=600)) == [(0, 2, "nowhere", MissReason.NOT_ASKED)]

    def test_many_changes_of_fate_end_in_one_span(self, log):
        keys = [f"{number}".encode().rjust(32, b"x") + bytes(4) for number in range(300)]
        fetched(log, dict.fromkeys(keys[::2]))
        one = told(log, keys=keys, found=300)
        assert len(one.spans) == 64
        assert sum(span.chunks for span in one.spans) == 300

    def test_an_absurd_length_is_cut(self, log):
        assert told(log, keys=(), prompt_tokens=2**52).chunks == 65_536


class TestReasons:
    def test_nobody_has_it(self, log, join):
        join("other")
        one = told(log, found=3, misses=[Miss(KEYS[3], MissReason.NOT_PUBLISHED)])
        assert shape(one) == [(0, 3, "own_pool", None), (3, 5, "nowhere", MissReason.NOT_PUBLISHED)]
        assert one.first_missed_key == KEYS[3].hex()

    def test_what_lies_behind_a_hole_is_of_no_use(self, log, join):
        join("other", KEYS[5:])
        one = told(log, found=3, misses=[Miss(KEYS[3], MissReason.NOT_PUBLISHED)])
        assert [(cause.reason, cause.chunks) for cause in one.causes] == [
            (MissReason.NOT_PUBLISHED, 2),
            (MissReason.TRUNCATED, 3),
        ]

    def test_evicted_by_its_last_holder(self, log, around, join):
        join("other")
        around.lost(KEYS[:8], "other", "evicted")
        one = told(log, misses=[Miss(KEYS[0], MissReason.NOT_PUBLISHED)])
        (cause,) = one.causes
        assert (cause.reason, cause.instance_id, cause.chunks) == (MissReason.EVICTED, "other", 8)
        assert "pool_size_gb" in cause.change
        assert ("slots", "1000", "1000") in [(pair.field, pair.ours, pair.theirs) for pair in cause.fields]

    def test_the_last_holder_is_gone(self, log, around, join):
        around.lost(KEYS, "other", "timeout")
        one = told(log, misses=[Miss(KEYS[0], MissReason.NOT_PUBLISHED)])
        assert (one.causes[0].reason, one.causes[0].detail["left"]) == (MissReason.NOT_PUBLISHED, "other")

    def test_a_key_that_somebody_else_still_holds_is_not_lost(self, log, around, join):
        join("other", KEYS)
        around.lost(KEYS, "me", "evicted")
        assert around.memory.gone(KEYS[0]) is None

    def test_the_fetch_knows_better_than_the_second_lookup(self, log, join):
        """The engine then only knows that the chunk failed a moment ago, or that nobody is known to hold it."""
        join("peer")
        reasons = [None, MissReason.STALE] + [MissReason.TRUNCATED] * 6
        for second in (MissReason.RECENTLY_FAILED, MissReason.NOT_PUBLISHED):
            fetched(log, dict(zip(KEYS, reasons, strict=True)))
            one = told(log, found=1, misses=[Miss(KEYS[1], second)])
            assert shape(one) == [
                (0, 1, "peer", None),
                (1, 1, "nowhere", MissReason.STALE),
                (2, 6, "nowhere", MissReason.TRUNCATED),
            ]
            assert one.causes[0].instance_id == "peer"
            assert one.peers[0].address == "127.0.0.1:8200"

    def test_the_deadline_tells_the_limits(self, log, join):
        join("peer")
        fetched(log, dict.fromkeys(KEYS, MissReason.DEADLINE))
        (cause,) = told(log, misses=[Miss(KEYS[0], MissReason.RECENTLY_FAILED)]).causes
        assert cause.detail["fetch_timeout_s"] == 10.0
        assert "fetch_timeout_s is 10 s" in cause.text

    def test_an_engines_own_numbers_are_told(self, log):
        detail = {"fetch_s": 2.0, "prefill_s": 0.5}
        (cause,) = told(log, misses=[Miss(KEYS[0], MissReason.GATE_REFUSED, detail)]).causes
        assert (cause.detail, cause.chunks) == (detail, 8)
        assert "2 s to fetch, 500 ms to compute" in cause.text

    def test_what_the_nodes_own_gate_refused_has_both_times(self, log, join):
        """The engine only knows afterwards that the fetch did not bring it."""
        join("peer", KEYS)
        items = [ChunkOutcome(FetchItem(key, slot), MissReason.GATE_REFUSED, None) for slot, key in enumerate(KEYS)]
        decision = GateDecision(Verdict.SLOWER, 0, 8, fetch_s=2.0, prefill_s=0.5)
        log.fetched("r", "-", 4096, JobResult(items, [], 0.0, {}, decision))
        (cause,) = told(log, misses=[Miss(KEYS[0], MissReason.RECENTLY_FAILED)]).causes
        assert (cause.reason, cause.instance_id, cause.chunks) == (MissReason.GATE_REFUSED, "peer", 8)
        assert "2 s to fetch, 500 ms to compute" in cause.text

    @pytest.mark.parametrize("reason", [MissReason.POOL_FULL, MissReason.NO_DIRECTORY, MissReason.NODE_DOWN])
    def test_what_holds_for_the_request_holds_for_all_its_chunks(self, log, join, reason):
        join("other", KEYS)
        assert shape(told(log, misses=[Miss(KEYS[0], reason)])) == [(0, 8, "nowhere", reason)]

    def test_a_miss_of_another_group_decides_too(self, log):
        other = KEYS[0][:-1] + b"\x01"
        one = told(log, misses=[Miss(other, MissReason.NOT_PUBLISHED)])
        assert one.causes[0].reason is MissReason.NOT_PUBLISHED

    def test_another_format_of_the_same_model(self, log, around):
        """Without a peer it is the reason; the closest stranger is named with what differs."""
        around.meet_stranger(make_member("far", format=make_format(kv_dtype="fp8", hash_seed="7")))
        around.meet_stranger(make_member("near", format=make_format(hash_seed="7")))
        around.meet_stranger(make_member("foreign", format=make_format(model_name="another")))
        (cause,) = told(log, misses=[Miss(KEYS[0], MissReason.NO_PEERS)]).causes
        assert (cause.reason, cause.instance_id, cause.chunks) == (MissReason.FORMAT_MISMATCH, "near", 8)
        assert [(pair.field, pair.ours, pair.theirs) for pair in cause.fields] == [("hash_seed", "", "7")]

    def test_with_a_peer_another_format_is_only_possible(self, log, around, join):
        join("other")
        around.meet_stranger(make_member("near", format=make_format(hash_seed="7")))
        one = told(log, misses=[Miss(KEYS[0], MissReason.NOT_PUBLISHED)])
        assert [cause.reason for cause in one.causes] == [MissReason.NOT_PUBLISHED]
        assert [(cause.reason, cause.chunks) for cause in one.possible] == [(MissReason.FORMAT_MISMATCH, 0)]

    def test_asked_a_moment_ago(self, log, clock, join):
        """The chunk is being computed here: the second request came too early."""
        join("other")
        miss = [Miss(KEYS[0], MissReason.NOT_PUBLISHED)]
        assert told(log, misses=miss).causes[0].detail == {}
        clock.now_s += 0.5
        assert told(log, misses=miss).causes[0].detail == {"asked_s": 0.5, "asked_at": "me"}

    def test_a_request_that_ended_early(self, log):
        one = told(log, ended_early=True)
        assert one.ended_early
        assert "ended before" in one.summary
        assert log.usage.total.requests == 0, "it is no lookup"


SALTED = [bytes([1]) + key[1:] for key in KEYS]


class TestTenants:
    def miss(self, keys=KEYS):
        return [Miss(keys[0], MissReason.NOT_PUBLISHED)]

    def test_the_same_text_under_another_salt(self, log):
        told(log, misses=self.miss(), tokens_hash=b"text")
        one = told(log, keys=SALTED, misses=self.miss(SALTED), tokens_hash=b"text", separated_by=["cache_salt"])
        assert [(cause.reason, cause.chunks) for cause in one.causes] == [(MissReason.TENANT_SALT, 8)]

    def test_without_a_salt_it_is_no_tenant(self, log):
        """Another adapter makes other keys as well."""
        told(log, misses=self.miss(), tokens_hash=b"text")
        one = told(log, keys=SALTED, misses=self.miss(SALTED), tokens_hash=b"text", separated_by=["lora:a"])
        assert one.causes[0].reason is MissReason.NOT_PUBLISHED

    def test_pictures_prove_nothing(self, log):
        """Their tokens are all alike."""
        told(log, misses=self.miss(), tokens_hash=b"text", separated_by=["multimodal"])
        one = told(log, keys=SALTED, misses=self.miss(SALTED), tokens_hash=b"text", separated_by=["cache_salt"])
        assert one.causes[0].reason is MissReason.NOT_PUBLISHED

    def test_what_follows_a_shared_beginning_is_no_matter_of_salt(self, log):
        told(log, misses=self.miss(), tokens_hash=b"text", separated_by=["cache_salt"])
        miss = [Miss(SALTED[2], MissReason.NOT_PUBLISHED)]
        one = told(log, keys=SALTED, found=2, misses=miss, tokens_hash=b"text")
        assert one.causes[0].reason is MissReason.NOT_PUBLISHED

    def test_unproven_it_is_possible(self, log, join):
        one = told(log, misses=self.miss(), tokens_hash=b"text", separated_by=["cache_salt"])
        assert [cause.reason for cause in one.possible] == [MissReason.TENANT_SALT]


class TestMemory:
    def test_requests_are_found_by_the_names_that_clients_know(self, log, clock):
        for name in ("cmpl-abc-0-1f2e3d4c", "cmpl-abcd-0-aaaaaaaa", "chatcmpl-abc-bbbbbbbb"):
            told(log, request_id=name)
            clock.now_s += 1

        def names(asked):
            return [kept.explanation.request_id for kept in log.find(asked)]

        assert names("cmpl-abc") == ["cmpl-abc-0-1f2e3d4c", "cmpl-abcd-0-aaaaaaaa"]
        assert names("abc") == ["chatcmpl-abc-bbbbbbbb", "cmpl-abc-0-1f2e3d4c"]
        assert names("cmpl-abcd-0-aaaaaaaa") == ["cmpl-abcd-0-aaaaaaaa"]
        assert names("nobody") == names("") == []
        assert [round(kept.explanation.age_s) for kept in log.find("abc")] == [1, 3]

    def test_the_newest_come_first_and_the_oldest_go(self, log, monkeypatch):
        for number in range(request_log.MAX_REQUESTS + 5):
            told(log, keys=(), prompt_tokens=1, request_id=f"r{number:04}")
        assert [line.request_id for line in log.recent(2)] == ["r1004", "r1003"]
        assert log.find("r0004") == []
        assert log.find("r0005") != []

    def test_fetches_of_requests_that_are_never_told_of_are_forgotten(self, log):
        for number in range(request_log.MAX_UNTOLD_FETCHES + 1):
            fetched(log, {KEYS[0]: None}, request_id=f"r{number}")
        assert told(log, request_id="r0").fetches == []
        assert len(told(log, request_id="r1").fetches) == 1

    def test_why_we_missed(self, log, clock, join):
        join("other")
        told(log, found=6, misses=[Miss(KEYS[6], MissReason.NOT_PUBLISHED)])
        told(log, misses=[Miss(KEYS[0], MissReason.POOL_FULL)])
        told(log, keys=(), prompt_tokens=5)
        clock.now_s += 1800
        summary = log.summary(1.0)
        assert [(share.reason, share.chunks, share.requests) for share in summary.misses] == [
            (MissReason.POOL_FULL, 8, 1),
            (MissReason.NOT_PUBLISHED, 2, 1),
            (MissReason.BELOW_ONE_CHUNK, 0, 1),
        ]
        assert (summary.requests, summary.chunks, summary.found.nowhere, summary.seconds) == (3, 16, 10, 1800)
        clock.now_s += 3600
        assert log.summary(1.0).misses == []
        assert len(log.summary(24).misses) == 3


class TestReports:
    def test_the_first_report_carries_all_and_then_what_is_new(self, log):
        told(log, found=2, on_device=1)
        first = log.take_report("me", "0" * 16)
        assert first is not None
        assert (first.requests, first.chunks, first.device_chunks, first.own_chunks, first.peer_chunks) == (
            1,
            8,
            1,
            2,
            0,
        )
        assert set(unpack_hashes(first.hashes)) == {key_hash(key) for key in KEYS}
        assert first.threshold == EVERYTHING - 1
        assert log.take_report("me", "0" * 16) is None
        told(log, keys=[*KEYS[:7], NEW])
        second = log.take_report("me", "0" * 16)
        assert second is not None
        assert (second.chunks, second.new_alone) == (16, 9)
        assert unpack_hashes(second.hashes) == [key_hash(NEW)]
        log.start_over()
        whole = log.take_report("me", "0" * 16)
        assert whole is not None
        assert len(unpack_hashes(whole.hashes)) == 9

    def test_too_much_for_one_report_is_told_whole(self, log, monkeypatch):
        assert log.take_report("me", "0" * 16) is not None
        monkeypatch.setattr(request_log, "MAX_FRESH", 4)
        told(log)
        report = log.take_report("me", "0" * 16)
        assert report is not None
        assert len(unpack_hashes(report.hashes)) == 8
