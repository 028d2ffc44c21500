"""Reads what instances have published, for those whose sequence cannot be continued; a few at a time."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable

from kvmesh.core.keys import ChunkKey
from kvmesh.directory.base import DirectoryListener
from kvmesh.directory.redis_link import RedisLink, RedisTrouble
from kvmesh.directory.redis_shard import Shard
from kvmesh.wire import directory as wire
from kvmesh.wire.redis_layout import RedisValueError, State, parse_keys, parse_state

log = logging.getLogger("kvmesh.directory")

READERS = 4
PART_KEYS = 5_000
MAX_SET_KEYS = 4_000_000
MAX_BUFFERED_CHANGES = 4_000
"""Kept of one instance while its set is being read."""
RETRY_S = 0.2
SPREAD_PER_MEMBER_S = 0.001
"""A set that everybody wants is read by each at a moment of its own within so long."""


class _Reading:
    """A set that is being read, or about to be, and the changes that came meanwhile."""

    def __init__(self, shard: Shard, instance_id: str) -> None:
        self.shard = shard
        self.instance_id = instance_id
        self.changes: list[wire.Changes] = []
        self.overflowed = False


class SetReaders:
    """Brings sets to a listener. Lives on the node's event loop."""

    def __init__(
        self,
        link: RedisLink,
        listener: DirectoryListener,
        *,
        apply: Callable[[Shard, wire.Changes], None],
        member_count: Callable[[], int],
    ) -> None:
        """
        Args:
            link: where to read.
            listener: is given snapshots.
            apply: takes the changes that came while a set was read.
            member_count: how many members there are.
        """
        self._link = link
        self._listener = listener
        self._apply = apply
        self._member_count = member_count
        self._wanted: asyncio.Queue[_Reading] = asyncio.Queue()
        self._readings: dict[str, _Reading] = {}
        self.snapshots = 0

    def want(self, shard: Shard, instance_id: str) -> None:
        """Have the set of a member read, unless it is about to be."""
        if instance_id not in self._readings:
            self._readings[instance_id] = reading = _Reading(shard, instance_id)
            self._wanted.put_nowait(reading)

    def cancel(self, instance_id: str) -> None:
        """The instance has gone, or begun a new life."""
        self._readings.pop(instance_id, None)

    def keep(self, changes: wire.Changes) -> bool:
        """Put changes of an instance aside while its set is being read; False when it is not."""
        reading = self._readings.get(changes.instance_id)
        if reading is None:
            return False
        if len(reading.changes) < MAX_BUFFERED_CHANGES:
            reading.changes.append(changes)
        else:
            reading.overflowed = True
        return True

    @property
    def waiting(self) -> int:
        """Sets that are still to be read."""
        return len(self._readings)

    async def run(self) -> None:
        """Read until cancelled."""
        await asyncio.gather(*(self._read_sets() for _ in range(READERS)))

    async def _read_sets(self) -> None:
        while True:
            reading = await self._wanted.get()
            if self._readings.get(reading.instance_id) is reading:
                await self._try(reading)

    async def _try(self, reading: _Reading) -> None:
        try:
            await asyncio.sleep(random.uniform(0, SPREAD_PER_MEMBER_S * self._member_count() / READERS))
            await self._read(reading)
        except (RedisTrouble, RedisValueError) as error:
            log.debug("set could not be read instance=%s error=%s", reading.instance_id, error)
            reading.shard.audit_soon(time.monotonic() + RETRY_S)
        except Exception:
            log.exception("set could not be read instance=%s", reading.instance_id)
        finally:
            if self._readings.get(reading.instance_id) is reading:
                del self._readings[reading.instance_id]

    async def _read(self, reading: _Reading) -> None:
        """The sequence number first, then the set: what changes meanwhile is applied again on top."""
        shard, instance_id = reading.shard, reading.instance_id
        before = await self._state(shard, instance_id)
        if before is None or not before.is_ready or shard.members.get(instance_id) != before.incarnation:
            return  # it is about to say when it can be read
        if shard.sequences.get(instance_id) == before.sequence:
            self._finish(reading, before.sequence)
            return
        keys = await self._scan(shard.keys.published(instance_id))
        after = await self._state(shard, instance_id)
        if after is None or (after.incarnation, after.join) != (before.incarnation, before.join):
            shard.audit_soon(time.monotonic() + RETRY_S)  # halves of two uploads
            return
        if self._readings.get(instance_id) is not reading or shard.members.get(instance_id) != before.incarnation:
            return
        self.snapshots += 1
        size = wire.MAX_KEYS_PER_MESSAGE
        parts = [keys[start : start + size] for start in range(0, len(keys), size)] or [[]]
        for index, part in enumerate(parts):
            self._listener.on_snapshot(
                wire.Snapshot(
                    instance_id,
                    before.incarnation,
                    before.sequence,
                    list[bytes](part),
                    first=index == 0,
                    last=index == len(parts) - 1,
                )
            )
        self._finish(reading, before.sequence)

    def _finish(self, reading: _Reading, sequence: int) -> None:
        """From now on the instance's changes are applied as they come; first those that have come meanwhile."""
        shard, instance_id = reading.shard, reading.instance_id
        shard.sequences[instance_id] = sequence
        shard.behind.pop(instance_id, None)
        del self._readings[instance_id]
        for changes in reading.changes:
            if changes.sequence > shard.sequences.get(instance_id, changes.sequence):
                self._apply(shard, changes)
        if reading.overflowed:
            shard.audit_soon(0.0)

    async def _state(self, shard: Shard, instance_id: str) -> State | None:
        value = await self._link.call(shard.keys.state, "HGET", shard.keys.state, instance_id)
        return parse_state(value) if isinstance(value, bytes) else None

    async def _scan(self, key: str) -> list[ChunkKey]:
        """A set, in pieces that hold up nobody. What is in it all the while is in the result."""
        found: dict[ChunkKey, None] = {}
        cursor: int | bytes = 0
        while True:
            answer = await self._link.call(key, "SSCAN", key, cursor, "COUNT", PART_KEYS)
            if not isinstance(answer, (list, tuple)) or len(answer) != 2 or not isinstance(answer[1], (list, set)):
                raise RedisValueError("SSCAN has an answer of another shape")
            cursor = answer[0]
            found.update(dict.fromkeys(parse_keys(list(answer[1]))))
            if len(found) > MAX_SET_KEYS:
                raise RedisValueError(f"a published set has more than {MAX_SET_KEYS} keys")
            if cursor in {0, b"0"}:
                return list(found)
