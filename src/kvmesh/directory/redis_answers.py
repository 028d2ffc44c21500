"""Answers of Redis as redis-py gives them, made into what we work with. Pure; what has another shape is left out."""

from __future__ import annotations

from collections.abc import Iterable


def streams(answer: object) -> Iterable[tuple[bytes, object]]:
    """Name and entries of each stream of an XREAD; nothing when time was up."""
    if isinstance(answer, dict):
        yield from answer.items()
    elif isinstance(answer, list):
        for item in answer:
            if isinstance(item, (list, tuple)) and len(item) == 2 and isinstance(item[0], bytes):
                yield item[0], item[1]


def entries(answer: object) -> Iterable[tuple[str, dict[bytes, bytes]]]:
    """Id and fields of each entry of a stream; entries of another shape are left out."""
    if not isinstance(answer, list):
        return
    for item in answer:
        if not isinstance(item, (list, tuple)) or len(item) != 2 or not isinstance(item[0], bytes):
            continue
        yield item[0].decode("ascii", "replace"), dict(pairs(item[1]))


def pairs(answer: object) -> Iterable[tuple[bytes, bytes]]:
    """Fields and values of a hash or an entry, whichever shape redis-py gives it."""
    if isinstance(answer, dict):
        found: Iterable[tuple[object, object]] = answer.items()
    elif isinstance(answer, (list, tuple)):
        found = zip(answer[::2], answer[1::2], strict=False)
    else:
        return
    for name, value in found:
        if isinstance(name, bytes) and isinstance(value, bytes):
            yield name, value
