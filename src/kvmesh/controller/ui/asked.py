"""Answers that come from the instances: asked for when a page shows them, shared by all pages, never waited for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Asked(Generic[T]):
    """The last answer to one question. Lives on the controller's loop."""

    def __init__(self, ask: Callable[[], Awaitable[T]], every_s: float) -> None:
        """
        Args:
            ask: gets the answer; errors are kept and shown instead of it.
            every_s: an answer older than this is asked for again when somebody looks.
        """
        self._ask = ask
        self._every_s = every_s
        self._task: asyncio.Task[None] | None = None
        self._due_s = 0.0
        self.error: Exception | None = None
        """Why the last try gave nothing."""
        self.answer: T | None = None

    def look(self) -> T | None:
        """The last answer; None before the first. Asks again when it is time."""
        if self._task is None and time.monotonic() >= self._due_s:
            self._task = asyncio.get_running_loop().create_task(self._renew())
        return self.answer

    def again(self) -> None:
        """Ask at the next look."""
        self._due_s = 0.0

    async def _renew(self) -> None:
        try:
            self.answer = await self._ask()
            self.error = None
        except Exception as error:  # shown to the reader
            self.error = error
        finally:
            self._due_s = time.monotonic() + self._every_s
            self._task = None
