"""Answers of the router's own, in the form that OpenAI's clients read: `{"error": {message, type, param, code}}`."""

from __future__ import annotations

import msgspec
from aiohttp import web


class RouterError(Exception):
    """Ends a request with an answer of the router's own.

    Args:
        status: HTTP status.
        code: what is wrong, in one word: for programs, and for the metric.
        message: what is wrong and what to do, for people.
        retry_after_s: tells the client when to come again; None: not.
    """

    def __init__(self, status: int, code: str, message: str, *, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.retry_after_s = retry_after_s

    def body(self) -> bytes:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": self.message, "type": kind, "param": None, "code": self.code}
        return msgspec.json.encode({"error": error})

    def event(self) -> bytes:
        """The same inside a stream of events that has begun."""
        return b"data: " + self.body() + b"\n\n"

    def response(self, request_id: str) -> web.Response:
        headers = {"X-Request-Id": request_id, "Server": "kvmesh-router"}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(self.retry_after_s)
        return web.Response(
            status=self.status, body=self.body(), content_type="application/json", charset="utf-8", headers=headers
        )


def json_response(value: object, status: int = 200) -> web.Response:
    """Anything as JSON."""
    return web.Response(
        status=status,
        body=msgspec.json.encode(value),
        content_type="application/json",
        headers={"Server": "kvmesh-router"},
    )
