"""Members, formats and keys for tests of the controller."""

from __future__ import annotations

import secrets

import msgspec

from kvmesh.core.format import Format
from kvmesh.wire import directory as wire


def make_format(**changes: object) -> Format:
    plain = Format(
        model_name="SmolLM2-135M",
        model_weights="w0",
        kv_dtype="float32",
        kv_layout="NHD/1",
        block_tokens=16,
        chunk_tokens=256,
        chunk_bytes=11_796_480,
        groups="all:16",
        hash_algorithm="sha256",
        hash_seed="",
        parallel_layout="tp1",
        instruction_set="avx2",
    )
    return msgspec.structs.replace(plain, **changes)


def make_member(instance_id: str, **changes: object) -> wire.Member:
    plain = wire.Member(
        instance_id=instance_id,
        incarnation=secrets.token_hex(8),
        peer_host="127.0.0.1",
        peer_port=8200,
        admin_port=8500,
        transports=("tcp",),
        format=make_format(),
        slots=1000,
        version="0.1.0",
    )
    return msgspec.structs.replace(plain, **changes)


def make_keys(number: int, salt: str = "") -> list[bytes]:
    return [f"{salt}{index}".encode().rjust(36, b"\0") for index in range(number)]
