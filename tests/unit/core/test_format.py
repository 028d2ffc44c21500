"""Formats: equal exactly when every field is, and the differing field is named."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from kvmesh.core.format import Format, differences

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
