r"""Reads the one kind of protobuf that Helm sends: its own release records, Secrets (or ConfigMaps).

Format: the bytes `k8s\0`, a runtime.Unknown (1: TypeMeta, 2: the object's bytes), in it the object (1: ObjectMeta,
2: data, 3: type). https://kubernetes.io/docs/reference/using-api/api-concepts/#protobuf-encoding
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

MAGIC = b"k8s\x00"
_METADATA = {1: "name", 2: "generateName", 3: "namespace", 5: "uid", 6: "resourceVersion"}
_LABELS, _ANNOTATIONS = 11, 12


def decode(body: bytes) -> dict[str, Any]:
    """The object as it would look in JSON. Raises ValueError for what is not of the form above."""
    if not body.startswith(MAGIC):
        raise ValueError("no protobuf of Kubernetes")
    envelope = dict(_fields(body[len(MAGIC) :]))
    types = {number: value.decode() for number, value in _fields(envelope[1])}
    found: dict[str, Any] = {"apiVersion": types[1], "kind": types[2], "metadata": {}}
    data = {}
    for number, value in _fields(envelope[2]):
        if number == 1:
            found["metadata"] = _metadata(value)
        elif number == 2:
            key, content = _pair(value)
            data[key] = base64.b64encode(content).decode() if types[2] == "Secret" else content.decode()
        elif number == 3 and types[2] == "Secret":
            found["type"] = value.decode()
    return {**found, "data": data}


def _metadata(body: bytes) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for number, value in _fields(body):
        if number in _METADATA and value:
            found[_METADATA[number]] = value.decode()
        elif number in {_LABELS, _ANNOTATIONS}:
            key, content = _pair(value)
            found.setdefault("labels" if number == _LABELS else "annotations", {})[key] = content.decode()
    return found


def _pair(body: bytes) -> tuple[str, bytes]:
    parts = dict(_fields(body))
    return parts[1].decode(), parts.get(2, b"")


def _fields(body: bytes) -> Iterator[tuple[int, bytes]]:
    """Field number and bytes; numbers (wire type 0) are passed over, since none of them matters here."""
    at = 0
    while at < len(body):
        tag, at = _varint(body, at)
        if tag & 7 == 0:
            _, at = _varint(body, at)
        elif tag & 7 == 2:
            length, at = _varint(body, at)
            yield tag >> 3, body[at : at + length]
            at += length
        else:
            raise ValueError(f"wire type {tag & 7}")


def _varint(body: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = body[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at
