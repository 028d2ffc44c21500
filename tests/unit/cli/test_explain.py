"""`kvmesh explain`: one request, the last requests, and the summary."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from kvmesh.cli.complete import complete_instance
from kvmesh.cli.shared import tell
from kvmesh.errors import ApiRefusedError
from support.fake_controller import instance

FOUND = {"device": 0, "own_pool": 4, "peer": 8, "nowhere": 4}
EXPLANATION = {
    "request_id": "cmpl-abc",
    "instance_id": "engine-a",
    "incarnation": "0" * 16,
    "age_s": 3.0,
    "wait_s": 0.1,
    "prompt_tokens": 4160,
    "chunk_tokens": 256,
    "chunks": 16,
    "tail_tokens": 64,
    "found": FOUND,
    "summary": "8 of 16 chunks came from peers",
    "spans": [
        {"first_chunk": 0, "chunks": 4, "where": "own_pool", "instance_id": "", "reason": None},
        {"first_chunk": 12, "chunks": 4, "where": "nowhere", "instance_id": "", "reason": "gate_refused"},
    ],
    "causes": [
        {
            "reason": "gate_refused",
            "chunks": 4,
            "first_chunk": 12,
            "instance_id": "engine-b",
            "text": "fetching would take longer than computing",
            "change": "use a faster link",
            "detail": {"fetch_s": 1.25, "prefill_s": 0.4},
            "fields": [],
        }
    ],
    "possible": [
        {
            "reason": "format_mismatch",
            "chunks": 0,
            "instance_id": "engine-c",
            "text": "it cannot share",
            "change": "start all with the same --dtype",
            "fields": [{"field": "kv_dtype", "ours": "float16", "theirs": "bfloat16"}],
        }
    ],
    "fetches": [
        {
            "holders": ["engine-b"],
            "transport": "tcp",
            "chunks_asked": 12,
            "chunks_fetched": 8,
            "fetched_bytes": 8_000_000,
            "seconds": 0.1,
            "misses": {"evicted": 4},
        }
    ],
    "peers": [],
    "separated_by": ["cache_salt"],
    "ended_early": False,
}


def test_one_request(run, controller):
    """Where each chunk was, why not the rest with both predicted times, and what to change."""
    controller.answers["/api/v1/explain/cmpl-abc"] = {
        "request": "cmpl-abc",
        "explanations": [EXPLANATION],
        "unanswered": [{"instance_id": "engine-z", "code": "deadline", "text": "no answer within 2 s"}],
    }
    result = run("explain", "cmpl-abc")
    assert result.exit_code == 0, result.output
    for part in (
        "4160 tokens: 16 chunks of 256 and 64 tokens; 4 in the own pool, 8 from peers, 4 computed",
        "0-3: in the own pool",
        "12-15: computed (gate_refused)",
        "8 of 12 chunks, 8 MB in 100 ms from engine-b by tcp; misses: evicted 4",
        "because  gate_refused engine-b, 4 chunks: fetching would take longer than computing",
        "fetch_s 1.25, prefill_s 0.4",
        "change   use a faster link",
        "beware   format_mismatch engine-c: it cannot share",
        "kv_dtype: float16 here, bfloat16 there",
        "cache_salt",
        "not asked: engine-z: no answer within 2 s",
    ):
        assert part in result.stdout


def test_the_last_requests(run, controller):
    listed = {key: EXPLANATION[key] for key in ("request_id", "instance_id", "age_s", "prompt_tokens", "chunks")}
    controller.answers["/api/v1/explain"] = {"requests": [{**listed, "found": FOUND, "reason": "evicted"}]}
    result = run("explain", "--instance", "engine-a", "--limit", "7")
    assert "cmpl-abc" in result.stdout
    assert "evicted" in result.stdout
    assert controller.asked[-1].query == "instance=engine-a&limit=7"


def test_why_we_missed(run, run_json, controller):
    missed = {"reason": "gate_refused", "chunks": 120, "requests": 9, "share": 0.8, "text": "slow", "change": "mend"}
    cluster = {"instance_id": "", "requests": 20, "chunks": 320, "found": FOUND, "hit_rate": 0.71, "misses": [missed]}
    controller.answers["/api/v1/explain/summary"] = {"hours": 6.0, "cluster": cluster, "instances": []}
    result = run("explain", "--summary", "--hours", "6")
    assert "cluster, last 6 h: 20 requests, 320 chunks, hit rate 71 %" in result.stdout
    assert "80 % gate_refused (120 chunks, 9 requests): slow" in result.stdout
    assert run_json("explain", "--summary")["cluster"]["misses"][0]["reason"] == "gate_refused"


def test_a_request_that_nobody_remembers(run, controller):
    controller.refuse("/api/v1/explain/x%2Fy", 404, "unknown_request", "nobody remembers it", "nodes remember 1,000")
    error = run("explain", "x/y").exception
    assert isinstance(error, ApiRefusedError)
    assert error.code == "unknown_request"


def test_a_summary_is_of_no_single_request(run):
    assert run("explain", "x", "--summary").exit_code == 2


@pytest.mark.parametrize(("typed", "offered"), [("", ["engine-a", "other"]), ("eng", ["engine-a"]), ("x", [])])
def test_instances_are_completed(controller, monkeypatch, typed, offered):
    controller.answers["/api/v1/instances"] = {"instances": [instance("engine-a"), instance("other")]}
    monkeypatch.setenv("KVMESH_CONTROLLER", controller.address)
    assert complete_instance(typed) == offered


def test_completion_says_nothing_when_nobody_answers(monkeypatch):
    monkeypatch.setenv("KVMESH_CONTROLLER", "nonsense")
    assert complete_instance("") == []


def test_sentences_are_indented_on_terminals_and_whole_elsewhere():
    """Further lines stand under the first one; a pipe gets one line, for grep."""
    wide, narrow = io.StringIO(), io.StringIO()
    text = "one two three four five six seven eight nine ten"
    tell(Console(file=narrow, force_terminal=True, width=30, color_system=None), text, label="  why", indent=8)
    tell(Console(file=wide, width=30), text, label="  why", indent=8)
    first, *rest = narrow.getvalue().rstrip().splitlines()
    assert first.startswith("  why   one two")
    assert rest
    assert all(line.startswith(" " * 8) and line[8] != " " for line in rest)
    assert wide.getvalue() == f"  why   {text}\n"
