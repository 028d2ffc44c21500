"""The admin port's one call that changes something, for clusters without a controller.

    POST /api/v1/drain    {"hand_over": 6000, "timeout_s": 60, "leave": true}    answered when it is done

Needs the cluster's token, as the controller's operations do; without a cluster key, a caller on this machine. Runs on
the node's event loop.
"""

from __future__ import annotations

import asyncio
import hmac
from http import HTTPStatus
from typing import TYPE_CHECKING, Annotated

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from kvmesh.config.values import is_loopback
from kvmesh.node.drain import Drained
from kvmesh.wire.control import ControlError
from kvmesh.wire.operations import MAX_HOT

if TYPE_CHECKING:
    from kvmesh.node.process import Node

MAX_BODY_BYTES = 4096
_encoder = msgspec.json.Encoder()


class DrainRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is asked for."""

    hand_over: Annotated[int, Meta(ge=0, le=MAX_HOT)] = MAX_HOT
    """At most so many chunks, hottest first, that nobody else holds."""
    timeout_s: Annotated[float, Meta(ge=1, le=3600)] = 60.0
    leave: bool = True
    """False: stay a member that shares nothing."""


def routes(node: Node) -> list[Route]:
    """For the admin application."""
    running: set[asyncio.Task[Drained]] = set()

    async def drain(request: Request) -> Response:
        refusal = _refusal(node, request)
        if refusal is not None:
            return refusal
        try:
            asked = msgspec.json.decode(await _body(request), type=DrainRequest)
        except ValueError as error:  # msgspec's errors are ValueErrors
            return _error(HTTPStatus.UNPROCESSABLE_ENTITY, "bad_request", str(error), "see docs/operations.md")
        work = node.drain.run(hand_over=asked.hand_over, timeout_s=asked.timeout_s, leave=asked.leave)
        task = asyncio.create_task(work)  # goes on when the caller does not wait for it
        running.add(task)
        task.add_done_callback(running.discard)
        try:
            return Response(_encoder.encode(await asyncio.shield(task)), media_type="application/json")
        except ControlError as error:
            return _error(HTTPStatus.CONFLICT, error.code, error.text, "kvmesh status shows who is there")

    return [Route("/api/v1/drain", drain, methods=["POST"])]


def _refusal(node: Node, request: Request) -> Response | None:
    """Why this caller may not change anything; None when it may."""
    key = node.cluster_key
    if key is not None:
        given = request.headers.get("authorization", "")
        if hmac.compare_digest(given.encode(), f"Bearer {key.http_token()}".encode()):
            return None
        hint = (
            "send the token of the cluster's key: kvmesh ops drain does, with --cluster-key-file or KVMESH_CLUSTER_KEY"
        )
        return _error(HTTPStatus.UNAUTHORIZED, "unauthorized", "the cluster's token is needed", hint)
    client = request.client.host if request.client is not None else ""
    if (
        is_loopback(client)
        and is_loopback((request.url.hostname or "").strip("[]"))
        and "origin" not in request.headers
    ):
        return None
    hint = "call from the node's own machine by http://127.0.0.1, or give the cluster a key and send its token"
    return _error(
        HTTPStatus.FORBIDDEN,
        "writes_need_loopback",
        "without a cluster key only this machine may change something",
        hint,
    )


async def _body(request: Request) -> bytes:
    """Raises ValueError for more than a drain can have to say."""
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_BODY_BYTES:
            raise ValueError(f"more than {MAX_BODY_BYTES} bytes")
    return body or b"{}"


def _error(status: HTTPStatus, code: str, message: str, hint: str) -> Response:
    content = {"error": {"code": code, "message": message, "hint": hint}}
    return Response(_encoder.encode(content), status_code=status, media_type="application/json")
