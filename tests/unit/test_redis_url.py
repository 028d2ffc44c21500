"""Addresses of a Redis directory."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmesh.config.redis_url import parse_redis_target, parse_redis_url


def test_all_forms() -> None:
    """The second seed's host:port, and every scheme with what belongs to it."""
    assert parse_redis_target("lookup:8100").hosts == (("lookup", 8100),)
    target = parse_redis_target("rediss://me:p%40ss/w@host/3?ca_file=/ca.pem&password_file=/pw")
    assert (target.tls, target.username, target.password, target.database) == (True, "me", "p@ss/w", 3)
    assert (target.hosts, target.ca_file, target.password_file) == ((("host", 6379),), "/ca.pem", "/pw")
    cluster = parse_redis_target("redis+cluster://a:1,b,[::1]:3")
    assert (cluster.kind, cluster.hosts) == ("cluster", (("a", 1), ("b", 6379), ("::1", 3)))
    sentinel = parse_redis_target("redis+sentinel://:pw@a,b:5/mymaster/2")
    assert (sentinel.kind, sentinel.hosts) == ("sentinel", (("a", 26379), ("b", 5)))
    assert (sentinel.service, sentinel.database, sentinel.password) == ("mymaster", 2, "pw")
    assert str(sentinel) == "redis+sentinel://a:26379,b:5/mymaster"
    assert "pw" not in repr(sentinel)


@pytest.mark.parametrize(
    "text",
    [
        "host",
        "http://host:1",
        "redis://",
        "redis://a,b",
        "redis://host:0",
        "redis://host/name",
        "redis+cluster://a/1",
        "redis+sentinel://a",
        "redis://host?ca_file=/x",
        "redis://host?password=x",
        "rediss://host?ca_file=",
        "redis+cluster://a,,b",
        "",
    ],
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ValueError):
        parse_redis_url(text)


@given(st.text(max_size=80))
def test_nothing_surprises_the_parser(text: str) -> None:
    """Any text is an address or a ValueError, and what is taken once is taken again."""
    for candidate in (text, f"redis://{text}", f"redis+sentinel://{text}"):
        with contextlib.suppress(ValueError):
            target = parse_redis_target(candidate)
            assert parse_redis_target(parse_redis_url(candidate)) == target
