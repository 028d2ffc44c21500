"""What clients connect to: limits, the router's own paths, and errors in OpenAI's form.

Own paths; everything else goes to a backend:

    GET /healthz          the router lives
    GET /readyz, /health  200 while at least one backend may get requests, otherwise 503
    GET /metrics          Prometheus
    GET /v1/models        what all backends serve
    GET /kvmesh/backends  who they are, and why one gets no requests
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from aiohttp import web
from aiohttp.web_protocol import RequestHandler
from prometheus_client import CONTENT_TYPE_LATEST

from kvmesh import __version__
from kvmesh.router.answers import RouterError, json_response
from kvmesh.router.backends import BackendState, Fleet
from kvmesh.router.headers import REQUEST_ID, request_id_of
from kvmesh.router.metrics import RouterMetrics
from kvmesh.router.models import ModelList
from kvmesh.router.proxy import Proxy
from kvmesh.router.request import read_facts

log = logging.getLogger("kvmesh.router")

Handler = Callable[[web.BaseRequest, str], Awaitable[web.StreamResponse]]


@dataclass(frozen=True)
class AppSettings:
    """The part of RouterConfig that is needed here."""

    max_requests: int
    max_connections: int
    max_body_bytes: int
    max_buffered_bytes: int
    body_timeout_s: float
    keepalive_s: float
    session_header: str


class App:
    """The application: one call per request."""

    def __init__(
        self, settings: AppSettings, fleet: Fleet, proxy: Proxy, models: ModelList, metrics: RouterMetrics
    ) -> None:
        self._settings = settings
        self._fleet = fleet
        self._proxy = proxy
        self._models = models
        self._metrics = metrics
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._own: Mapping[str, Handler] = {
            "/healthz": self._healthz,
            "/readyz": self._readyz,
            "/health": self._readyz,
            "/metrics": self._render_metrics,
            "/v1/models": self._list_models,
            "/kvmesh/backends": self._list_backends,
        }

    def server(self) -> web.Server:
        """The HTTP server, to be bound by whoever runs it."""
        # The lowest layer of aiohttp's server: the router has no use for its routes, middlewares and cookies.
        return _LimitedServer(
            self.handle,
            max_connections=self._settings.max_connections,
            handler_cancellation=True,  # a client that goes away ends its request at the backend
            access_log=None,
            keepalive_timeout=self._settings.keepalive_s,
            lingering_time=1.0,
            auto_decompress=False,
        )

    async def drain(self, timeout_s: float) -> None:
        """Say "not ready", and wait until nothing is under way or time is up."""
        self._draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except asyncio.TimeoutError:
            log.warning("ending with requests under way requests=%d", self._metrics.inflight)

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request, whatever it is."""
        metrics = self._metrics
        request_id = request_id_of(request.headers.get(REQUEST_ID))
        own = self._own.get(request.path) if request.method in {"GET", "HEAD"} else None
        try:
            if own is not None:
                return await own(request, request_id)
            return await self._forward(request, request_id)
        except RouterError as error:
            metrics.errors[error.code] += 1
            metrics.requests["", str(error.status)] += 1
            return error.response(request_id)
        except (asyncio.CancelledError, ConnectionError):
            metrics.client_disconnects += 1
            raise
        except Exception:
            log.exception("request failed by an error of the router request_id=%s", request_id)
            metrics.errors["internal_error"] += 1
            return RouterError(500, "internal_error", "an error of the router; its log says more").response(request_id)

    async def _forward(self, request: web.BaseRequest, request_id: str) -> web.StreamResponse:
        metrics, settings = self._metrics, self._settings
        if metrics.inflight >= settings.max_requests:
            text = f"{settings.max_requests} requests are under way, which is max_requests"
            raise RouterError(503, "too_many_requests", text, retry_after_s=1)
        target = request.path_qs if request.raw_path[:1] != "/" else request.raw_path
        if target[:1] != "/" or "upgrade" in request.headers.get("Connection", "").lower():
            raise RouterError(501, "not_supported", "the router forwards plain HTTP requests; connect to an engine")
        metrics.inflight += 1
        self._idle.clear()
        room = _Room(settings, metrics)
        try:
            room.take(request.content_length or 0)
            body = await self._read_body(request, room)
            facts = read_facts(
                request.method, request.path, request.headers, body, session_header=settings.session_header
            )
            return await self._proxy.forward(request, target, facts, body, request_id)
        finally:
            room.give_back()
            metrics.inflight -= 1
            if not metrics.inflight:
                self._idle.set()

    async def _read_body(self, request: web.BaseRequest, room: _Room) -> bytes:
        if not request.body_exists:
            return b""
        content = request.content
        if content.is_eof():  # small bodies come with their headers
            body = await content.read()
            room.take(len(body))
            return body
        if request.headers.get("Expect", "").lower() == "100-continue":
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")  # curl waits a second for it
            request.writer.output_size = 0  # this was not the answer
        try:
            return await asyncio.wait_for(_collect(request, room), self._settings.body_timeout_s)
        except asyncio.TimeoutError:
            text = f"the body did not come within {self._settings.body_timeout_s:g} s"
            raise RouterError(408, "body_timeout", text) from None
        except ConnectionError:
            raise
        except (web.RequestPayloadError, ValueError) as error:
            raise RouterError(400, "bad_request", f"the body cannot be read: {error}") from None

    # -- own paths -----------------------------------------------------------------------------------------------------

    async def _healthz(self, request: web.BaseRequest, request_id: str) -> web.Response:
        del request, request_id
        return json_response(
            {
                "status": "draining" if self._draining else "ok",
                "version": __version__,
                "policy": self._metrics.policy,
                "backends": len(self._fleet),
                "healthy": self._fleet.healthy(),
                "discovery_connected": self._metrics.discovery_connected,
                "directory_connected": self._metrics.directory_connected,
                "inflight_requests": self._metrics.inflight,
            }
        )

    async def _readyz(self, request: web.BaseRequest, request_id: str) -> web.Response:
        del request, request_id
        healthy = self._fleet.healthy()
        ready = healthy > 0 and not self._draining
        return json_response({"ready": ready, "healthy": healthy, "draining": self._draining}, 200 if ready else 503)

    async def _render_metrics(self, request: web.BaseRequest, request_id: str) -> web.Response:
        del request, request_id
        return web.Response(body=self._metrics.render(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _list_models(self, request: web.BaseRequest, request_id: str) -> web.Response:
        return await self._models.answer(request, request_id)

    async def _list_backends(self, request: web.BaseRequest, request_id: str) -> web.Response:
        del request, request_id
        return json_response({"backends": [_backend_view(state) for state in self._fleet]})


class _Room:
    """One request's share of the memory for bodies."""

    def __init__(self, settings: AppSettings, metrics: RouterMetrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self._taken_bytes = 0

    def take(self, size_bytes: int) -> None:
        """Have room for a body of so many bytes. Raises RouterError when there is none."""
        settings, more_bytes = self._settings, max(0, size_bytes - self._taken_bytes)
        if size_bytes > settings.max_body_bytes:
            text = f"the request's body is longer than {settings.max_body_bytes} bytes (max_body_bytes)"
            raise RouterError(413, "body_too_long", text)
        if self._metrics.buffered_bytes + more_bytes > settings.max_buffered_bytes:
            text = "too many long requests are under way: max_buffered_bytes is reached"
            raise RouterError(503, "too_many_bytes", text, retry_after_s=1)
        self._metrics.buffered_bytes += more_bytes
        self._taken_bytes += more_bytes

    def give_back(self) -> None:
        """The body is not needed any more."""
        self._metrics.buffered_bytes -= self._taken_bytes
        self._taken_bytes = 0


async def _collect(request: web.BaseRequest, room: _Room) -> bytes:
    parts, size_bytes = [], 0
    while part := await request.content.readany():
        size_bytes += len(part)
        room.take(size_bytes)  # one that is sent in chunks does not say how long it will be
        parts.append(part)
    return b"".join(parts)


def _backend_view(state: BackendState) -> dict[str, object]:
    backend = state.backend
    return {
        "id": backend.id,
        "name": backend.name,
        "address": backend.address,
        "healthy": state.healthy,
        "problem": state.problem,
        "models": None if state.models is None else sorted(state.models),
        "inflight_requests": state.load.inflight,
        "waiting_tokens": state.load.waiting_tokens,
        "assigned_requests": state.load.assigned,
    }


class _LimitedServer(web.Server):
    """aiohttp's server, which refuses connections beyond a number instead of running out of descriptors."""

    def __init__(self, handler: Handler0, *, max_connections: int, **options: object) -> None:
        super().__init__(handler, **options)  # type: ignore[arg-type]
        self._max_connections = max_connections
        self.refused = 0

    def connection_made(self, handler: RequestHandler, transport: asyncio.Transport) -> None:
        super().connection_made(handler, transport)
        if len(self._connections) > self._max_connections:
            self.refused += 1
            transport.abort()


Handler0 = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]
