"""Chunk keys from token ids, as vLLM makes them: for whoever wants to know who holds a prompt without asking an engine.

vLLM hashes block by block. A block's hash covers the hash before it, the block's tokens and *extra keys* (LoRA adapter,
tenant salt); the first block follows a hash of the seed. A chunk's key is the hash of its last block with the KV cache
group's index behind it (see `kvmesh.core.keys`). `tests/contract/test_block_hashes.py` compares this with vLLM's own
functions.

Multimodal inputs and prompt embeddings enter the hashes with digests that only the engine can make; prompts that have
them cannot be hashed here. So it is with `sha256_cbor`, whose encoder is no dependency of ours, and with the hash
algorithms whose seed is random in each process.

Pure; 256 tokens cost about 10 microseconds.
"""

from __future__ import annotations

import hashlib
import pickle  # only to write: vLLM's default hash is taken over pickled tuples
from collections.abc import Sequence
from typing import NamedTuple

from kvmesh.core.keys import ChunkKey

DEFAULT_SEED = "vllm-none-hash"
"""What vLLM hashes before the first block where PYTHONHASHSEED is not set."""
HASH_ALGORITHMS = ("sha256",)
"""Those that can be reproduced here."""

LoraKey = tuple[str, str]
"""Name and path of a LoRA adapter, as the engine was told them."""


class HashRule(NamedTuple):
    """What chunk keys depend on beside the request; part of a format."""

    block_tokens: int
    chunk_tokens: int
    algorithm: str = "sha256"
    seed: str = ""
    """PYTHONHASHSEED of the engines; empty where it is not set."""

    def problem(self) -> str | None:
        """Why keys cannot be made by this rule; None when they can."""
        if self.algorithm not in HASH_ALGORITHMS:
            return f"hash algorithm {self.algorithm}"
        if self.block_tokens < 1 or self.chunk_tokens < 1 or self.chunk_tokens % self.block_tokens:
            return f"chunks of {self.chunk_tokens} tokens in blocks of {self.block_tokens}"
        return None


def chunk_keys(
    tokens: Sequence[int],
    rule: HashRule,
    *,
    cache_salt: str = "",
    lora: LoraKey | None = None,
    group: int = 0,
    max_chunks: int | None = None,
) -> list[ChunkKey]:
    """Keys of the whole chunks of a prompt, in prefix order.

    Args:
        tokens: the prompt as the engine sees it, template and special tokens included.
        rule: must have no `problem()`.
        cache_salt: the request's tenant salt; it enters the first block.
        lora: the adapter that the request uses; it enters every block.
        group: index of the KV cache group.
        max_chunks: stop after so many.
    """
    chunks = len(tokens) // rule.chunk_tokens
    if max_chunks is not None:
        chunks = min(chunks, max_chunks)
    suffix = group.to_bytes(4, "big")
    adapter = () if lora is None else (("lora", *lora),)
    following = adapter or None
    extra: tuple[tuple[str, ...], ...] | None = (*adapter, ("cache_salt", cache_salt)) if cache_salt else following
    parent = _hash(rule.seed or DEFAULT_SEED)
    keys = []
    size = rule.block_tokens
    for start in range(0, chunks * rule.chunk_tokens, size):
        parent = _hash((parent, tuple(tokens[start : start + size]), extra))
        extra = following
        if (start + size) % rule.chunk_tokens == 0:
            keys.append(ChunkKey(parent + suffix))
    return keys


def _hash(value: object) -> bytes:
    return hashlib.sha256(pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)).digest()
