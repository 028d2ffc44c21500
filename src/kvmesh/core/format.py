"""The format of an instance's KV: everything that must be equal before two instances may exchange bytes.

Two instances whose formats differ never meet in a lookup, and `differences` names the fields, so that "zero hits, no
error" cannot happen: the directory, both nodes' logs and the API carry the field.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import msgspec


class Format(msgspec.Struct, frozen=True, kw_only=True):
    """What a chunk's bytes depend on, beside the tokens. All fields are compared; none has a default on purpose."""

    model_name: str
    """The model as the engine names it; the last path component for a local folder."""
    model_weights: str
    """Digest of config, weight headers and sampled weight bytes (see `kvmesh.vllm.weights`)."""
    kv_dtype: str
    kv_layout: str
    """The engine's name for the order of layers, heads and tokens in a block, with its version."""
    block_tokens: int
    """Tokens per engine block."""
    chunk_tokens: int
    """Tokens per chunk (`chunk_size`)."""
    chunk_bytes: int
    """Bytes of one chunk over all layers and ranks: the size of a slot."""
    groups: str
    """KV cache groups: their layers and block sizes."""
    hash_algorithm: str
    hash_seed: str
    """PYTHONHASHSEED where it enters the block hashes, otherwise empty."""
    parallel_layout: str
    """Tensor, pipeline and context parallel sizes, as far as bytes depend on them."""
    instruction_set: str
    """CPU instruction set where the block layout depends on it (CPU platform), otherwise empty."""

    def format_id(self) -> str:
        """16 bytes in hexadecimal: equal exactly when all fields are equal."""
        return hashlib.sha256(msgspec.msgpack.encode(self)).hexdigest()[:32]


class FieldDifference(NamedTuple):
    """One field in which two formats differ."""

    field: str
    ours: str
    theirs: str

    def __str__(self) -> str:
        return f"{self.field} (ours {self.ours!r}, theirs {self.theirs!r})"


def differences(ours: Format, theirs: Format) -> list[FieldDifference]:
    """The fields in which `theirs` differs from `ours`, in the order of the definition; empty when interchangeable."""
    found = []
    for name in Format.__struct_fields__:
        mine, other = getattr(ours, name), getattr(theirs, name)
        if mine != other:
            found.append(FieldDifference(name, str(mine), str(other)))
    return found
