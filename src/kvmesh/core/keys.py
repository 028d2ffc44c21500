"""Chunk keys: the names under which KV chunks are published.

A key is the serving engine's own chained block hash of the chunk's last block, followed by the KV cache group's index
in four bytes (vLLM's `OffloadKey`). Tenant salt, LoRA adapter and multimodal inputs are already part of the chain, so
equal keys mean equal tokens in an equal context. What the keys do not cover (model, dtype, layout) is the format's
job: see `format`.
"""

from __future__ import annotations

from typing import NewType

ChunkKey = NewType("ChunkKey", bytes)

KEY_MAX_BYTES = 40
"""Longest key that the ledger and the wire take: a 32-byte hash and a group index, with 4 bytes to spare."""
KEY_MIN_BYTES = 8


def check_key(key: bytes) -> ChunkKey:
    """Return `key` as a ChunkKey. Raises ValueError when its length is outside the limits."""
    if not KEY_MIN_BYTES <= len(key) <= KEY_MAX_BYTES:
        raise ValueError(f"chunk key of {len(key)} bytes; {KEY_MIN_BYTES} to {KEY_MAX_BYTES} are allowed")
    return ChunkKey(key)


def short(key: bytes) -> str:
    """First eight bytes in hexadecimal: enough to recognise a key in a log line."""
    return key[:8].hex()


def group_of(key: bytes) -> bytes:
    """The KV cache group's index inside the key (its last four bytes). Chunks of different groups are different
    prefixes.
    """
    return key[-4:]
