"""Who holds which chunk, as a hash per chunk in Redis: for nodes that ask instead of following everybody.

The hashes exist only while somebody asks: whoever asks says so (`asked`, which expires), publishers look with each
heartbeat. Every hash expires; publishers say their chunks anew, a few with each heartbeat, so that each is said several
times within its life. Entries of instances that have died are told by their incarnation and go with their hash, or
earlier, when somebody who asks meets them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from kvmesh.directory.redis_answers import pairs
from kvmesh.directory.redis_link import Argument, RedisLink
from kvmesh.wire import directory as wire
from kvmesh.wire.redis_layout import Layout, RedisValueError, parse_id, parse_incarnation

log = logging.getLogger("kvmesh.directory")

INDEX_TTL_S = 900
RENEWALS = 3
"""Times each chunk is said within INDEX_TTL_S."""
ASKED_TTL_S = 60
COMMANDS_AT_ONCE = 1000
MAX_HOLDERS = 64
"""Holders of one chunk that are looked at."""
SETTLED_S = 30.0
"""Who is no member after so long of following is none."""


class Published(Protocol):
    """An instance's chunks (`kvmesh.directory.outbox`)."""

    def keys(self) -> Sequence[bytes]:
        """Everything published now."""
        ...

    def __contains__(self, key: bytes) -> bool:
        """Whether a chunk is."""
        ...


class IndexWriter:
    """One publisher's part of the index. Every method raises RedisTrouble."""

    def __init__(self, link: RedisLink, layout: Layout, member: wire.Member, published: Published) -> None:
        """`published`: what there is to be said."""
        self._link = link
        self._layout = layout
        self._format_id = member.format.format_id()
        self._id, self._incarnation = member.instance_id, member.incarnation
        self._published = published
        self._is_on = False
        self._unsaid: dict[bytes, None] = {}
        """Not in the index yet: all when somebody has begun to ask, later what Redis did not take."""
        self._renewing: list[bytes] = []
        self._renewed = 0
        """Keys in that list at first."""

    async def beat(self, interval_s: float) -> None:
        """Look whether somebody asks; say some chunks again, or all when somebody has begun to ask."""
        is_on = await self._link.call(self._layout.asked, "EXISTS", self._layout.asked) == 1
        started, self._is_on = is_on and not self._is_on, is_on
        if not is_on:
            self._renewing.clear()
            self._unsaid.clear()
            return
        if started:
            log.info("other nodes ask who holds what; writing our chunks for them")
            self._unsaid = dict.fromkeys(self._published.keys())
        if self._unsaid:
            await self._put(list(self._unsaid))
            return
        if not self._renewing:
            self._renewing = list(self._published.keys())
            self._renewed = len(self._renewing)
        share = int(self._renewed * RENEWALS * interval_s / INDEX_TTL_S) + 1
        part, self._renewing = self._renewing[:share], self._renewing[share:]
        still_held = [key for key in part if key in self._published]  # others have been evicted since they were listed
        await self._put(still_held)

    async def apply(self, batch: wire.Changes) -> None:
        """Changes that have just been published."""
        if not self._is_on:
            return
        for key in batch.removed:
            self._unsaid.pop(key, None)
        self._unsaid.update(dict.fromkeys(batch.added))
        await self._take_out(batch.removed)
        await self._put(batch.added)

    async def withdraw(self) -> None:
        """Take everything of ours out."""
        if self._is_on:
            await self._take_out(self._published.keys())

    async def _take_out(self, keys: Sequence[bytes]) -> None:
        for part in _parts(keys):
            await self._link.many([("HDEL", self._layout.holders(self._format_id, key), self._id) for key in part])

    async def _put(self, keys: Sequence[bytes]) -> None:
        for part in _parts(keys):
            commands: list[tuple[Argument, ...]] = []
            for key in part:
                name = self._layout.holders(self._format_id, key)
                commands += [("HSET", name, self._id, self._incarnation), ("EXPIRE", name, INDEX_TTL_S)]
            await self._link.many(commands)
            for key in part:
                self._unsaid.pop(key, None)


class IndexReader:
    """Asks the index. Every method raises RedisTrouble."""

    def __init__(
        self, link: RedisLink, layout: Layout, format_id: str, incarnation: Callable[[str], str | None]
    ) -> None:
        """`incarnation` tells the life in which an instance is a member, None when it is none."""
        self._link = link
        self._layout = layout
        self._format_id = format_id
        self._incarnation = incarnation
        self._since_s = time.monotonic()

    async def say_so(self) -> None:
        """Have publishers keep the index."""
        await self._link.call(self._layout.asked, "SET", self._layout.asked, "1", "EX", ASKED_TTL_S)

    async def ask(self, keys: Sequence[bytes]) -> dict[bytes, list[tuple[str, str]]]:
        """Holders of each key that has any, with their incarnations: members only."""
        names = [self._layout.holders(self._format_id, key) for key in keys]
        answers = await self._link.many([("HGETALL", name) for name in names])
        found: dict[bytes, list[tuple[str, str]]] = {}
        dead: list[tuple[Argument, ...]] = []
        for key, name, answer in zip(keys, names, answers, strict=False):
            holders = []
            for instance_id, incarnation in _holders(answer):
                if self._incarnation(instance_id) == incarnation:
                    holders.append((instance_id, incarnation))
                elif self._incarnation(instance_id) is None and time.monotonic() - self._since_s > SETTLED_S:
                    dead.append(("HDEL", name, instance_id))
            if holders:
                found[key] = holders
        if dead:
            await self._link.many(dead[:COMMANDS_AT_ONCE])
        return found


def _holders(answer: object) -> Iterable[tuple[str, str]]:
    for count, (name, value) in enumerate(pairs(answer)):
        if count >= MAX_HOLDERS:
            return
        try:
            holder = parse_id(name), parse_incarnation(value)
        except RedisValueError:
            continue
        yield holder


def _parts(keys: Sequence[bytes]) -> Iterable[Sequence[bytes]]:
    return (keys[start : start + COMMANDS_AT_ONCE] for start in range(0, len(keys), COMMANDS_AT_ONCE))
