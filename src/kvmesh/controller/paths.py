"""Which paths reach the web page's framework. It makes and keeps a page for every unknown path, whoever asks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import nicegui
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

PAGES = ("/", "/instances", "/instance", "/traffic", "/compatibility", "/explain", "/operations")
_VERSIONED = f"/_nicegui/{nicegui.__version__}"
_FOLDERS = ("static", "libraries", "components", "resources", "dynamic_resources", "esm")
ASSETS = (*(f"{_VERSIONED}/{folder}/" for folder in _FOLDERS), "/_nicegui_ws/", "/favicon.ico")
"""What a page loads, and its live connection."""


class KnownPaths:
    """ASGI middleware: what is neither a call, a page nor an asset is a small 404 that says what there is."""

    def __init__(self, app: ASGIApp, *, endpoints: Sequence[str], may_open: Callable[[], bool]) -> None:
        """
        Args:
            app: what is behind this.
            endpoints: what the application answers itself, as `GET /healthz`; the error names them.
            may_open: whether one more page may be made now.
        """
        self._app = app
        self._may_open = may_open
        self._calls = {endpoint.partition(" ")[2] for endpoint in endpoints}
        self._hint = "known: " + ", ".join(endpoints)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on what is known."""
        path = scope.get("path", "/")
        if scope["type"] == "http" and path in PAGES and not self._may_open():
            text = "Too many pages of this controller are open: close some, and load this one again.\n"
            await PlainTextResponse(text, status_code=503, headers={"Retry-After": "5"})(scope, receive, send)
            return
        if scope["type"] != "http" or path in PAGES or path.startswith(("/api/", *ASSETS)) or path in self._calls:
            await self._app(scope, receive, send)
            return
        error = {"code": "http_error", "message": f"{scope['method']} {path[:200]}: Not Found", "hint": self._hint}
        await JSONResponse({"error": error}, status_code=404)(scope, receive, send)
