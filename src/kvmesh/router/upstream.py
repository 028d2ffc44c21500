"""Connections to backends: send one request, hand out the answer as it comes.

HTTP/1.1 is read by llhttp (through httptools, the parser that uvicorn uses); this file keeps the connections. A general
client does many things that a proxy must not do (cookies, redirects, decompression), and doing them costs more than all
the rest of the router: `kvmesh bench router` shows it. One event loop owns everything here.

Connections are kept for the next request for IDLE_S, less than the five seconds after which uvicorn closes them. If a
kept connection turns out to be closed before the first byte of an answer, the request is sent again on a new one; this
is why only requests that may be repeated use kept connections.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Literal, NamedTuple, cast

import httptools

from kvmesh.router.backends import Backend

IDLE_S = 3.0
MAX_IDLE = 512
"""Kept connections per backend."""
MAX_HEAD_BYTES = 64 * 1024
"""Of an answer's headers."""
BUFFER_BYTES = 256 * 1024
"""Of an answer that its reader has not taken; beyond it the backend has to wait."""

Header = tuple[bytes, bytes]
Failure = Literal["connect", "closed", "timeout", "malformed"]


class UpstreamError(Exception):
    """The conversation with a backend ended early.

    `failure` is what happened; `was_seen` says that the backend may have got the request.
    """

    def __init__(self, failure: Failure, text: str) -> None:
        super().__init__(text)
        self.failure: Failure = failure
        self.was_seen = failure != "connect"


class Head(NamedTuple):
    """Beginning of an answer."""

    status: int
    reason: str
    headers: list[Header]
    """Names in lower case."""


class UpstreamStatistics(NamedTuple):
    """Counters since the start."""

    opened: int
    reused: int
    stale: int
    idle: int


class Upstream:
    """All connections, by backend."""

    def __init__(self, *, connect_timeout_s: float) -> None:
        self._connect_timeout_s = connect_timeout_s
        self._idle: dict[str, deque[_Connection]] = {}
        self._opened = self._reused = self._stale = 0

    def statistics(self) -> UpstreamStatistics:
        idle = sum(len(connections) for connections in self._idle.values())
        return UpstreamStatistics(self._opened, self._reused, self._stale, idle)

    async def send(
        self,
        backend: Backend,
        method: str,
        target: str,
        headers: bytes,
        body: bytes,
        *,
        timeout_s: float,
        repeatable: bool,
    ) -> Answer:
        """Send a request and wait for the head of its answer.

        Args:
            backend: to whom.
            method: in upper case.
            target: path and query, quoted.
            headers: lines with their ends, without Host, Content-Length and those that belong to a connection.
            body: all of it.
            timeout_s: until the answer's head is there.
            repeatable: may be sent twice.

        Raises:
            UpstreamError: no answer. Cancelling closes the connection, which ends the request at the backend.
        """
        framing = b"Content-Length: %d\r\n" % len(body) if body or method in {"POST", "PUT", "PATCH"} else b""
        head = b"%b %b HTTP/1.1\r\nHost: %b\r\n%b%b\r\n" % (
            method.encode(),
            target.encode(),
            backend.address.encode(),
            headers,
            framing,
        )
        kept = self._take(backend.id) if repeatable else None
        if kept is not None:
            try:
                self._reused += 1
                return await self._ask(kept, head, body, method, timeout_s)
            except UpstreamError as error:
                if error.failure != "closed" or kept.has_answered:
                    raise
                self._stale += 1
        try:
            connection = await self._connect(backend)
        except UpstreamError as error:
            error.was_seen = kept is not None
            raise
        return await self._ask(connection, head, body, method, timeout_s)

    def forget(self, backend_id: str) -> None:
        """Close the backend's kept connections. Answers under way go on, and their connections end with them."""
        for connection in self._idle.pop(backend_id, ()):
            connection.abort()

    async def close(self) -> None:
        for backend_id in list(self._idle):
            self.forget(backend_id)

    def keep(self, connection: _Connection) -> None:
        """Take back a connection whose answer has been read to its end."""
        idle = self._idle.setdefault(connection.backend_id, deque())
        if len(idle) >= MAX_IDLE or not connection.rest(IDLE_S, self._drop):
            connection.abort()
            return
        idle.append(connection)

    async def _ask(self, connection: _Connection, head: bytes, body: bytes, method: str, timeout_s: float) -> Answer:
        try:
            return Answer(self, connection, await connection.ask(head, body, method == "HEAD", timeout_s))
        except BaseException:
            connection.abort()
            raise

    def _take(self, backend_id: str) -> _Connection | None:
        idle = self._idle.get(backend_id)
        while idle:
            connection = idle.pop()
            if connection.wake():
                return connection
        return None

    def _drop(self, connection: _Connection) -> None:
        """A kept connection has rested long enough, or its other end has closed it."""
        idle = self._idle.get(connection.backend_id)
        if idle is not None:
            try:
                idle.remove(connection)
            except ValueError:
                return
            if not idle:
                del self._idle[connection.backend_id]

    async def _connect(self, backend: Backend) -> _Connection:
        loop = asyncio.get_running_loop()
        try:
            _, connection = await asyncio.wait_for(
                loop.create_connection(lambda: _Connection(loop, backend), backend.host, backend.port),
                self._connect_timeout_s,
            )
        except asyncio.TimeoutError:
            text = f"no connection to {backend.label} within {self._connect_timeout_s:g} s"
            raise UpstreamError("connect", text) from None
        except OSError as error:
            raise UpstreamError("connect", f"no connection to {backend.label}: {error}") from None
        self._opened += 1
        return connection


class Answer:
    """A backend's answer. Must be closed; closing one that is not at its end ends the request at the backend."""

    def __init__(self, upstream: Upstream, connection: _Connection, head: Head) -> None:
        self._upstream = upstream
        self._connection: _Connection | None = connection
        self.head = head

    async def read(self, timeout_s: float) -> bytes:
        """What has come, at least one byte; nothing at the end. Raises UpstreamError when it breaks off."""
        assert self._connection is not None
        return await self._connection.read(timeout_s)

    @property
    def at_end(self) -> bool:
        """Whether everything has been read; False where that is not known yet."""
        return self._connection is not None and self._connection.at_end

    def close(self) -> None:
        """May be called more than once."""
        connection, self._connection = self._connection, None
        if connection is None:
            return
        if connection.is_reusable:
            self._upstream.keep(connection)
        else:
            connection.abort()


class _Connection(asyncio.Protocol):
    """One connection: one request at a time."""

    def __init__(self, loop: asyncio.AbstractEventLoop, backend: Backend) -> None:
        self._loop = loop
        self.backend_id = backend.id
        self._label = backend.label
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser = httptools.HttpResponseParser(self)
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._on_rest_over: Callable[[_Connection], None] | None = None
        self._error: UpstreamError | None = None
        self._reset(is_head=False)
        self._busy = False

    def _reset(self, *, is_head: bool) -> None:
        self._is_head = is_head
        self._head: Head | None = None
        self._reason = b""
        self._headers: list[Header] = []
        self._head_bytes = 0
        self._chunks: list[bytes] = []
        self._buffered_bytes = 0
        self._paused = False
        self._complete = False
        self._until_close = False
        self._keep_alive = False
        self.has_answered = False
        """Whether any byte of an answer has come."""

    # -- what the owner calls ------------------------------------------------------------------------------------------

    async def ask(self, head: bytes, body: bytes, is_head: bool, timeout_s: float) -> Head:
        """Send a request and wait for the head of its answer."""
        self._reset(is_head=is_head)
        self._busy = True
        transport = self._transport
        if self._error is not None or transport is None:
            raise self._error or UpstreamError("closed", f"{self._label} closed the connection")
        if len(body) < 65536:
            transport.write(head + body)
        else:
            transport.write(head)
            transport.write(body)
        while self._head is None:
            await self._wait(timeout_s)
        return self._head

    async def read(self, timeout_s: float) -> bytes:
        """See Answer.read."""
        while not self._chunks:
            if self._complete:
                return b""
            await self._wait(timeout_s)
        data = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        self._chunks = []
        self._buffered_bytes = 0
        if self._paused and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()
        return data

    @property
    def at_end(self) -> bool:
        return self._complete and not self._chunks

    @property
    def is_reusable(self) -> bool:
        return self.at_end and self._keep_alive and self._error is None

    def rest(self, seconds: float, on_over: Callable[[_Connection], None]) -> bool:
        """Wait for the next request, for so long. False when the connection is closed already."""
        if self._error is not None or self._transport is None or self._transport.is_closing():
            return False
        self._busy = False
        self._on_rest_over = on_over
        self._timer = self._loop.call_later(seconds, self._rest_is_over)
        return True

    def wake(self) -> bool:
        """The rest ends because a request is there. False when the connection is closed."""
        self._on_rest_over = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        return self._error is None and self._transport is not None and not self._transport.is_closing()

    def abort(self) -> None:
        """Close at once. May be called more than once."""
        self.wake()
        self._fail("closed", "connection aborted")
        if self._transport is not None:
            self._transport.abort()

    async def _wait(self, timeout_s: float) -> None:
        if self._error is not None:
            raise self._error
        waiter = self._waiter = self._loop.create_future()
        timer = self._loop.call_later(
            timeout_s, self._fail, "timeout", f"{self._label} sent nothing for {timeout_s:g} s"
        )
        try:
            await waiter
        finally:
            timer.cancel()
            self._waiter = None

    def _wake_waiter(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _fail(self, failure: Failure, text: str) -> None:
        if self._error is None:
            self._error = UpstreamError(failure, text)
            self._wake_waiter()

    def _rest_is_over(self) -> None:
        on_over, self._on_rest_over = self._on_rest_over, None
        self._timer = None
        if on_over is not None:
            on_over(self)
        self.abort()

    # -- asyncio.Protocol ----------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by name

    def data_received(self, data: bytes) -> None:
        if self._error is not None:
            return
        if not self._busy:
            self._rest_is_over()  # bytes that nobody has asked for: whose answer they are is anybody's guess
            return
        self.has_answered = True
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._fail("malformed", f"{self._label} sent a malformed answer: {error}")
            self.abort()
            return
        self._wake_waiter()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._head is not None and self._until_close and exc is None:
            self._complete = True  # what has no length ends with the connection
            self._wake_waiter()
        if not self._complete:
            self._fail("closed", f"{self._label} closed the connection" + (f": {exc}" if exc else ""))
        else:
            self._keep_alive = False
        self._transport = None
        if self._on_rest_over is not None:
            self._rest_is_over()

    # -- httptools -----------------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self._complete:
            raise httptools.HttpParserError("two answers to one request")

    def on_status(self, status: bytes) -> None:
        self._reason += status

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._head is not None:
            return  # trailers: nobody asked for them
        self._head_bytes += len(name) + len(value)
        if self._head_bytes > MAX_HEAD_BYTES:
            raise httptools.HttpParserError(f"more than {MAX_HEAD_BYTES} bytes of headers")
        self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if 100 <= status < 200:
            self._reason, self._headers = b"", []  # an interim answer; the real one follows
            return
        self._head = Head(status, self._reason.decode("latin-1"), self._headers)
        names = [name for name, _ in self._headers]
        has_no_body = self._is_head or status in {204, 304}
        self._until_close = not has_no_body and b"content-length" not in names and b"transfer-encoding" not in names
        self._keep_alive = self._parser.should_keep_alive() and not self._until_close and not self._is_head
        if self._is_head:
            self._complete = True  # the parser would wait for the body that Content-Length tells of

    def on_body(self, body: bytes) -> None:
        if self._is_head:
            return
        self._chunks.append(body)
        self._buffered_bytes += len(body)
        if self._buffered_bytes > BUFFER_BYTES and not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()

    def on_message_complete(self) -> None:
        if self._head is not None:
            self._complete = True
