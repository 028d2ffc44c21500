"""A slice of a trace for real servers: which requests, which tokens, and what is made of the answers."""

from __future__ import annotations

import contextlib
import json
from types import SimpleNamespace

import pytest

from kvmesh.bench import trace_vllm
from kvmesh.bench.simulator import SimRequest
from kvmesh.bench.trace_vllm import TraceSlice, prompt_of, run_trace_vllm
from kvmesh.bench.vllm_servers import ServerPlan
from kvmesh.errors import StartupError
from support.openai_server import OpenAiServer

LINES = [
    {"timestamp": 1000 * turn, "input_length": 1100, "output_length": 90, "hash_ids": [0, conversation, 100 + turn]}
    for turn, conversation in enumerate([1, 2, 3, 1, 2, 3])
]


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in LINES))
    return path


def test_a_slice_has_whole_conversations_shrunk_and_quickened(trace):
    """All turns of a conversation or none; times begin at 0."""
    whole = TraceSlice(trace, one_of=1, shrink=4, speed=2.0, max_output_tokens=16)
    assert [request.at_s for request in whole.requests()] == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]
    assert {(request.prompt_tokens, request.output_tokens) for request in whole.requests()} == {(275, 16)}
    assert whole.chunk_tokens == 128
    for one_of in (2, 3):
        with contextlib.suppress(StartupError):
            sessions = [request.session for request in TraceSlice(trace, one_of=one_of).requests()]
            assert all(sessions.count(session) == 2 for session in sessions)
    assert len(TraceSlice(trace, one_of=1, limit=2).requests()) == 2


def test_equal_chunks_have_equal_tokens_and_nothing_else_has(trace):
    first, second = SimRequest(0.0, 300, 1, [0, 1]), SimRequest(0.0, 300, 1, [0, 2])
    one, other = prompt_of(first, 0, 128), prompt_of(second, 1, 128)
    assert len(one) == len(other) == 300
    assert one[:128] == other[:128]
    assert one[128:256] != other[128:256]
    assert prompt_of(first, 2, 128)[:256] == one[:256]
    assert prompt_of(first, 2, 128)[256:] != one[256:]


def test_what_no_server_could_have_is_refused(trace):
    with pytest.raises(StartupError, match="--shrink"):
        TraceSlice(trace, shrink=3).requests()


@pytest.mark.parametrize("fails", [False, True])
def test_answers_become_a_row_of_the_simulators_table(trace, tmp_path, monkeypatch, capsys, fails):
    """In turns to both; what was cached and did not come from a peer is local; below it what the simulator says."""
    asked = []
    with OpenAiServer(cached=200).running() as first, OpenAiServer(cached=200, fails=fails).running() as second:
        for server in (first, second):
            server.metrics = {
                "kvmesh_fetched_chunks_total": 7,
                "kvmesh_fetched_bytes_total": 7e6,
                "kvmesh_fetch_seconds_sum": 3.5,
                "kvmesh_prefill_tokens_per_second": 1000,
                'kvmesh_lookup_chunks_total{result="miss",reason="gate_refused"}': 7,
            }
            server.answered = {name: value / 7 for name, value in server.metrics.items() if "prefill" not in name}

        @contextlib.contextmanager
        def running(plan, folder, *, sharing):
            asked.append((plan.config["chunk_size"], sharing))
            yield [SimpleNamespace(url=server.url) for server in (first, second)]

        monkeypatch.setattr(trace_vllm, "running_servers", running)
        part = TraceSlice(trace, one_of=1, shrink=4, speed=1000.0)
        status = run_trace_vllm(part, ServerPlan(tmp_path), 1.0, 100, as_json=True, logs=tmp_path)
    told = json.loads(capsys.readouterr().out)
    assert asked == [(128, True), (128, False)]
    assert status == int(fails)
    assert told["rates"] == {"prefill_tokens_per_s": 1000.0, "fetch_bytes_per_s": 2e6}
    on, off, *simulated = told["outcomes"]
    assert [one["policy"] for one in simulated] == ["roundrobin, simulated"] * 2
    assert [one["sharing"] for one in told["outcomes"]] == [True, False] * 2
    if fails:
        assert on["requests"] == 3
        return
    assert on["requests"] == 6
    assert on["prompt_tokens"] == 6 * 275
    assert (on["hit_rate"], on["local_hit_rate"]) == (6 * 200 / 1650, 6 * 72 / 1650)
    assert (on["moved_bytes"], on["gated_tokens"]) == (6_000_000, 6 * 128)
    assert (off["hit_rate"], off["moved_bytes"]) == (6 * 200 / 1650, 0)
    assert [len(server.bodies) for server in (first, second)] == [6, 6]
