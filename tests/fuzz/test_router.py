"""Backends that answer anything: an answer or an UpstreamError, and never a wait without end."""

from __future__ import annotations

import asyncio

import hypothesis.strategies as st
from hypothesis import given

from fuzz.effort import fuzz
from kvmesh.router.backends import Backend
from kvmesh.router.upstream import Upstream, UpstreamError

LINES = st.sampled_from(
    [
        b"HTTP/1.1 200 OK\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n",
        b"HTTP/1.0 204 \r\n",
        b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
        b"Content-Length: 3\r\n",
        b"Content-Length: 99999999999999999999\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"Connection: close\r\n",
        b"\r\n",
        b"abc",
        b"3\r\nabc\r\n",
        b"0\r\n\r\n",
        b"X: " + b"y" * 70_000 + b"\r\n",
    ]
)
ANSWERS = st.lists(LINES | st.binary(max_size=30), max_size=8)


async def talk(answers: list[list[bytes]]) -> None:
    """Two requests to a server that sends these pieces for each connection, then closes."""
    connections = iter(answers)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.read(1)
            for piece in next(connections, []):
                writer.write(piece)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    backend = Backend("b", "b", "127.0.0.1", server.sockets[0].getsockname()[1])
    upstream = Upstream(connect_timeout_s=5.0)
    try:
        for method in ("POST", "GET", "HEAD"):
            try:
                answer = await upstream.send(backend, method, "/x", b"", b"{}", timeout_s=5.0, repeatable=True)
            except UpstreamError:
                continue
            try:
                while await answer.read(5.0):
                    pass
            except UpstreamError:
                pass
            finally:
                answer.close()
    finally:
        await upstream.close()
        server.close()
        await server.wait_closed()


@fuzz(60)
@given(st.lists(ANSWERS, min_size=1, max_size=4))
def test_backends_may_say_anything(answers: list[list[bytes]]) -> None:
    """Within the time-out, in whatever state the connection was kept."""
    asyncio.run(asyncio.wait_for(talk(answers), 30))
