"""The simulated fleet: what can be worked out by hand, and that nothing gets lost."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmesh.bench.simulator import SIMULATED_POLICIES, Fleet, SimRequest, Simulator
from kvmesh.bench.trace import TraceRun, read_trace, replay
from kvmesh.errors import StartupError

PLAIN = Fleet(
    instances=2,
    chunk_tokens=100,
    kv_bytes_per_token=1000,
    prefill_tokens_per_s=1000,
    decode_s_per_token=0.0,
    link_bytes_per_s=1e7,
    fetch_latency_s=0.0,
    directory_delay_s=0.0,
)
"""A chunk is computed in 0.1 s and pulled in 0.01 s."""


def run(fleet: Fleet, policy: str, requests: list[SimRequest], *, sharing: bool):
    simulator = Simulator(fleet, policy, sharing=sharing)
    outcome = simulator.run(requests)
    simulator.check_integrity()
    return outcome


def test_by_hand_without_sharing() -> None:
    """In turns: the second instance computes anew, the first one needs only the last token the second time."""
    requests = [SimRequest(float(at_s), 500, 1, [1, 2, 3, 4, 5]) for at_s in range(3)]
    outcome = run(PLAIN, "roundrobin", requests, sharing=False)
    assert outcome.ttft_s == pytest.approx([0.5, 0.5, 0.001])
    assert (outcome.local_tokens, outcome.peer_tokens, outcome.moved_bytes) == (499, 0, 0)


def test_by_hand_with_sharing() -> None:
    """The second instance pulls five chunks in 0.05 s and computes one token; the third time it is all there."""
    requests = [SimRequest(float(at_s), 500, 1, [1, 2, 3, 4, 5]) for at_s in range(3)]
    outcome = run(PLAIN, "roundrobin", requests, sharing=True)
    assert outcome.ttft_s == pytest.approx([0.5, 0.051, 0.001])
    assert outcome.moved_bytes == 500_000
    assert outcome.hit_rate == pytest.approx((499 + 499) / 1500)


def test_a_pull_that_is_slower_than_computing_is_not_made() -> None:
    """On a slow link sharing changes nothing, and says how many tokens it left."""
    slow = Fleet(**{**PLAIN.__dict__, "link_bytes_per_s": 1e5})
    requests = [SimRequest(float(at_s), 500, 1, [1, 2, 3, 4, 5]) for at_s in range(2)]
    outcome = run(slow, "roundrobin", requests, sharing=True)
    assert outcome.ttft_s == pytest.approx([0.5, 0.5])
    assert (outcome.gated_tokens, outcome.moved_bytes) == (500, 0)


def test_a_small_pool_forgets() -> None:
    """Three chunks fit: of five, the last three stay, and a prefix without its beginning is worth nothing."""
    small = Fleet(**{**PLAIN.__dict__, "instances": 1, "pool_chunks": 3})
    requests = [SimRequest(float(at_s), 500, 1, [1, 2, 3, 4, 5]) for at_s in range(2)]
    assert run(small, "roundrobin", requests, sharing=False).local_tokens == 0


def test_a_queue_forms() -> None:
    """Requests that come together wait for each other on one instance."""
    one = Fleet(**{**PLAIN.__dict__, "instances": 1})
    requests = [SimRequest(0.0, 100, 1, [number]) for number in range(3)]
    outcome = run(one, "leastload", requests, sharing=False)
    assert outcome.ttft_s == pytest.approx([0.1, 0.2, 0.3])
    assert outcome.utilisation == pytest.approx(1.0)


def test_kv_follows_the_cache_and_beats_turns() -> None:
    """Conversations of many turns over small pools: `kv` hits more without sharing, and needs less time."""
    rng = random.Random(5)
    requests, at_s = [], 0.0
    histories: dict[int, list[int]] = {number: [1000 * number] for number in range(1, 13)}
    for number in range(400):
        at_s += rng.expovariate(4.0)
        speaker = rng.choice(list(histories))
        histories[speaker].append(1000 * speaker + len(histories[speaker]))
        chunks = list(histories[speaker][:8])
        requests.append(SimRequest(at_s, 100 * len(chunks) + 50, 5, chunks, f"{speaker}-{number}"))
    fleet = Fleet(**{**PLAIN.__dict__, "instances": 4, "pool_chunks": 40})
    turns = run(fleet, "roundrobin", requests, sharing=False)
    kv = run(fleet, "kv", requests, sharing=False)
    assert kv.hit_rate > 1.5 * turns.hit_rate
    assert kv.mean_ttft_s < turns.mean_ttft_s
    shared = [run(fleet, policy, requests, sharing=True) for policy in ("roundrobin", "kv")]
    assert shared[1].moved_bytes < shared[0].moved_bytes
    assert shared[1].mean_ttft_s < shared[0].mean_ttft_s


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_every_request_is_answered_once(data: st.DataObject) -> None:
    """Whatever comes, by whatever policy: all get their first token, no sooner than it can be computed."""
    count = data.draw(st.integers(0, 30))
    requests, at_s = [], 0.0
    for _ in range(count):
        at_s += data.draw(st.floats(0, 0.5))
        chunks = data.draw(st.lists(st.integers(0, 6), max_size=6, unique=True))
        tokens = 100 * len(chunks) + data.draw(st.integers(1, 99))
        requests.append(SimRequest(at_s, tokens, data.draw(st.integers(0, 10)), chunks, str(chunks[:1])))
    fleet = Fleet(**{**PLAIN.__dict__, "instances": data.draw(st.integers(1, 3)), "pool_chunks": 5})
    outcome = run(fleet, data.draw(st.sampled_from(SIMULATED_POLICIES)), requests, sharing=data.draw(st.booleans()))
    assert len(outcome.ttft_s) == count
    assert all(ttft_s >= 0.0009 for ttft_s in outcome.ttft_s)
    assert outcome.local_tokens + outcome.peer_tokens <= outcome.prompt_tokens


def test_traces_are_read_scaled_and_copied(tmp_path: Path) -> None:
    """Whole blocks only; a copy has texts of its own; speed divides the times."""
    path = tmp_path / "trace.jsonl"
    lines = [
        {"timestamp": 2000, "input_length": 1100, "output_length": 5, "hash_ids": [0, 1, 2]},
        {"timestamp": 1000, "input_length": 512, "output_length": 5, "hash_ids": [0]},
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    requests = read_trace(path, speed=2.0, copies=2)
    assert [request.at_s for request in requests] == [0.5, 0.5, 1.0, 1.0]
    assert [list(request.chunks) for request in requests] == [[0], [3], [0, 1], [3, 4]]
    run = TraceRun(path, [1], [0.0], ["kv"], 25.0, 1e4, 1000)
    assert [outcome.sharing for outcome in replay(run)] == [False, True]


def test_a_bad_trace_is_named(tmp_path: Path) -> None:
    """The file and what was expected of it."""
    path = tmp_path / "trace.jsonl"
    path.write_text('{"timestamp": "soon"}\n')
    with pytest.raises(StartupError, match="hash_ids"):
        read_trace(path)
    path.write_text("")
    with pytest.raises(StartupError, match="at least one request"):
        read_trace(path)
