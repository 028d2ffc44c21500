"""From the threads of the peer server to the node's event loop."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

R = TypeVar("R")


class NotAnsweredError(Exception):
    """The loop had no answer in time; the text says why."""


class Bridge:
    """Runs coroutines on the loop on which `start` was called, for threads that wait for them."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """From now on there is somebody to ask. Called on the loop."""
        self._loop = asyncio.get_running_loop()

    def run(self, make: Callable[[], Coroutine[Any, Any, R]], timeout_s: float) -> R:
        """The result of the coroutine that `make` makes. Raises NotAnsweredError, and what the coroutine raises."""
        if self._loop is None:
            raise NotAnsweredError("this node is starting")
        work = make()
        try:
            running = asyncio.run_coroutine_threadsafe(work, self._loop)
        except RuntimeError:  # the loop has ended
            work.close()
            raise NotAnsweredError("this node is ending") from None
        try:
            return running.result(timeout_s)
        except concurrent.futures.TimeoutError:
            running.cancel()
            raise NotAnsweredError(f"not within {timeout_s:g} s") from None
        except concurrent.futures.CancelledError:
            raise NotAnsweredError("this node is ending") from None
