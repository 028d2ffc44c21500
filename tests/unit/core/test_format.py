"""Formats: equal exactly when every field is, and the differing field is named."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmesh.core.format import Elements, Format, differences, elements_of, int8_group, with_int8

formats = st.builds(
    Format,
    **{
        name: st.sampled_from(["x", "y"]) for name in Format.__struct_fields__ if not name.endswith(("tokens", "bytes"))
    },
    block_tokens=st.sampled_from([16, 128]),
    chunk_tokens=st.sampled_from([256, 512]),
    chunk_bytes=st.sampled_from([4096, 8192]),
)


@given(formats, formats)
def test_the_id_says_whether_anything_differs(ours: Format, theirs: Format) -> None:
    """Equal ids mean no differing field, and the other way round."""
    found = differences(ours, theirs)
    assert (ours.format_id() == theirs.format_id()) == (not found)
    assert [difference.field for difference in found] == [
        name for name in Format.__struct_fields__ if getattr(ours, name) != getattr(theirs, name)
    ]


@given(formats)
def test_formats_survive_the_wire(one: Format) -> None:
    """The id does not depend on who computed it."""
    copy = msgspec.msgpack.decode(msgspec.msgpack.encode(one), type=Format)
    assert copy.format_id() == one.format_id()


@pytest.mark.parametrize(
    ("kv_dtype", "expected"),
    [
        ("bfloat16", Elements("bfloat16", 2)),
        ("auto (model float16)", Elements("float16", 2)),
        ("half", Elements("float16", 2)),
        ("float32 (model bfloat16)", Elements("float32", 4)),
        ("fp8_e4m3 (model bfloat16)", Elements("fp8_e4m3", 1)),
        ("", Elements("", 1)),
    ],
)
def test_the_type_of_the_elements_is_read_off_the_format(kv_dtype: str, expected: Elements) -> None:
    assert elements_of(make(kv_dtype)) == expected


def test_int8_is_another_format_of_the_same_elements() -> None:
    """It is named where nodes and controllers of any version compare."""
    plain = make("bfloat16")
    int8 = with_int8(plain, 64)
    assert [difference.field for difference in differences(plain, int8)] == ["kv_dtype"]
    assert elements_of(int8) == elements_of(plain)
    assert (int8_group(plain), int8_group(int8), int8_group(with_int8(plain, 128))) == (None, 64, 128)
    for kv_format, group in ((make("fp8"), 64), (plain, 0), (plain, 96)):
        with pytest.raises(ValueError, match=r"elements|whole number"):
            with_int8(kv_format, group)


def make(kv_dtype: str) -> Format:
    fields = dict.fromkeys((name for name in Format.__struct_fields__ if not name.endswith(("tokens", "bytes"))), "x")
    return Format(**fields | {"kv_dtype": kv_dtype}, block_tokens=16, chunk_tokens=256, chunk_bytes=4096)
