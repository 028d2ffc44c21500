"""The router before real vLLM servers that share: each policy, no directory, one killed in a stream, one added."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from kvmesh.bench.cluster import Instance, complete, instance_config, wait_healthy
from kvmesh.models import make_tiny_llama
from support.prefork import PreforkedInstance
from support.routers import RouterProcess, until
from support.servers import Pair, pulled, running_pair, words

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    config = {"max_local_cpu_size": 1}
    with running_pair(tmp_path_factory.mktemp("router"), make_tiny_llama(), config=config) as pair:
        yield pair


@contextlib.contextmanager
def routed(pair: Pair, folder: Path, policy: str, *late: Instance, **settings: object) -> Iterator[RouterProcess]:
    """A router that knows both instances by their ids, and those that will be started later."""
    named = {str(one.config["lmcache_instance_id"]): one.url for one in (pair.first, pair.second, *late)}
    router = RouterProcess(folder, policy=policy, backends=[f"{name}={url}" for name, url in named.items()], **settings)
    try:
        yield router.start_and_wait(healthy=2)
    finally:
        router.stop()


def assigned(router: RouterProcess) -> dict[str, int]:
    return {str(one["name"]): int(str(one["assigned_requests"])) for one in router.backends()}


@pytest.mark.parametrize("policy", ["roundrobin", "leastload", "session", "prefix"])
def test_each_policy_serves_what_the_engines_serve(policy: str, pair: Pair, tmp_path: Path) -> None:
    """Streamed and whole answers have the engine's own text; other routes and errors come through."""
    with routed(pair, tmp_path, policy) as router:
        prompt = words(50, 1)
        expected = complete(pair.first.url, prompt, max_tokens=8).text
        assert [complete(router.url, prompt, max_tokens=8).text for _ in range(3)] == [expected] * 3
        whole = {"model": "model", "prompt": prompt, "max_tokens": 8, "temperature": 0, "user": "somebody"}
        answer = httpx.post(f"{router.url}/v1/completions", json=whole, timeout=60)
        assert answer.json()["choices"][0]["text"] == expected
        assert [card["id"] for card in httpx.get(f"{router.url}/v1/models").json()["data"]] == ["model"]
        assert httpx.post(f"{router.url}/tokenize", json={"model": "model", "prompt": "x"}).json()["count"] >= 1
        wrong = httpx.post(f"{router.url}/v1/completions", json={**whole, "model": "nobody's"}, timeout=60)
        assert wrong.status_code == 404
        counts = assigned(router)
        if policy == "roundrobin":
            assert max(counts.values()) - min(counts.values()) <= 1
        if policy == "prefix":
            assert router.metric("first_byte_seconds_count") >= 4


def test_kv_follows_the_directory(pair: Pair, tmp_path: Path) -> None:
    """An idle holder gets the request; a busy one does not, and the other instance pulls; without a directory it goes
    by load.
    """
    prompt = words(1500, 2)
    cold = complete(pair.second.url, prompt, max_tokens=8)
    chunks = cold.prompt_tokens // 256
    assert chunks >= 4
    pair.first.wait_visible(chunks)
    settings = {"controller_url": pair.controller.url, "kv_timeout_s": 20.0, "kv_fetch_cost": 0.02}
    with routed(pair, tmp_path, "kv", **settings) as router:
        until(lambda: router.metric("directory_connected") == 1, router)
        first, second = (str(instance.config["lmcache_instance_id"]) for instance in (pair.first, pair.second))
        assert complete(router.url, prompt, max_tokens=8).text == cold.text
        assert assigned(router) == {first: 0, second: 1}
        assert router.metric("choices_total", reason="held") == 1
        assert router.metric("overlap_tokens_total", kind="cached") == chunks * 256

        before, _ = pulled(pair.first)
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(lambda _: complete(router.url, prompt, max_tokens=60), range(6)))
        assert len({answer.text for answer in answers}) == 1
        assert assigned(router)[first] >= 1, f"{router.log()}"
        assert router.metric("choices_total", reason="peers") >= 1
        assert pulled(pair.first)[0] >= before + chunks, pair.show_logs()

        pair.controller.kill_group()
        until(lambda: router.metric("directory_connected") == 0, router)
        assert complete(router.url, prompt, max_tokens=8).text == cold.text
        assert router.metric("choices_total", reason="no_directory") == 1
        pair.controller.start()
        until(lambda: router.metric("directory_connected") == 1, router)


def test_engines_killed_and_added(pair: Pair, tmp_path: Path) -> None:
    """One is killed in a stream: its client gets an error event and the end of the stream, the other engine's client
    its whole answer; the next requests do not notice. One that is added gets requests as soon as it serves, and so does
    the killed one when it is back.
    """
    third = PreforkedInstance("instance-3", make_tiny_llama(), tmp_path, instance_config(3, pair.controller), core=0)
    with routed(pair, tmp_path, "roundrobin", third) as router, contextlib.ExitStack() as stack:
        stack.callback(third.stop)

        def stream(seed: int, tokens: int) -> Iterator[str]:
            body = {"model": "model", "max_tokens": tokens, "min_tokens": tokens, "stream": True, "temperature": 0}
            url = f"{router.url}/v1/completions"
            request = httpx.stream("POST", url, json={**body, "prompt": words(20, seed)}, timeout=300)
            return stack.enter_context(request).iter_lines()

        long = stream(3, 3900)
        assert next(long).startswith("data: {")
        [at] = [name for name, count in assigned(router).items() if count]
        short = stream(4, 300)
        [victim] = [one for one in (pair.first, pair.second) if one.config["lmcache_instance_id"] == at]
        victim.kill_group()
        ended, whole = list(long), list(short)
        error = json.loads(next(line for line in reversed(ended) if line.startswith("data: ")).removeprefix("data: "))
        assert error["error"]["code"] == "backend_failed"
        assert "data: [DONE]" not in ended
        assert "data: [DONE]" in whole
        for seed in range(4):
            assert complete(router.url, words(20, seed), max_tokens=4).text
        until(lambda: len(router.healthy()) == 1, router)

        for late in (third, victim):
            late.start()
        wait_healthy(third, victim)
        until(lambda: len(router.healthy()) == 3, router)
        before = assigned(router)
        text = complete(pair.first.url, words(20, 9), max_tokens=4).text
        assert [complete(router.url, words(20, 9), max_tokens=4).text for _ in range(6)] == [text] * 6
        assert {name: count - before[name] for name, count in assigned(router).items()} == dict.fromkeys(before, 2)
