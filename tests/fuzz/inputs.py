"""What strangers may send: noise, msgpack that means nothing, and valid messages with something changed."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from hypothesis import strategies as st

from kvmesh.wire.framing import pack_frame

_SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.sampled_from([0, 1, -1, 2**31, 2**32, 2**53, 2**63 - 1, 2**64 - 1])
    | st.floats()
    | st.binary(max_size=50)
    | st.text(max_size=20)
    | st.sampled_from(["0" * 16, "f" * 32, b"k" * 36, b"", ""])
)
values = st.recursive(
    _SCALARS, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)


def tagged(*kinds: type) -> st.SearchStrategy[bytes]:
    """Messages with a known tag and any fields."""
    tags = st.sampled_from([kind.__name__ for kind in kinds])
    return st.builds(lambda tag, rest: msgspec.msgpack.encode([tag, *rest]), tags, st.lists(values, max_size=12))


def tagged_maps(*kinds: type) -> st.SearchStrategy[bytes]:
    """The same for messages that are maps, with fields of theirs and others."""

    def make(kind: type, fields: dict[str, object]) -> bytes:
        return msgspec.msgpack.encode({"type": kind.__name__, **fields})

    names = sorted({name for kind in kinds for name in getattr(kind, "__struct_fields__", ())})
    fields = st.dictionaries(st.sampled_from(names) | st.text(max_size=8), values, max_size=5)
    return st.builds(make, st.sampled_from(kinds), fields)


def nested() -> st.SearchStrategy[bytes]:
    """Lists in lists in lists, bare or behind a tag."""
    heads = st.sampled_from([b"", b"\x92\xa6GiveUp", b"\x94\xa5Leave\xa1a\xb00000000000000000", b"\x93\xa4Ping\x01"])
    return st.builds(lambda head, depth: head + b"\x91" * depth + b"\x90", heads, st.sampled_from([1, 50, 900, 50_000]))


@st.composite
def changed(draw: st.DrawFn, originals: Sequence[bytes]) -> bytes:
    """One of the originals with up to five changes: bytes flipped, cut out, repeated, inserted, or the end cut off."""
    data = bytearray(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(1, 5))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        kind = draw(st.sampled_from(["flip", "cut", "repeat", "insert", "end"]))
        if kind == "flip" and data:
            data[at] ^= draw(st.integers(1, 255))
        elif kind == "cut":
            del data[at : at + draw(st.integers(1, 16))]
        elif kind == "repeat":
            data[at:at] = data[at : at + draw(st.integers(1, 64))]
        elif kind == "insert":
            data[at:at] = draw(st.binary(max_size=16))
        else:
            del data[at:]
    return bytes(data)


def hostile(kinds: Sequence[type], originals: Sequence[bytes]) -> st.SearchStrategy[bytes]:
    """Any of these as the payload of a message."""
    return st.binary(max_size=200) | tagged(*kinds) | nested() | changed(originals)


def frames(payloads: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """A stream: payloads in frames, sometimes with a length that lies or noise in between."""
    framed = payloads.filter(bool).map(pack_frame)
    lying = st.builds(
        lambda length, payload: length.to_bytes(4, "little") + payload, st.integers(0, 2**32 - 1), payloads
    )
    return st.lists(framed | lying | st.binary(max_size=20), max_size=6).map(b"".join)
