"""What the router does with a request before it looks for an engine: bodies, and the memory they take."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from aiohttp import web

from kvmesh.router.app import App, AppSettings
from kvmesh.router.backends import Fleet
from kvmesh.router.metrics import RouterMetrics
from kvmesh.router.models import ModelList
from kvmesh.router.policies import RoundRobin
from kvmesh.router.proxy import Proxy, ProxySettings
from kvmesh.router.upstream import Upstream

MAX_BUFFERED = 100_000
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"


class Client:
    """A connection to a router without engines."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, metrics: RouterMetrics) -> None:
        self.writer = writer
        self.metrics = metrics
        self._reader = reader

    async def hear(self) -> bytes:
        return await asyncio.wait_for(self._reader.readuntil(b"\r\n\r\n"), 20)


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    metrics, fleet, upstream = RouterMetrics("roundrobin"), Fleet(recent_half_life_s=1.0), Upstream(connect_timeout_s=1)
    settings = ProxySettings(retries=0, first_byte_timeout_s=20, idle_timeout_s=20)
    proxy = Proxy(settings, fleet, RoundRobin(), upstream, metrics, on_failure=lambda state, error: None)
    app = App(
        AppSettings(
            max_requests=8,
            max_connections=8,
            max_body_bytes=10 * MAX_BUFFERED,
            max_buffered_bytes=MAX_BUFFERED,
            body_timeout_s=20,
            keepalive_s=20,
            session_header="x-session-id",
        ),
        fleet,
        proxy,
        ModelList(fleet, upstream),
        metrics,
    )
    runner = web.ServerRunner(app.server(), handle_signals=False)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    reader, writer = await asyncio.open_connection(*runner.addresses[0][:2])
    yield Client(reader, writer, metrics)
    writer.close()
    await runner.cleanup()


async def test_a_body_in_chunks_has_its_share_of_the_memory_while_it_comes(client: Client) -> None:
    """It does not say how long it will be, and may never end."""
    client.writer.write(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
    client.writer.write(b"%x\r\n" % (2 * MAX_BUFFERED) + b"x" * 2 * MAX_BUFFERED)
    assert b" 503 " in await client.hear()
    assert client.metrics.errors["too_many_bytes"] == 1
    assert client.metrics.buffered_bytes == 0


async def test_a_client_that_waits_to_be_told_to_go_on_is_told(client: Client) -> None:
    """Curl waits a second with a long body, others for ever."""
    client.writer.write(HEAD + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n")
    assert await client.hear() == b"HTTP/1.1 100 Continue\r\n\r\n"
    client.writer.write(b"{}")
    assert b" 503 " in await client.hear()
    assert client.metrics.errors["no_backend"] == 1
