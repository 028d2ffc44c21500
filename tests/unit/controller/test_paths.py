"""Unknown paths never reach the page's framework, which would make a page for each."""

from __future__ import annotations

import httpx
import nicegui
import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse

from kvmesh.controller.paths import KnownPaths


async def framework(scope, receive, send):
    await PlainTextResponse(f"reached {Request(scope).url.path}")(scope, receive, send)


@pytest.mark.parametrize(
    ("path", "is_known"),
    [
        ("/", True),
        ("/healthz", True),
        ("/api/v1/instances/a", True),
        (f"/_nicegui/{nicegui.__version__}/static/x.js", True),
        ("/favicon.ico", True),
        ("/nothere", False),
        ("/_nicegui/nothere", False),
        ("/index.php", False),
        ("/healthz/more", False),
    ],
)
async def test_only_what_is_known_gets_through(path, is_known):
    app = KnownPaths(framework, endpoints=["GET /healthz"])
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://controller") as client:
        answer = await client.get(path)
    assert (answer.status_code == httpx.codes.OK) == is_known
    if not is_known:
        assert answer.json()["error"]["hint"] == "known: GET /healthz"
