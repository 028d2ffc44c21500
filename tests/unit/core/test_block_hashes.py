"""Chunk keys from tokens: what they depend on. That they are vLLM's is shown in tests/contract."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from kvmesh.core.block_hashes import HashRule, chunk_keys

RULE = HashRule(block_tokens=4, chunk_tokens=8)


@settings(deadline=None)
@given(st.lists(st.integers(0, 2**20), max_size=40), st.lists(st.integers(0, 2**20), max_size=10))
def test_equal_beginnings_have_equal_keys(tokens: list[int], more: list[int]) -> None:
    """A longer prompt begins with the keys of the shorter one; there is one key per whole chunk."""
    keys = chunk_keys(tokens, RULE)
    assert len(keys) == len(tokens) // 8
    assert len(set(keys)) == len(keys)
    assert chunk_keys(tokens + more, RULE)[: len(keys)] == keys
    assert chunk_keys(tokens + more, RULE, max_chunks=1) == chunk_keys(tokens + more, RULE)[:1]


def test_what_keeps_prompts_apart() -> None:
    """A token, the order, tenant salt, adapter, seed, block size and group each give other keys."""
    tokens = list(range(16))
    variants = [
        chunk_keys(tokens, RULE),
        chunk_keys([99, *tokens[1:]], RULE),
        chunk_keys(tokens[::-1], RULE),
        chunk_keys(tokens, RULE, cache_salt="a"),
        chunk_keys(tokens, RULE, cache_salt="b"),
        chunk_keys(tokens, RULE, lora=("name", "/path")),
        chunk_keys(tokens, RULE, lora=("name", "/other")),
        chunk_keys(tokens, RULE, lora=("name", "/path"), cache_salt="a"),
        chunk_keys(tokens, RULE._replace(seed="0")),
        chunk_keys(tokens, RULE._replace(block_tokens=8)),
        chunk_keys(tokens, RULE, group=1),
    ]
    last = [keys[-1] for keys in variants]
    assert len(set(last)) == len(last)
    assert all(len(keys) == 2 and len(keys[0]) == 36 for keys in variants)


def test_rules_that_cannot_be_followed_say_so() -> None:
    """Hashes that only an engine can make, and sizes that make no sense."""
    assert RULE.problem() is None
    assert "xxhash" in str(RULE._replace(algorithm="xxhash").problem())
    assert RULE._replace(chunk_tokens=10).problem() is not None
    assert RULE._replace(block_tokens=0).problem() is not None
