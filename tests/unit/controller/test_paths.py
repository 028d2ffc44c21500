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
        ("/operations", True),
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
    app = KnownPaths(framework, endpoints=["GET /healthz"], may_open=lambda: True)
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://controller") as client:
        answer = await client.get(path)
    assert (answer.status_code == httpx.codes.OK) == is_known
    if not is_known:
        assert answer.json()["error"]["hint"] == "known: GET /healthz"


@pytest.mark.parametrize(("path", "status"), [("/", 503), ("/instances", 503), ("/healthz", 200), ("/nothere", 404)])
async def test_a_full_house_is_told_to_pages_only(path, status):
    """With too many pages open, a new one is refused in a sentence; the API goes on."""
    app = KnownPaths(framework, endpoints=["GET /healthz"], may_open=lambda: False)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://controller") as client:
        answer = await client.get(path)
    assert answer.status_code == status
    if status == httpx.codes.SERVICE_UNAVAILABLE:
        assert "Too many pages" in answer.text
        assert answer.headers["Retry-After"]
