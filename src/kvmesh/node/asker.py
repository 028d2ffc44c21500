"""Finds out who holds a chunk by asking the directory (`index_mode: query`). Runs on the node's event loop.

One question for all keys of a request, one round trip. Holders are remembered for a little longer than the engine
believes in a hit, so that the fetch that follows needs no second question.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from kvmesh.core.keys import ChunkKey
from kvmesh.directory.base import DirectoryClient
from kvmesh.logs import LogLimiter

log = logging.getLogger("kvmesh.directory")

REMEMBERED_S = 30.0
MAX_KEYS = 200_000
MAX_QUESTIONS = 256
"""Questions that are out at a time; further ones count as unanswered at once."""


class AskerStatistics(NamedTuple):
    """Counters since the start."""

    questions: int
    asked_chunks: int
    held_chunks: int
    unanswered: int
    """Questions without an answer in time."""
    seconds: float
    """Spent waiting for answers."""


class _Answer(NamedTuple):
    holders: tuple[str, ...]
    until_s: float


class Asker:
    """Answers by key, for a while."""

    def __init__(self, directory: Callable[[], DirectoryClient | None], *, timeout_s: float, own_id: str) -> None:
        """`timeout_s`: longest wait for one answer."""
        self._directory = directory
        self._timeout_s = timeout_s
        self._own_id = own_id
        self._answers: dict[ChunkKey, _Answer] = {}
        self._refused: dict[tuple[str, str, ChunkKey], None] = {}
        """(Instance, incarnation, key) in quarantine."""
        self._out = 0
        self._questions = self._asked = self._held = self._unanswered = 0
        self._seconds = 0.0
        self._limiter = LogLimiter()

    def holders(self, key: bytes) -> tuple[str, ...]:
        """Who was said to hold it, not long ago."""
        answer = self._answers.get(ChunkKey(key))
        return answer.holders if answer is not None and answer.until_s > time.monotonic() else ()

    async def ask(self, keys: Sequence[bytes]) -> set[bytes] | None:
        """Those of `keys` that some other instance holds; None when the directory has not said. Never raises."""
        directory = self._directory()
        if directory is None or self._out >= MAX_QUESTIONS:
            return None
        started_s = time.monotonic()
        self._out += 1
        self._questions += 1
        self._asked += len(keys)
        try:
            found = await asyncio.wait_for(directory.ask(keys), self._timeout_s)
        except (TimeoutError, asyncio.TimeoutError):
            found = None
        except Exception:
            found = None
            if self._limiter.allow("ask", time.monotonic()) is not None:
                log.exception("directory could not be asked")
        finally:
            self._out -= 1
            self._seconds += time.monotonic() - started_s
        if found is None:
            self._unanswered += 1
            return None
        self._remember(keys, found)
        held = {key for key in keys if self.holders(key)}
        self._held += len(held)
        return held

    def quarantine(self, instance_id: str, incarnation: str, key: ChunkKey) -> None:
        """Do not name this life of the instance as a holder of `key` any more."""
        self._refused[instance_id, incarnation, key] = None
        while len(self._refused) > MAX_KEYS:
            del self._refused[next(iter(self._refused))]
        answer = self._answers.get(key)
        if answer is not None:
            left = tuple(holder for holder in answer.holders if holder != instance_id)
            self._answers[key] = answer._replace(holders=left)

    def forget(self, key: ChunkKey) -> None:
        """What was said of this chunk has turned out wrong."""
        self._answers.pop(key, None)

    def statistics(self) -> AskerStatistics:
        """Counters now."""
        return AskerStatistics(self._questions, self._asked, self._held, self._unanswered, self._seconds)

    def _remember(self, keys: Sequence[bytes], found: dict[bytes, list[tuple[str, str]]]) -> None:
        until_s = time.monotonic() + REMEMBERED_S
        for key in map(ChunkKey, keys):
            names = [
                instance_id
                for instance_id, incarnation in found.get(key, ())
                if instance_id != self._own_id and (instance_id, incarnation, key) not in self._refused
            ]
            self._answers.pop(key, None)
            if names:
                self._answers[key] = _Answer(tuple(names), until_s)
        while len(self._answers) > MAX_KEYS:
            del self._answers[next(iter(self._answers))]
