"""The first seed, end to end on real vLLM: what one instance has prefilled, the other pulls, and nobody can tell from
the text.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import httpx
import msgspec
import psutil
import pytest

from kvmesh.bench.cluster import complete, metric
from kvmesh.core.reasons import MissReason
from kvmesh.models import THIN, make_tiny_llama
from kvmesh.wire.explain import Explanation
from support.servers import (
    CHUNK_TOKENS,
    Pair,
    PoolView,
    cold_then_pulled,
    node_of,
    pulled,
    running_pair,
    token_prompt,
    words,
)

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

CHANNELS = [pytest.param("tcp", id="tcp"), pytest.param("nixl", id="nixl", marks=pytest.mark.nixl)]


@pytest.fixture(scope="module", params=CHANNELS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Two instances without prefix caching, so that the pool is the only cache; once per channel."""
    folder = tmp_path_factory.mktemp(f"seed-{request.param}")
    model = make_tiny_llama(shape=THIN)
    with running_pair(folder, model, config={"transfer_channel": request.param, "max_local_cpu_size": 1.5}) as running:
        yield running


def test_text_and_bytes_are_identical(pair: Pair) -> None:
    """Five prompts of 4,000 tokens: at least 95 % of the whole chunks are pulled, greedy text and KV bytes are the
    holder's.
    """
    for seed in range(5):
        prompt = token_prompt(4000, seed)
        cold, again, chunks = cold_then_pulled(pair, prompt)
        assert again.text == cold.text
        assert chunks >= 0.95 * (len(prompt) // CHUNK_TOKENS), pair.show_logs()
        assert again.ttft_s < cold.ttft_s
    views = [PoolView(node_of(instance)) for instance in (pair.first, pair.second)]
    held, copied = (view.chunks() for view in views)
    assert len(held.keys() & copied.keys()) >= 5 * 15
    for key in held.keys() & copied.keys():
        assert held[key] == copied[key]
    for view in views:
        view.ledger.check_integrity()
        view.close()


def test_log_lines_and_metrics(pair: Pair) -> None:
    """A reader of the seed finds its two lines, and vLLM's own /metrics tells what was fetched."""
    cold_then_pulled(pair, token_prompt(1500, 100), max_tokens=2)
    log = pair.second.log()
    assert "Established connection to peer" in log
    assert "Retrieved 1280 out of 1280 requested tokens from peers. size: " in log
    assert "throughput: " in log
    chunks, fetched_bytes = pulled(pair.second)
    assert fetched_bytes == chunks * CHUNK_TOKENS * THIN.kv_bytes_per_token(4)
    assert metric(pair.second.url, "kvmesh_lookup_chunks_total", result="hit") >= chunks
    assert metric(pair.second.url, "kvmesh_fetch_seconds_count") >= 1
    instances = {one["instance_id"]: one for one in pair.controller.instances()}
    assert set(instances) == {"lmcache_instance_1", "lmcache_instance_2"}


def test_a_conversation_grows_on_the_other_instance(pair: Pair) -> None:
    """Multi-turn: each turn goes to the other instance, which pulls what the turn before has prefilled."""
    prompt = words(500, 200)
    servers = [pair.first, pair.second]
    for turn in range(4):
        server, other = servers[turn % 2], servers[(turn + 1) % 2]
        before, _ = pulled(server)
        known = metric(other.admin_url, "kvmesh_node_replica_chunks")
        answer = complete(server.url, prompt, max_tokens=16)
        reference = complete(server.url, prompt, max_tokens=16)
        assert answer.text == reference.text
        if turn:
            assert pulled(server)[0] > before, f"turn {turn} pulled nothing\n{pair.show_logs()}"
        prompt += answer.text + " " + words(200, 201 + turn)
        other.wait_visible(int(known) + 1)


def test_tenants_do_not_share(pair: Pair) -> None:
    """Two tenants with different cache_salt never hit each other's chunks; one tenant hits its own."""
    prompt = token_prompt(1500, 300)
    _, _, same = cold_then_pulled(pair, prompt, max_tokens=2, cache_salt="tenant-a")
    assert same == 1500 // CHUNK_TOKENS
    before, _ = pulled(pair.second)
    complete(pair.second.url, prompt, max_tokens=2, cache_salt="tenant-b")
    complete(pair.second.url, prompt, max_tokens=2)
    assert pulled(pair.second)[0] == before


def test_prompts_shorter_than_a_chunk(pair: Pair) -> None:
    """A prompt below one chunk is simply computed, on both."""
    cold = complete(pair.first.url, token_prompt(200, 400))
    before, _ = pulled(pair.second)
    again = complete(pair.second.url, token_prompt(200, 400))
    assert again.text == cold.text
    assert pulled(pair.second)[0] == before


def explained(pair: Pair, name: str) -> Explanation:
    """What the controller says of a request of the second instance, by the name that its client gave it."""
    url = f"{pair.controller.url}/api/v1/explain/{name}"
    for _ in range(1000):  # the record is on its way from the engine to its node
        answer = httpx.get(url, params={"instance": "lmcache_instance_2"}, timeout=30)
        if answer.status_code != httpx.codes.NOT_FOUND:
            break
    return msgspec.convert(answer.raise_for_status().json()["explanations"][0], Explanation)


def test_every_request_is_explained(pair: Pair) -> None:
    """Pulled, salted and short requests, by the names their clients gave them: what was found where, and why not the
    rest.
    """
    prompt = token_prompt(1500, 600)
    chunks = 1500 // CHUNK_TOKENS
    cold_then_pulled(pair, prompt, max_tokens=2)
    complete(pair.second.url, prompt, max_tokens=2, request_id="plain")
    complete(pair.second.url, prompt, max_tokens=2, request_id="salted", cache_salt="tenant-x")
    complete(pair.second.url, token_prompt(200, 601), max_tokens=2, request_id="short")
    plain = explained(pair, "plain")
    assert (plain.found.own_pool, plain.found.peer, plain.causes) == (chunks, 0, []), plain
    assert (plain.prompt_tokens, plain.tail_tokens) == (1500, 1500 - chunks * CHUNK_TOKENS)
    salted = explained(pair, "salted")
    assert salted.separated_by == ["cache_salt"]
    assert [(cause.reason, cause.chunks) for cause in salted.causes] == [(MissReason.TENANT_SALT, chunks)]
    short = explained(pair, "short")
    assert short.causes[0].reason is MissReason.BELOW_ONE_CHUNK
    rates = httpx.get(f"{pair.second.admin_url}/hit-rates").raise_for_status().json()["since_start"]
    assert rates["peer_chunks"] >= chunks
    listed = httpx.get(f"{pair.second.admin_url}/explain").raise_for_status().json()["requests"]
    pulled_one = next(one for one in listed if one["found"]["peer"] == chunks)
    assert [(span.where, span.instance_id) for span in explained(pair, pulled_one["request_id"]).spans] == [
        ("peer", "lmcache_instance_1")
    ]


def test_the_api_finds_the_chunks(pair: Pair) -> None:
    """`/api/v1/lookup` names both holders of a chunk that was pulled."""
    cold_then_pulled(pair, token_prompt(600, 500), max_tokens=2)
    view = PoolView(node_of(pair.second))
    key = next(iter(view.chunks()))
    view.close()
    answer = httpx.get(f"{pair.controller.url}/api/v1/lookup", params={"keys": key.hex()}).raise_for_status().json()
    assert "lmcache_instance_2" in str(answer)


def test_an_idle_engine_does_not_spin(pair: Pair) -> None:
    """With nothing to do, an instance and all its processes use a small part of a core (CPU time, not wall time)."""
    seconds = 5.0
    family = [psutil.Process(pair.second.pid), *psutil.Process(pair.second.pid).children(recursive=True)]
    before = sum(sum(process.cpu_times()[:2]) for process in family)
    time.sleep(seconds)
    used = sum(sum(process.cpu_times()[:2]) for process in family) - before
    assert used / seconds < 0.2
