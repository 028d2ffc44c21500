"""From requests to overlaps: what is put together, remembered and counted."""

from __future__ import annotations

import asyncio
import json

from kvmesh.core.block_hashes import HashRule, chunk_keys
from kvmesh.core.keys import ChunkKey
from kvmesh.router.backends import Backend, BackendState, ServedModel
from kvmesh.router.directory import DirectoryInstance, DirectoryLookupError, Holdings
from kvmesh.router.load import Load
from kvmesh.router.overlap import KeyCache, OverlapFinder, Prompt
from kvmesh.router.request import COMPLETIONS, read_facts

RULE = HashRule(block_tokens=2, chunk_tokens=4)


class FakeDirectory:
    """Answers from memory, and remembers what it was asked."""

    def __init__(self) -> None:
        self.instances = {
            name: DirectoryInstance(name, "0" * 16, "f", RULE, "") for name in ("a", "b-dp0", "b-dp1", "stranger")
        }
        self.asked: list[list[ChunkKey]] = []
        self.fails = False

    async def lookup(self, keys, timeout_s):
        del timeout_s
        self.asked.append(list(keys))
        if self.fails:
            raise DirectoryLookupError("away")
        return {"f": Holdings({"a": 1, "b-dp1": 2, "stranger": 3}, 3)}


def backend(name: str, **models: ServedModel) -> BackendState:
    state = BackendState(Backend(name, name, "h", 1), Load(1.0))
    state.healthy, state.models = True, models
    return state


def find(directory: FakeDirectory, body: dict[str, object], finder: OverlapFinder | None = None, **models: ServedModel):
    finder = finder or OverlapFinder(directory, None, timeout_s=5.0, cache_keys=1000)
    facts = read_facts("POST", COMPLETIONS, {"content-type": "application/json"}, json.dumps(body).encode())
    return asyncio.run(finder.find(facts, [backend("a", **models), backend("b", **models), backend("c", **models)]))


def test_holdings_become_tokens_of_backends() -> None:
    """Ranks of one engine count for it; what anybody of the format holds can be reached; strangers are no backends."""
    directory = FakeDirectory()
    overlap, problem = find(directory, {"prompt": list(range(18))})
    assert problem == ""
    assert overlap.prompt_tokens == 18
    assert dict(overlap.held_tokens) == {"a": 4, "b": 8}
    assert dict(overlap.reachable_tokens) == {"a": 12, "b": 12}
    assert directory.asked == [chunk_keys(list(range(18)), RULE)]


def test_salt_and_adapter_are_in_the_keys() -> None:
    """The adapter's name and path come from the engine's list of models."""
    directory = FakeDirectory()
    tokens = list(range(8))
    body = {"prompt": tokens, "model": "lora", "cache_salt": "s"}
    find(directory, body, lora=ServedModel("lora", "/adapter", "base"))
    assert directory.asked == [chunk_keys(tokens, RULE, cache_salt="s", lora=("lora", "/adapter"))]


def test_every_failure_is_a_reason() -> None:
    """And is counted."""
    directory = FakeDirectory()
    finder = OverlapFinder(directory, None, timeout_s=5.0, cache_keys=1000)
    assert find(directory, {"prompt": [1, 2]}, finder) == (None, "short")
    assert find(directory, {}, finder) == (None, "no_prompt")
    directory.fails = True
    assert find(directory, {"prompt": list(range(8))}, finder) == (None, "no_directory")
    directory.instances = {"x": directory.instances["a"]}
    assert find(directory, {"prompt": list(range(8))}, finder) == (None, "unknown_instances")
    other = DirectoryInstance("b", "0" * 16, "g", RULE._replace(chunk_tokens=8), "")
    directory.instances = {"a": directory.instances["x"], "b": other}
    assert find(directory, {"prompt": list(range(8))}, finder) == (None, "format")
    directory.instances = None
    assert find(directory, {"prompt": list(range(8))}, finder) == (None, "no_directory")
    assert finder.problems["no_directory"] == 2


def test_the_cache_is_bounded_by_keys() -> None:
    """The prompts that were not used for the longest time go."""
    cache = KeyCache(max_keys=30)
    prompts = [Prompt(10, (ChunkKey(b"12345678"),) * 6) for _ in range(4)]
    for number, prompt in enumerate(prompts):
        cache.put(bytes([number]), prompt)
        cache.get(b"\x00")
    assert len(cache) <= 30
    assert cache.get(b"\x00") is not None
    assert cache.get(b"\x01") is None
    cache.put(b"\xff", Prompt(10, (ChunkKey(b"12345678"),) * 100))
    assert len(cache) == 0
