"""The controller's HTTP API: health, metrics, and `/api/v1`. `docs/api.md` shows each call.

Handlers run on the loop that owns the registry, so they read it without a lock and never wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated

from fastapi import APIRouter, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from kvmesh import __version__
from kvmesh.controller import request_api, views
from kvmesh.controller.api_operations import operations_router
from kvmesh.controller.errors import ApiError
from kvmesh.controller.feed import Feed
from kvmesh.controller.formats import incompatibilities as incompatibilities_of
from kvmesh.controller.lookups import lookup_keys
from kvmesh.controller.metrics import ControllerMetrics
from kvmesh.controller.operator import Operator
from kvmesh.controller.redis_watch import RedisWatch
from kvmesh.controller.registry import Registry
from kvmesh.controller.selection import find_instance

ENDPOINTS = (
    "GET /healthz",
    "GET /metrics",
    "GET /api/v1/instances",
    "GET /api/v1/instances/{instance_id}",
    "GET /api/v1/incompatibilities",
    "GET /api/v1/refusals",
    "GET /api/v1/lookup",
    "POST /api/v1/lookup",
    "GET /api/v1/chunks/{key}",
    "GET /api/v1/operations",
    "POST /api/v1/operations",
    "GET /api/v1/operations/{operation_id}",
    "DELETE /api/v1/operations/{operation_id}",
    "GET /api/v1/fetches",
    "GET /api/v1/totals",
    *request_api.ENDPOINTS,
    "GET /openapi.json",
)


@dataclass(frozen=True)
class Context:
    """What API and page look at."""

    registry: Registry
    feed: Feed
    clock: Callable[[], float] = time.monotonic
    started_at_s: float = field(default_factory=time.monotonic)
    token: str | None = field(default=None, repr=False)
    """What a request that changes something must show; None without a cluster key."""

    gauges: dict[str, tuple[str, Callable[[], float]]] = field(default_factory=dict, repr=False)
    """What other parts want on /metrics: meaning and value by name."""

    watch: RedisWatch | None = None
    """Reads the directory that is shown from Redis; None when this controller is the directory."""

    @cached_property
    def operator(self) -> Operator:
        """Carries out operations; made when it is first needed."""
        return Operator(self.registry, self.feed.asks, self.clock)

    def health(self) -> views.HealthView:
        """What `/healthz` says."""
        problems = self.feed.problems()
        return views.HealthView(
            status="unhealthy" if problems else "ok",
            incarnation=self.registry.incarnation,
            uptime_s=max(0.0, self.clock() - self.started_at_s),
            instances=len(self.registry.instances),
            problems=problems,
            directory_problem="" if self.watch is None else self.watch.problem,
        )


class ErrorBody(BaseModel):
    """What is wrong, and what to do about it."""

    code: str
    message: str
    hint: str


class ErrorView(BaseModel):
    """Every answer from 400 on."""

    error: ErrorBody


def create_app(context: Context) -> FastAPI:
    """The API as an application. The web page is mounted beside it by `kvmesh.controller.ui`."""
    app = FastAPI(
        title="kvmesh controller",
        version=__version__,
        description="Who is a member of the cluster, and who holds which KV chunks.",
        docs_url=None,  # the usual pages load their scripts from the internet; /openapi.json is all there is to say
        redoc_url=None,
        responses={404: {"model": ErrorView}, 422: {"model": ErrorView}},
    )
    app.add_exception_handler(ApiError, _answer_api_error)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_exception_handler(HTTPException, _answer_http_error)
    metrics = ControllerMetrics(context.registry, context.feed, context.clock, context.gauges)

    @app.get("/healthz", response_model=views.HealthView, responses={503: {"model": views.HealthView}}, tags=["health"])
    async def healthz() -> JSONResponse:
        """200 while everything works; 503 with the problems when a part of the controller has died."""
        health = context.health()
        return JSONResponse(health.model_dump(), status_code=503 if health.problems else 200)

    @app.get("/metrics", tags=["health"], response_class=Response)
    async def prometheus() -> Response:
        """Prometheus metrics, named kvmesh_controller_*."""
        return Response(metrics.render(), media_type=CONTENT_TYPE_LATEST)

    app.include_router(operations_router(context), prefix="/api/v1")
    app.include_router(_version_1(context), prefix="/api/v1")

    @app.api_route("/api/{path:path}", methods=["GET", "POST", "PUT", "PATCH", "DELETE"], include_in_schema=False)
    async def unknown(request: Request) -> None:
        raise ApiError(
            404,
            "unknown_endpoint",
            f"there is no {request.method} {request.url.path}",
            "known: " + ", ".join(ENDPOINTS),
        )

    return app


def _version_1(context: Context) -> APIRouter:
    router = APIRouter(tags=["v1"])
    registry, clock = context.registry, context.clock

    @router.get("/instances", response_model=views.InstancesView)
    async def instances() -> Response:
        """All members with state, pool use, counters and incompatibilities, and who has gone in the last minutes."""
        # Not validated a second time: with a thousand members that would hold everybody up.
        content = views.instances_view(registry, clock()).model_dump_json()
        return Response(content, media_type="application/json")

    @router.get("/instances/{instance_id:path}")
    async def instance(instance_id: str) -> views.InstanceView:
        """One member."""
        return views.instance_view(registry, find_instance(registry, instance_id), clock())

    @router.get("/refusals")
    async def refusals() -> list[views.RefusalView]:
        """Who was turned away in the last minutes, and why: a wrong cluster key, an id that is taken. Newest first."""
        return views.refusal_views(registry, clock())

    @router.get("/incompatibilities")
    async def incompatibilities() -> list[views.IncompatibilityView]:
        """Pairs of members that cannot share KV, with the fields that differ. Those of one model name come first."""
        pairs = sorted(incompatibilities_of(registry.groups), key=lambda pair: not pair.same_model)
        return views.incompatibility_views(pairs)

    @router.get("/lookup")
    async def lookup(
        keys: Annotated[str, Query(description="Chunk keys in hexadecimal, in prefix order, separated by commas.")],
        format_id: Annotated[str | None, Query(description="Only this format.")] = None,
    ) -> views.LookupView:
        """Who holds these chunks, and how long the prefix is that can be fetched."""
        return lookup_keys(registry, [part for part in keys.split(",") if part], format_id)

    @router.get("/fetches")
    async def fetches() -> list[views.FetchView]:
        """The last 200 finished fetches, newest first."""
        now_s = clock()
        return [views.fetch_view(record, now_s) for record in reversed(registry.activity.recent)]

    @router.get("/totals")
    async def totals() -> views.TotalsView:
        """Sums over the cluster."""
        return views.totals_view(registry)

    router.include_router(request_api.make_router(registry, context.feed.asks, clock))

    return router


def _error(status: int, code: str, message: str, hint: str) -> JSONResponse:
    return JSONResponse(ErrorView(error=ErrorBody(code=code, message=message, hint=hint)).model_dump(), status)


def _answer_api_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return _error(error.status, error.code, error.message, error.hint)


def _answer_invalid(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    told = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()[:5])
    return _error(422, "bad_request", told, "GET /openapi.json describes every call")


def _answer_http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return _error(error.status_code, "http_error", message, "known: " + ", ".join(ENDPOINTS))
