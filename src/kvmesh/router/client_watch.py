"""Clients that stop reading: their requests are ended, because the engine would keep its place for them for ever."""

from __future__ import annotations

import asyncio
import logging

from aiohttp import web

log = logging.getLogger("kvmesh.router")


class ClientWatch:
    """Watches one answer: a part that its client has not taken for `seconds` (up to twice that) ends the connection.

    One timer per answer, not one per part. The server cancels the request's handler when its connection is gone.
    """

    __slots__ = ("_handle", "_is_writing", "_loop", "_parts", "_request", "_seconds", "_seen_parts")

    def __init__(self, request: web.BaseRequest, seconds: float) -> None:
        self._request = request
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()
        self._is_writing = False
        self._parts = 0
        self._seen_parts = 0
        self._handle = self._loop.call_later(seconds, self._look)

    def writes(self) -> None:
        """A part is being written."""
        self._is_writing = True
        self._parts += 1

    def has_written(self) -> None:
        """The client, or the kernel for it, has taken it."""
        self._is_writing = False

    def end(self) -> None:
        """The answer is over."""
        self._handle.cancel()

    def _look(self) -> None:
        if self._is_writing and self._parts == self._seen_parts and self._request.transport is not None:
            log.warning("client has stopped reading client=%s", self._request.remote)
            self._request.transport.abort()
            return
        self._seen_parts = self._parts
        self._handle = self._loop.call_later(self._seconds, self._look)
