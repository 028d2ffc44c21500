"""From the threads of the peer server to the node's event loop."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

R = TypeVar("R")


class NotAnsweredError(Exception):
    """The loop had no answer; the text says why."""


class Bridge:
    """Runs coroutines on the loop on which `start` was called, for threads that wait for them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._running: set[concurrent.futures.Future[Any]] = set()
        self._closed = False

    def start(self) -> None:
        """From now on there is somebody to ask. Called on the loop."""
        self._loop = asyncio.get_running_loop()

    def close(self) -> None:
        """Let go of all threads that wait: the loop is about to wait for them. From any thread."""
        with self._lock:
            self._closed = True
            running = list(self._running)
        for work in running:
            work.cancel()

    def run(self, make: Callable[[], Coroutine[Any, Any, R]], timeout_s: float) -> R:
        """The result of the coroutine that `make` makes. Raises NotAnsweredError, and what the coroutine raises."""
        with self._lock:
            if self._loop is None:
                raise NotAnsweredError("this node is starting")
            if self._closed:
                raise NotAnsweredError("this node is ending")
            running = asyncio.run_coroutine_threadsafe(make(), self._loop)
            self._running.add(running)
        try:
            return running.result(timeout_s)
        except concurrent.futures.TimeoutError:
            running.cancel()
            raise NotAnsweredError(f"not within {timeout_s:g} s") from None
        except concurrent.futures.CancelledError:
            raise NotAnsweredError("this node is ending") from None
        finally:
            with self._lock:
                self._running.discard(running)
