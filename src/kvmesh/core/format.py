"""The format of an instance's KV: everything that must be equal before two instances may exchange bytes.

Two instances whose formats differ never meet in a lookup, and `differences` names the fields, so that "zero hits, no
error" cannot happen: the directory, both nodes' logs and the API carry the field.
"""

from __future__ import annotations

import hashlib
import re
from typing import NamedTuple

import msgspec

_ELEMENT_BYTES = {"bfloat16": 2, "float16": 2, "half": 2, "float32": 4, "float": 4}
_INT8 = re.compile(r", int8 per (\d{1,6}) in transfer$")
_DTYPE = re.compile(r"^(?:auto \(model )?(\w+)")


class Format(msgspec.Struct, frozen=True, kw_only=True):
    """What a chunk's bytes depend on, beside the tokens. All fields are compared; none has a default on purpose."""

    model_name: str
    """The model as the engine names it; the last path component for a local folder."""
    model_weights: str
    """Digest of config, weight headers and sampled weight bytes, and the engine's options that change what these say
    (see `kvmesh.vllm.fingerprint`).
    """
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


class Elements(NamedTuple):
    """What a chunk's bytes are made of."""

    dtype: str
    size_bytes: int
    """1 for types that nothing is known of."""


def elements_of(kv_format: Format) -> Elements:
    """The elements of a format's chunks, by its `kv_dtype`."""
    found = _DTYPE.match(kv_format.kv_dtype)
    dtype = found.group(1) if found else ""
    return Elements({"half": "float16", "float": "float32"}.get(dtype, dtype), _ELEMENT_BYTES.get(dtype, 1))


def with_int8(kv_format: Format, group: int) -> Format:
    """The format of instances whose chunks travel as int8, with a scale for each `group` elements.

    Their bytes are not those that were computed, so it is a format of its own. It stands in `kv_dtype`, not in a field
    of its own, because nodes and controllers that do not know the field would drop it and take the two for one.
    Raises ValueError when chunks of this format cannot travel like that.
    """
    dtype, size_bytes = elements_of(kv_format)
    if size_bytes == 1:
        raise ValueError(f"elements of {kv_format.kv_dtype}, where bfloat16, float16 or float32 can become int8")
    if group < 1 or kv_format.chunk_bytes % (group * size_bytes):
        raise ValueError(f"chunks of {kv_format.chunk_bytes} bytes, no whole number of {group} x {dtype}")
    return msgspec.structs.replace(kv_format, kv_dtype=f"{kv_format.kv_dtype}, int8 per {group} in transfer")


def int8_group(kv_format: Format) -> int | None:
    """The `group` of `with_int8`; None for formats whose chunks travel as they are."""
    found = _INT8.search(kv_format.kv_dtype)
    return int(found.group(1)) if found else None
