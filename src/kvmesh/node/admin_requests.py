"""The admin port's pages on requests: the same as the controller's, for this one instance (`docs/explain.md`).

    GET /explain                 recent requests
    GET /explain/summary         why this instance missed
    GET /explain/{request}       all about one request
    GET /hit-rates               what was found, and what an unlimited pool of its own would have given

Runs on the node's event loop.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from kvmesh.core.advice import advise
from kvmesh.core.usage import Usage
from kvmesh.wire import explain as told

if TYPE_CHECKING:
    from kvmesh.node.process import Node

_encoder = msgspec.json.Encoder()
MAX_MINUTES = 60


def routes(node: Node) -> list[Route]:
    """For the admin application."""
    log = node.requests

    async def recent(request: Request) -> Response:
        limit = _number(request, "limit", 50, low=1, high=told.MAX_RECENT)
        return _answer({"requests": log.recent(int(limit))})

    async def summary(request: Request) -> Response:
        hours = _number(request, "hours", 1.0, low=1 / 60, high=told.MAX_HOURS)
        found = log.summary(hours)
        misses = [
            {**msgspec.to_builtins(share), **advise(share.reason)._asdict()}  # the texts beside the numbers
            for share in found.misses
        ]
        return _answer({**msgspec.to_builtins(found), "misses": misses})

    async def explain(request: Request) -> Response:
        asked = str(request.path_params["request"])
        found = [kept.explanation for kept in log.find(asked[: told.MAX_ID])]
        if not found:
            hint = "GET /explain lists the requests that are remembered: the last 1,000 since the node's start"
            error = {"code": "unknown_request", "message": f"no recent request is named {asked[:256]!r}", "hint": hint}
            return _answer({"error": error}, status=404)
        return _answer({"request": asked, "explanations": found})

    async def hit_rates(request: Request) -> Response:
        seconds = 60 * _number(request, "minutes", 60, low=1, high=MAX_MINUTES)
        recent_usage = log.usage.over(seconds, time.monotonic())
        return _answer(
            {
                "instance_id": node.instance_id,
                "window_s": seconds,
                "recent": _rates(recent_usage),
                "since_start": _rates(log.usage.total),
            }
        )

    return [
        Route("/explain", recent),
        Route("/explain/summary", summary),
        Route("/explain/{request:path}", explain),
        Route("/hit-rates", hit_rates),
    ]


def _rates(usage: Usage) -> dict[str, float | None]:
    """A node knows its own lookups only, so `achievable` is the controller's to tell."""
    return {
        "requests": usage.requests,
        "chunks": usage.chunks,
        "device_chunks": usage.device_chunks,
        "own_chunks": usage.own_chunks,
        "peer_chunks": usage.peer_chunks,
        "achieved": usage.achieved,
        "achievable_alone": 1.0 - min(1.0, usage.new_chunks / usage.chunks) if usage.chunks else None,
    }


def _number(request: Request, name: str, default: float, *, low: float, high: float) -> float:
    """A query parameter, put into its limits; what is no number counts as not given."""
    try:
        given = float(request.query_params.get(name, default))
    except ValueError:
        return default
    return min(max(given, low), high) if given == given else default  # noqa: PLR0124  (not a number is not itself)


def _answer(content: object, status: int = 200) -> Response:
    return Response(_encoder.encode(content), status_code=status, media_type="application/json")
