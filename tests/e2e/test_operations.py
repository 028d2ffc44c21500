"""Operations on three real vLLM servers, idle when asked: what they hold afterwards, and what a request sees."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import httpx
import pytest

from kvmesh.bench.cluster import Controller, Instance, complete, instance_config, metric, wait_healthy
from kvmesh.models import TINY, make_tiny_llama
from support.prefork import PreforkedInstance
from support.servers import PATIENT, STEADY, PoolView, node_of, pulled, token_prompt, words

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

CHUNK_TOKENS = 128  # the CPU platform's block: many small chunks
PROMPT_CHUNKS = 8
SLOTS = 40
POOL_GB = (SLOTS + 0.5) * CHUNK_TOKENS * TINY.kv_bytes_per_token(4) / 1024**3
PROMPTS = [token_prompt(PROMPT_CHUNKS * CHUNK_TOKENS + 20, 30_000 + seed) for seed in range(20)]


class Trio(NamedTuple):
    controller: Controller
    first: Instance
    second: Instance
    third: Instance

    def api(self, path: str, body: dict[str, object] | None = None) -> dict:
        url = f"{self.controller.url}/api/v1{path}"
        answer = httpx.get(url, timeout=60) if body is None else httpx.post(url, json=body, timeout=60)
        assert answer.is_success, answer.text
        return answer.json()

    def operate(self, **body: object) -> dict:
        """Start an operation, wait for its end, which is expected to be a good one."""
        started = self.api("/operations", body)
        ended = self.api(f"/operations/{started['id']}?wait_s=50")
        assert ended["state"] == "done", ended
        return ended

    def held(self, prompt: Sequence[int]) -> dict[str, int]:
        """Leading chunks of a prompt by instance, as the directory knows."""
        [found] = self.api("/lookup", {"tokens": list(prompt)})["formats"]
        return found["longest_prefix"]["by_instance"]


def from_the_pool(instance: Instance) -> int:
    """Prompt tokens that vLLM took out of the host pool instead of computing them."""
    return int(metric(instance.url, "vllm:external_prefix_cache_hits_total"))


def published(instance: Instance) -> set[bytes]:
    view = PoolView(node_of(instance))
    view.ledger.check_integrity()
    found = set(view.chunks())
    view.close()
    return found


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trio]:
    folder = tmp_path_factory.mktemp("operations")
    model = make_tiny_llama(shape=TINY)
    config = STEADY | {"max_local_cpu_size": POOL_GB, "chunk_size": CHUNK_TOKENS}
    with contextlib.ExitStack() as stack:
        controller = Controller(folder, arguments=PATIENT)
        stack.callback(controller.stop)
        controller.start()
        wait_healthy(controller, timeout_s=60)
        instances = []
        for number in (1, 2, 3):
            instance = PreforkedInstance(
                f"instance-{number}",
                model,
                folder,
                instance_config(number, controller, **config),
                core=number - 1,
                arguments=("--no-enable-prefix-caching",),
                max_model_len=2048,
            )
            stack.callback(instance.stop)
            instance.start()
            instances.append(instance)
        wait_healthy(*instances)
        for instance in instances:
            instance.wait_peers(2)
        yield Trio(controller, *instances)


def test_the_life_of_a_cluster(trio: Trio) -> None:
    """Warm, pin, unpin, clear, drain, with the texts compared all along."""
    first, second, third = (f"lmcache_instance_{number}" for number in (1, 2, 3))
    texts = [complete(trio.first.url, prompt, max_tokens=8).text for prompt in PROMPTS[:3]]
    trio.third.wait_visible(3 * PROMPT_CHUNKS)
    assert trio.held(PROMPTS[0]) == {first: PROMPT_CHUNKS}

    # An idle engine is woken, and its first request finds everything in its own pool.
    warmed = trio.operate(kind="warm", instance=third, hottest=3 * PROMPT_CHUNKS)
    assert warmed["instances"][0]["outcomes"] == {"fetched": 3 * PROMPT_CHUNKS}
    assert trio.held(PROMPTS[0]) == {first: PROMPT_CHUNKS, third: PROMPT_CHUNKS}
    fetched, _ = pulled(trio.third)
    for prompt, text in zip(PROMPTS[:3], texts, strict=True):
        before = from_the_pool(trio.third)
        assert complete(trio.third.url, prompt, max_tokens=8).text == text
        assert from_the_pool(trio.third) - before == PROMPT_CHUNKS * CHUNK_TOKENS
    assert pulled(trio.third)[0] == fetched, "nothing had to be fetched any more"

    # A pinned prompt survives three times the pool; an unpinned one does not.
    pinned = trio.operate(kind="pin", instance=third, tokens=PROMPTS[0], seconds=3600)
    assert pinned["instances"][0]["outcomes"] == {"pinned": PROMPT_CHUNKS}
    for prompt in PROMPTS[5:20]:
        complete(trio.third.url, prompt, max_tokens=2)
    held = trio.held(PROMPTS[0])
    assert held[third] == PROMPT_CHUNKS
    assert third not in trio.held(PROMPTS[1])
    assert complete(trio.third.url, PROMPTS[0], max_tokens=8).text == texts[0]
    assert trio.operate(kind="unpin", instance=third)["instances"][0]["outcomes"] == {"unpinned": PROMPT_CHUNKS}
    for prompt in PROMPTS[5:20]:
        complete(trio.third.url, prompt, max_tokens=2)
    assert third not in trio.held(PROMPTS[0])

    # A cleared pool holds nothing, and can be filled again.
    cleared = trio.operate(kind="clear", instance=third)
    assert cleared["chunks_done"] == cleared["chunks_total"] > SLOTS / 2
    assert published(trio.third) == set()
    assert complete(trio.third.url, PROMPTS[1], max_tokens=8).text == texts[1]
    assert len(published(trio.third)) == PROMPT_CHUNKS

    # Nothing that only the drained instance held is lost, and it still answers.
    only_here = [prompt for prompt in PROMPTS[:3] if set(trio.held(prompt)) == {first}]
    assert len(only_here) == 2
    trio.operate(kind="drain", instance=first)
    members = {one["instance_id"] for one in trio.controller.instances()}
    assert members == {second, third}
    for prompt in PROMPTS[:3]:
        assert max(trio.held(prompt).values()) == PROMPT_CHUNKS
    before = from_the_pool(trio.second)
    for prompt, text in zip(PROMPTS[:3], texts, strict=True):
        assert complete(trio.second.url, prompt, max_tokens=8).text == text
    assert from_the_pool(trio.second) - before == 3 * PROMPT_CHUNKS * CHUNK_TOKENS
    assert complete(trio.first.url, PROMPTS[0], max_tokens=8).text == texts[0]


def test_a_text_is_keyed_as_the_engine_keys_it(trio: Trio) -> None:
    """Tokeniser, block hashes and salt are the engine's own."""
    text = words(500, 7)
    answer = complete(trio.second.url, text, max_tokens=2, cache_salt="tenant-a")
    chunks = answer.prompt_tokens // CHUNK_TOKENS
    [salted] = trio.api("/lookup", {"text": text, "cache_salt": "tenant-a"})["formats"]
    assert salted["tokens"] == answer.prompt_tokens
    assert salted["longest_prefix"]["by_instance"] == {"lmcache_instance_2": chunks}
    [plain] = trio.api("/lookup", {"text": text})["formats"]
    assert plain["longest_prefix"]["chunks"] == 0
    key = salted["chunks"][0]["key"]
    [holder] = trio.api(f"/chunks/{key}")["formats"][0]["holders"]
    assert holder["held"]
