"""Who holds which chunk in Redis: what a publisher says, and what it says again when Redis did not take it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from kvmesh.bench.stand_in import make_key
from kvmesh.directory.redis_index import COMMANDS_AT_ONCE, IndexWriter
from kvmesh.directory.redis_link import Argument, RedisTrouble
from kvmesh.wire.directory import Changes
from kvmesh.wire.redis_layout import Layout
from unit.controller.makers import make_member

KEYS = [make_key(f"index-{number}") for number in range(2 * COMMANDS_AT_ONCE)]
BEAT_S = 2.0


class Link:
    """A Redis that somebody asks, and that may be silent at a certain round trip."""

    def __init__(self) -> None:
        self.said: dict[Argument, Argument] = {}
        self.until_silent = -1

    async def call(self, key: str, *command: Argument) -> int:
        assert command == ("EXISTS", key)
        return 1

    async def many(self, commands: Sequence[Sequence[Argument]]) -> list[int]:
        self.until_silent -= 1
        if self.until_silent == -1:
            raise RedisTrouble("silent", "does not answer")
        for name, key, *rest in commands:
            if name == "HSET":
                self.said[key] = rest[0]
            if name == "HDEL":
                self.said.pop(key, None)
        return [1] * len(commands)


class World:
    def __init__(self) -> None:
        self.link, self.layout, self.member = Link(), Layout("c"), make_member("me")
        self.published = list(KEYS)
        self.writer = IndexWriter(self.link, self.layout, self.member, self)  # type: ignore[arg-type]
        self._sequence = 0

    def keys(self) -> list[bytes]:
        return self.published

    def __contains__(self, key: bytes) -> bool:
        return key in self.published

    def names(self, keys: Sequence[bytes]) -> set[Argument]:
        return {self.layout.holders(self.member.format.format_id(), key) for key in keys}

    def change(self, added: Sequence[bytes], removed: Sequence[bytes]) -> Changes:
        self._sequence += 1
        self.published = [key for key in self.published if key not in removed] + list(added)
        return Changes("me", self.member.incarnation, self._sequence, list(added), list(removed))


async def test_what_redis_did_not_take_at_first_is_said_with_the_next_heartbeat() -> None:
    """Not minutes later, when it would be said again anyway: who asks would find half of the chunks nowhere."""
    world = World()
    world.link.until_silent = 1
    with pytest.raises(RedisTrouble):
        await world.writer.beat(BEAT_S)
    assert set(world.link.said) == world.names(KEYS[:COMMANDS_AT_ONCE])
    await world.writer.apply(world.change([], KEYS[-8:]))
    await world.writer.beat(BEAT_S)
    assert set(world.link.said) == world.names(KEYS[:-8]), "what has been evicted meanwhile is not said"


async def test_what_was_evicted_since_the_renewal_began_is_not_said_again() -> None:
    world = World()
    await world.writer.beat(BEAT_S)
    await world.writer.beat(BEAT_S)  # lists what is to be renewed, and says the first of it
    await world.writer.apply(world.change([], KEYS[10:]))
    for _ in range(2 * COMMANDS_AT_ONCE):
        await world.writer.beat(BEAT_S)
    assert set(world.link.said) == world.names(KEYS[:10])


async def test_a_change_that_redis_did_not_take_is_said_with_the_next_heartbeat() -> None:
    world = World()
    await world.writer.beat(BEAT_S)
    new = [make_key("new")]
    world.link.until_silent = 0
    with pytest.raises(RedisTrouble):
        await world.writer.apply(world.change(new, []))
    await world.writer.beat(BEAT_S)
    assert world.names(new) <= set(world.link.said)
