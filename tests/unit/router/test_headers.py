"""Headers on their way through."""

from __future__ import annotations

import re

from hypothesis import given, settings
from hypothesis import strategies as st

from kvmesh.router.headers import answer_headers, request_id_of, request_lines


def test_hop_by_hop_headers_stay() -> None:
    """Those of the list, those that Connection names, and framing, which is made anew."""
    lines = request_lines(
        [
            (b"Host", b"router"),
            (b"Authorization", b"Bearer k"),
            (b"Connection", b"keep-alive, X-Mine"),
            (b"X-Mine", b"1"),
            (b"Transfer-Encoding", b"chunked"),
            (b"Content-Length", b"7"),
            (b"Upgrade", b"h2c"),
            (b"Proxy-Authorization", b"secret"),
            (b"Cookie", b"a=b"),
        ],
        request_id="id",
        client="10.0.0.1",
        scheme="http",
    )
    names = [line.partition(b":")[0].lower() for line in lines.split(b"\r\n") if line]
    assert names == [b"authorization", b"cookie", b"x-request-id", b"x-forwarded-for", b"x-forwarded-proto"]


def test_answers_keep_what_is_theirs() -> None:
    """Several cookies, the engine's request id where it has one, no connection headers."""
    headers = answer_headers(
        [(b"set-cookie", b"a=1"), (b"set-cookie", b"b=2"), (b"connection", b"close"), (b"content-length", b"3")],
        request_id="ours",
    )
    assert headers.getall("Set-Cookie") == ["a=1", "b=2"]
    assert headers["Content-Length"] == "3"
    assert headers["X-Request-Id"] == "ours"
    assert "Connection" not in headers
    assert answer_headers([(b"x-request-id", b"theirs")], request_id="ours")["X-Request-Id"] == "theirs"


@settings(deadline=None)
@given(st.text(max_size=300))
def test_request_ids_can_stand_in_a_header_and_a_log(given_id: str) -> None:
    """A good one is kept, another one is replaced."""
    kept = request_id_of(given_id)
    assert re.fullmatch(r"[!-~]{1,200}", kept)
    assert kept == given_id or re.fullmatch("[0-9a-f]{32}", kept)
