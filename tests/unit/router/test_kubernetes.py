"""How the router asks an API server that fails in unusual ways."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from aiohttp import web

from kvmesh.router import kubernetes
from kvmesh.router.kubernetes import KubernetesAccess, KubernetesDiscovery
from kvmesh.router.metrics import RouterMetrics

PAUSES = 6
LIST = {"metadata": {"resourceVersion": "7"}, "items": []}


@pytest.mark.parametrize("status", [200, 403], ids=["ends at once", "refused"])
async def test_a_watch_that_fails_each_time_is_tried_ever_more_slowly(
    status: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Lists go well all the while, which says nothing about watches; the log says it once."""
    asked = 0

    async def answer(request: web.BaseRequest) -> web.Response:
        nonlocal asked
        asked += 1
        if asked > 10 * PAUSES:
            enough.set()
        return web.json_response(LIST) if "watch" not in request.query else web.Response(status=status)

    pauses: list[float] = []
    enough = asyncio.Event()

    class Waits:
        """`asyncio` with a sleep that only counts."""

        def __getattr__(self, name: str) -> object:
            return getattr(asyncio, name)

        async def sleep(self, seconds: float) -> None:
            pauses.append(seconds)
            if len(pauses) >= PAUSES:
                enough.set()
                await asyncio.Event().wait()

    runner = web.ServerRunner(web.Server(answer), handle_signals=False)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]
    monkeypatch.setattr(kubernetes, "asyncio", Waits())
    access = KubernetesAccess(f"http://{host}:{port}", "default", Path("/nowhere"))
    discovery = KubernetesDiscovery(access, selector="app=x", port="8000", metrics=RouterMetrics("roundrobin"))
    running = asyncio.create_task(discovery.run(lambda backends: None))
    try:
        await asyncio.wait_for(enough.wait(), 20)
    finally:
        running.cancel()
        await asyncio.wait((running,))
        await runner.cleanup()
    assert len(pauses) == PAUSES, "the API server is asked without a pause"
    assert pauses[-1] > 4 * pauses[0]
    assert caplog.text.count("API server fails") == 1
