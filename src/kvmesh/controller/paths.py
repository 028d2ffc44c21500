"""Which paths reach the web page's framework. It makes a page of 68 KB for every unknown path, whoever asks."""

from __future__ import annotations

from collections.abc import Sequence

import nicegui
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

PAGES = ("/",)
_VERSIONED = f"/_nicegui/{nicegui.__version__}"
_FOLDERS = ("static", "libraries", "components", "resources", "dynamic_resources", "esm")
ASSETS = (*(f"{_VERSIONED}/{folder}/" for folder in _FOLDERS), "/_nicegui_ws/", "/favicon.ico")
"""What a page loads, and its live connection."""


class KnownPaths:
    """ASGI middleware: what is neither a call, a page nor an asset is a small 404 that says what there is."""

    def __init__(self, app: ASGIApp, *, endpoints: Sequence[str]) -> None:
        """`endpoints` are what the application answers itself, as `GET /healthz`; the error names them."""
        self._app = app
        self._calls = {endpoint.partition(" ")[2] for endpoint in endpoints}
        self._hint = "known: " + ", ".join(endpoints)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on what is known."""
        path = scope.get("path", "/")
        if scope["type"] != "http" or path in PAGES or path.startswith(("/api/", *ASSETS)) or path in self._calls:
            await self._app(scope, receive, send)
            return
        error = {"code": "http_error", "message": f"{scope['method']} {path[:200]}: Not Found", "hint": self._hint}
        await JSONResponse({"error": error}, status_code=404)(scope, receive, send)
