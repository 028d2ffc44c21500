"""An engine that does nothing but stream: the backend behind `kvmesh bench router`.

    python -m kvmesh.bench.streaming_engine PORT EVENTS

It answers every POST with EVENTS server-sent events, each in a write of its own, as an engine does that makes one token
after another, and every GET with 200 and an empty list of models. It costs as little as Python can, so that the router
is what is measured.
"""

from __future__ import annotations

import asyncio
import sys
from typing import cast

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
LIST = b'{"object":"list","data":[]}'
GET_ANSWER = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(LIST), LIST)
END = b"0\r\n\r\n"
_EVENT = b'data: {"id":"cmpl-0","object":"text_completion","choices":[{"index":0,"text":" token"}]}\n\n'
EVENT = b"%x\r\n%b\r\n" % (len(_EVENT), _EVENT)


class StreamingEngine(asyncio.Protocol):
    """One connection. Requests come one after another, with a Content-Length."""

    def __init__(self, loop: asyncio.AbstractEventLoop, events: int) -> None:
        self._loop = loop
        self._events = events
        self._left = 0
        self._data = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by name

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self._transport = None

    def data_received(self, data: bytes) -> None:
        self._data += data
        head, separator, body = self._data.partition(b"\r\n\r\n")
        if not separator or self._transport is None:
            return
        if head.startswith(b"GET"):
            self._data = b""
            self._transport.write(GET_ANSWER)
            return
        _, _, length = head.lower().partition(b"content-length:")
        if len(body) < int(length.partition(b"\r\n")[0]):
            return
        self._data = b""
        self._left = self._events
        self._transport.write(HEAD)
        self._loop.call_soon(self._stream)

    def _stream(self) -> None:
        if self._transport is None:
            return
        self._left -= 1
        self._transport.write(EVENT if self._left else EVENT + END)
        if self._left:
            self._loop.call_soon(self._stream)


async def serve(port: int, events: int) -> None:
    """Serve until killed."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: StreamingEngine(loop, events), "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


def main() -> None:
    """Run from the command line."""
    port, events = int(sys.argv[1]), int(sys.argv[2])
    try:
        import uvloop  # noqa: PLC0415 - not on every platform
    except ImportError:
        asyncio.run(serve(port, events))
    else:
        uvloop.run(serve(port, events))


if __name__ == "__main__":
    main()
