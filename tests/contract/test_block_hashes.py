"""`kvmesh.core.block_hashes` against vLLM's own functions."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from kvmesh.core.block_hashes import HashRule, chunk_keys

utils = pytest.importorskip("vllm.v1.core.kv_cache_utils")
hashing = pytest.importorskip("vllm.utils.hashing")
offload = pytest.importorskip("vllm.v1.kv_offload.base")

TOKENS = [token * 7 % 50_000 for token in range(1000)]


def engine_keys(seed: str | None, monkeypatch: pytest.MonkeyPatch, *, salt: str | None, lora: object) -> list[bytes]:
    """The keys under which an engine with blocks of 16 tokens would publish chunks of 64."""
    if seed is None:
        monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    else:
        monkeypatch.setenv("PYTHONHASHSEED", seed)
    utils.init_none_hash(hashing.sha256)
    request = SimpleNamespace(
        block_hashes=[],
        num_tokens=len(TOKENS),
        all_token_ids=TOKENS,
        mm_features=[],
        cache_salt=salt,
        lora_request=lora,
        prompt_embeds=None,
    )
    hashes = utils.get_request_block_hasher(16, hashing.sha256)(request)
    return [offload.make_offload_key(hashes[index], 0) for index in range(3, len(hashes), 4)]


@pytest.mark.parametrize("seed", [None, "0", "1234"])
@pytest.mark.parametrize("salt", [None, "tenant"])
@pytest.mark.parametrize("with_lora", [False, True])
def test_keys_are_vllms(seed: str | None, salt: str | None, with_lora: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Byte for byte, with seed, tenant salt and adapter."""
    lora = SimpleNamespace(lora_name="adapter", lora_path="/adapters/one") if with_lora else None
    rule = HashRule(block_tokens=16, chunk_tokens=64, seed=seed or "")
    ours = chunk_keys(TOKENS, rule, cache_salt=salt or "", lora=("adapter", "/adapters/one") if with_lora else None)
    assert ours == engine_keys(seed, monkeypatch, salt=salt, lora=lora)
