"""Names and values in Redis: what is ours is read, everything else is refused."""

from __future__ import annotations

import contextlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmesh.wire.auth import ClusterKey
from kvmesh.wire.redis_layout import (
    SHARDS,
    Layout,
    RedisValueError,
    Sealer,
    State,
    parse_format_id,
    parse_id,
    parse_incarnation,
    parse_keys,
    parse_number,
    parse_state,
)

FORMAT = "00112233445566778899aabbccddeeff"
_decoder = msgspec.msgpack.Decoder(int)


def test_all_keys_of_a_shard_are_in_one_slot_of_a_cluster() -> None:
    """They share a hash tag; different shards, formats and clusters share nothing."""
    layout = Layout("prod")
    seen = set()
    for shard in layout.shards(FORMAT):
        names = [*shard, shard.published("instance-1")]
        tags = {name.partition("{")[2].partition("}")[0] for name in names}
        assert len(tags) == 1
        assert all(name.startswith("kvmesh:prod:") for name in names)
        seen |= tags
    assert len(seen) == SHARDS
    assert layout.shard_of(FORMAT, "instance-1") in layout.shards(FORMAT)
    assert {layout.shard_of(FORMAT, f"i{number}") for number in range(200)} == set(layout.shards(FORMAT))
    assert set(Layout("other").shards(FORMAT)).isdisjoint(layout.shards(FORMAT))


def test_state() -> None:
    """The one value that the scripts write as text."""
    value = b"0123456789abcdef 1700000000000 42 1 10.0.0.1:8200"
    assert parse_state(value) == State("0123456789abcdef", 1700000000000, 42, True, "10.0.0.1:8200")
    for bad in (b"", value[1:], value + b" more", value.replace(b" 1 ", b" 2 "), value.replace(b"42", b"-1")):
        with pytest.raises(RedisValueError):
            parse_state(bad)


@given(st.binary(max_size=400))
def test_no_bytes_surprise_the_parsers(value: bytes) -> None:
    """Anything is either taken or refused with the one error."""
    for parse in (parse_state, parse_id, parse_incarnation, parse_format_id, parse_number, lambda v: parse_keys([v])):
        with contextlib.suppress(RedisValueError):
            parse(value)  # type: ignore[operator]


def test_sealed_values_are_believed_by_those_with_the_same_key_only() -> None:
    """Another key, no key, another cluster's name and a changed byte are refused; each says which."""
    key = ClusterKey("a key of sixteen bytes")
    ours, plain = Sealer("prod", key), Sealer("prod", None)
    sealed = ours.seal(msgspec.msgpack.encode(7))
    assert ours.open(sealed, _decoder) == 7
    assert plain.open(plain.seal(msgspec.msgpack.encode(7)), _decoder) == 7
    with pytest.raises(RedisValueError, match="another cluster key"):
        Sealer("prod", ClusterKey("another key of sixteen")).open(sealed, _decoder)
    with pytest.raises(RedisValueError, match="another cluster key"):
        Sealer("test", key).open(sealed, _decoder)
    with pytest.raises(RedisValueError, match="this one has none"):
        plain.open(sealed, _decoder)
    with pytest.raises(RedisValueError, match="without the cluster key"):
        ours.open(plain.seal(msgspec.msgpack.encode(7)), _decoder)
    for index in range(1, len(sealed)):
        with pytest.raises(RedisValueError):
            ours.open(sealed[:index] + bytes([sealed[index] ^ 1]) + sealed[index + 1 :], _decoder)


@given(st.one_of(st.none(), st.text(), st.binary(max_size=100)))
def test_values_of_others_are_refused(value: object) -> None:
    """Whatever somebody else has put there is no crash."""
    for sealer in (Sealer("prod", None), Sealer("prod", ClusterKey("a key of sixteen bytes"))):
        with contextlib.suppress(RedisValueError):
            sealer.open(value, _decoder)
