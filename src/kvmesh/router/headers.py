"""Headers on their way through: what belongs to one connection stays there (RFC 9110, 7.6.1). Pure."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable

from multidict import CIMultiDict

from kvmesh.router.upstream import Header

REQUEST_ID = "X-Request-Id"
_HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
_OURS_IN_REQUESTS = _HOP_BY_HOP | {b"host", b"content-length", b"expect", b"x-request-id", b"x-forwarded-for"}
_REQUEST_ID = re.compile(r"[!-~]{1,200}")


def _named_by_connection(headers: Iterable[Header]) -> frozenset[bytes]:
    """Headers that a Connection header declares to be for this connection only."""
    named = [value for name, value in headers if name.lower() == b"connection"]
    return frozenset(part.strip().lower() for value in named for part in value.split(b","))


def request_id_of(given: str | None) -> str:
    """The client's id if it can stand in a header and a log line, otherwise a new one."""
    if given and _REQUEST_ID.fullmatch(given):
        return given
    return secrets.token_hex(16)


def request_lines(headers: Iterable[Header], *, request_id: str, client: str | None, scheme: str) -> bytes:
    """Header lines for a backend, without Host and Content-Length. The API key goes along as it came."""
    listed = list(headers)
    dropped = _OURS_IN_REQUESTS | _named_by_connection(listed)
    lines = [b"%b: %b\r\n" % header for header in listed if header[0].lower() not in dropped]
    forwarded = [value.decode("latin-1") for name, value in listed if name.lower() == b"x-forwarded-for"]
    if client:
        forwarded.append(client)
    lines.append(f"{REQUEST_ID}: {request_id}\r\n".encode("latin-1"))
    if forwarded:
        lines.append(f"X-Forwarded-For: {', '.join(forwarded)}\r\n".encode("latin-1"))
    if not any(name.lower() == b"x-forwarded-proto" for name, _ in listed):
        lines.append(f"X-Forwarded-Proto: {scheme}\r\n".encode())
    return b"".join(lines)


def answer_headers(headers: Iterable[Header], *, request_id: str) -> CIMultiDict[str]:
    """Headers for the client."""
    listed = list(headers)
    dropped = _HOP_BY_HOP | _named_by_connection(listed)
    kept = CIMultiDict(
        (name.decode("latin-1"), value.decode("utf-8", "surrogateescape"))
        for name, value in listed
        if name not in dropped
    )
    kept.setdefault(REQUEST_ID, request_id)
    return kept
