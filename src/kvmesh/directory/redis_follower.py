"""Follows what others tell through Redis (`kvmesh.wire.redis_layout`), so that this node's replica is theirs.

One task per master reads the streams of its shards, and now and then compares the whole state (`_audit`): what joined,
left or was missed while nobody listened is found there, and the start is nothing else. A few tasks read the sets of
instances whose sequence cannot be continued.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import NamedTuple

import msgspec

from kvmesh.directory.base import DirectoryListener
from kvmesh.directory.redis_answers import entries, pairs, streams
from kvmesh.directory.redis_health import Health
from kvmesh.directory.redis_link import RedisLink, RedisTrouble
from kvmesh.directory.redis_sets import SetReaders
from kvmesh.directory.redis_shard import Shard
from kvmesh.logs import LogLimiter
from kvmesh.wire import directory as wire
from kvmesh.wire.redis_layout import (
    Layout,
    RedisValueError,
    Sealer,
    State,
    parse_id,
    parse_incarnation,
    parse_number,
    parse_state,
)

log = logging.getLogger("kvmesh.directory")

MAX_MEMBERS_PER_SHARD = 5_000
"""20,000 in all; whoever names more is not believed."""
ENTRIES_PER_READ = 1000
SHORTEST_PAUSE_S, PAUSE_PER_MEMBER_S, LONGEST_PAUSE_S = 0.002, 0.0001, 0.2
"""After a read that brought something, so that the next one brings more: 0.1 s with 1,000 instances."""
FIRST_AUDIT_S, AUDIT_PER_MEMBER_S = 5.0, 0.025
"""Between two comparisons: 30 s with 1,000 instances."""
RETRY_S, LONGEST_RETRY_S = 0.2, 3.0

_changes_decoder = msgspec.msgpack.Decoder(wire.Changes)
_member_decoder = msgspec.msgpack.Decoder(wire.Member)


class FollowerStatistics(NamedTuple):
    """Counters of one follower."""

    members: int
    snapshots: int
    malformed: int
    audits: int


class RedisFollower:
    """Keeps one listener's view of one format. Lives on the node's event loop."""

    def __init__(
        self,
        link: RedisLink,
        layout: Layout,
        sealer: Sealer,
        listener: DirectoryListener,
        health: Health,
        *,
        own_id: str,
        format_id: str,
        instance_timeout_s: float,
        timeout_s: float,
        follow_inventories: bool = True,
    ) -> None:
        """`follow_inventories` False: members only, for nodes that ask who holds a chunk."""
        self._link = link
        self._sealer = sealer
        self._listener = listener
        self._health = health
        self._own_id = own_id
        self._format_id = format_id
        self._grace_s = instance_timeout_s
        self._block_ms = max(10, int(min(1.0, timeout_s / 2) * 1000))
        self._follow_inventories = follow_inventories
        self._shards = [Shard(keys) for keys in layout.shards(format_id)]
        self._sets = SetReaders(link, listener, apply=self._apply, member_count=lambda: self.member_count)
        self._limiter = LogLimiter()
        self._malformed = self._audits = 0

    @property
    def member_count(self) -> int:
        """Instances that are members now, without ourselves."""
        return sum(len(shard.members) for shard in self._shards)

    def incarnation(self, instance_id: str) -> str | None:
        """The life in which an instance is a member; None when it is none."""
        for shard in self._shards:
            if instance_id in shard.members:
                return shard.members[instance_id]
        return None

    def statistics(self) -> FollowerStatistics:
        """Counters since the start."""
        return FollowerStatistics(self.member_count, self._sets.snapshots, self._malformed, self._audits)

    def follow_inventories(self, wanted: bool) -> None:
        """Whether to read what others hold, or only who is a member."""
        if wanted and not self._follow_inventories:
            for shard in self._shards:
                shard.audit_soon(0.0)
        self._follow_inventories = wanted
        if not wanted:
            for shard in self._shards:
                shard.sequences.clear()
                for instance_id in shard.members:
                    self._sets.cancel(instance_id)

    async def run(self) -> None:
        """Follow until cancelled."""
        groups = [[shard] for shard in self._shards] if self._link.is_cluster else [self._shards]
        self._health.await_parts({f"follow {number}" for number in range(len(groups))})
        tasks: list[Coroutine[None, None, None]] = [self._sets.run()]
        tasks += [self._follow(f"follow {number}", group) for number, group in enumerate(groups)]
        await asyncio.gather(*tasks)

    # -- streams -------------------------------------------------------------------------------------------------------

    async def _follow(self, part: str, shards: list[Shard]) -> None:
        failures = 0
        while True:
            if await self._read_once(part, shards):
                failures = 0
                continue
            for shard in shards:
                shard.rewind()
            await asyncio.sleep(min(RETRY_S * 2**failures, LONGEST_RETRY_S) * random.uniform(0.5, 1.0))
            failures = min(failures + 1, 10)

    async def _read_once(self, part: str, shards: list[Shard]) -> bool:
        try:
            for shard in shards:
                if time.monotonic() >= shard.audit_at_s:
                    await self._audit(shard)
            came = await self._read(shards)
        except (RedisTrouble, RedisValueError) as error:
            kind = error.kind if isinstance(error, RedisTrouble) else "malformed"
            self._health.trouble(part, kind, str(error))
            return False
        self._health.well(part)
        if came:
            more_s = SHORTEST_PAUSE_S + PAUSE_PER_MEMBER_S * self.member_count
            await asyncio.sleep(min(more_s, LONGEST_PAUSE_S))
        return True

    async def _read(self, shards: list[Shard]) -> bool:
        positions: dict[str, str] = {}
        for shard in shards:
            positions[shard.keys.who] = shard.who_id
            if self._follow_inventories:
                positions[shard.keys.log] = shard.log_id
        answer = await self._link.read_streams(positions, count=ENTRIES_PER_READ, block_ms=self._block_ms)
        found = {name.decode(errors="replace"): stream for name, stream in streams(answer)}
        for shard in shards:
            # Changes first: whoever has them all needs no set when the publisher joins again.
            for entry_id, fields in entries(found.get(shard.keys.log)):
                shard.log_id = entry_id
                self._guard(self._on_change, shard, fields)
            for entry_id, fields in entries(found.get(shard.keys.who)):
                shard.who_id = entry_id
                self._guard(self._on_event, shard, fields)
        return bool(found)

    def _guard(
        self, handle: Callable[[Shard, dict[bytes, bytes]], None], shard: Shard, fields: dict[bytes, bytes]
    ) -> None:
        """Handle one entry; nothing that is wrong with it gets out of here."""
        try:
            handle(shard, fields)
        except RedisValueError as error:
            self._complain(str(error))
        except Exception:  # whatever it is, it costs this entry and not the node
            if self._limiter.allow("entry", time.monotonic()) is not None:
                log.exception("entry of the directory could not be applied")

    def _complain(self, text: str) -> None:
        self._malformed += 1
        suppressed = self._limiter.allow(text[:60], time.monotonic())
        if suppressed is not None:
            log.error("directory has a value that is not taken: %s suppressed=%d", text, suppressed)

    def _on_change(self, shard: Shard, fields: dict[bytes, bytes]) -> None:
        changes = self._sealer.open(fields.get(b"d"), _changes_decoder)
        if shard.members.get(changes.instance_id) != changes.incarnation:
            return
        if not self._sets.keep(changes):
            self._apply(shard, changes)

    def _apply(self, shard: Shard, changes: wire.Changes) -> None:
        instance_id = changes.instance_id
        have = shard.sequences.get(instance_id)
        if have is None:
            return  # its set will be read
        if not self._listener.on_changes(changes) or changes.sequence > have + 1:
            del shard.sequences[instance_id]
            self._want(shard, instance_id)
        elif changes.sequence == have + 1:
            shard.sequences[instance_id] = changes.sequence

    def _on_event(self, shard: Shard, fields: dict[bytes, bytes]) -> None:
        kind = fields.get(b"t")
        if kind == b"u":
            self._up(shard, self._sealer.open(fields.get(b"d"), _member_decoder))
            return
        instance_id, incarnation = parse_id(fields.get(b"i", b"")), parse_incarnation(fields.get(b"n", b""))
        if shard.members.get(instance_id) != incarnation:
            return
        if kind == b"s":
            if shard.sequences.get(instance_id) != parse_number(fields.get(b"q", b"")):
                self._want(shard, instance_id)
        elif kind == b"d":
            reason = fields.get(b"r", b"")
            self._down(shard, instance_id, reason.decode() if reason in {b"left", b"timeout"} else "gone")
        else:
            raise RedisValueError(f"unknown event {kind!r}")

    # -- members -------------------------------------------------------------------------------------------------------

    def _up(self, shard: Shard, member: wire.Member) -> None:
        instance_id = member.instance_id
        if instance_id == self._own_id or shard.members.get(instance_id) == member.incarnation:
            return
        if member.format.format_id() != self._format_id:
            raise RedisValueError(f"instance {instance_id[:80]} is listed under a format that it does not have")
        if len(shard.members) >= MAX_MEMBERS_PER_SHARD and instance_id not in shard.members:
            raise RedisValueError(f"more than {MAX_MEMBERS_PER_SHARD} members in a shard; the others are not used")
        shard.members[instance_id] = member.incarnation
        shard.forget(instance_id)
        self._sets.cancel(instance_id)
        self._listener.on_member_up(member)

    def _down(self, shard: Shard, instance_id: str, reason: str) -> None:
        incarnation = shard.members.pop(instance_id)
        shard.forget(instance_id)
        self._sets.cancel(instance_id)
        self._listener.on_member_down(instance_id, incarnation, reason)

    def _want(self, shard: Shard, instance_id: str) -> None:
        if self._follow_inventories:
            self._sets.want(shard, instance_id)

    # -- comparing everything ------------------------------------------------------------------------------------------

    async def _audit(self, shard: Shard) -> None:
        """Compare a shard's state with what is known, and mend the difference. Raises RedisTrouble."""
        self._audits += 1
        keys = shard.keys
        epoch, size, last_who, last_log = await asyncio.gather(
            self._link.call(keys.epoch, "GET", keys.epoch),
            self._link.call(keys.state, "HLEN", keys.state),
            self._last(keys.who),
            self._last(keys.log),
        )
        if not isinstance(size, int) or size > MAX_MEMBERS_PER_SHARD:
            raise RedisValueError(f"{keys.state} names {size} members; that cannot be right")
        if not shard.who_id:
            shard.who_id, shard.log_id = last_who, last_log
        elif epoch != shard.epoch and shard.epoch is not None:
            if shard.members:
                log.warning("directory was lost and began anew; its members are about to come back shard=%s", keys.who)
                shard.unconfirmed_until_s = time.monotonic() + self._grace_s
            shard.who_id = shard.log_id = "0-0"  # from the beginning: the new streams may have all that is missing
        shard.epoch = epoch
        states = self._parse_states(await self._link.call(keys.state, "HGETALL", keys.state))
        await self._find_members(shard, states)
        self._drop_members(shard, states)
        self._compare_sequences(shard, states)
        interval_s = FIRST_AUDIT_S + AUDIT_PER_MEMBER_S * self.member_count
        if shard.unconfirmed_until_s is not None:
            interval_s = min(interval_s, self._grace_s / 2)
        shard.audit_at_s = time.monotonic() + interval_s * random.uniform(0.7, 1.3)

    async def _last(self, stream: str) -> str:
        found = list(entries(await self._link.call(stream, "XREVRANGE", stream, "+", "-", "COUNT", 1)))
        return found[0][0] if found else "0-0"

    def _parse_states(self, answer: object) -> dict[str, State]:
        found = {}
        for name, value in pairs(answer):
            with self._tolerate():
                found[parse_id(name)] = parse_state(value)
        return found

    @contextlib.contextmanager
    def _tolerate(self) -> Iterator[None]:
        """A value that is not one of ours costs itself."""
        try:
            yield
        except RedisValueError as error:
            self._complain(str(error))

    async def _find_members(self, shard: Shard, states: dict[str, State]) -> None:
        new = [
            instance_id
            for instance_id, state in states.items()
            if instance_id != self._own_id and shard.members.get(instance_id) != state.incarnation
        ]
        for start in range(0, len(new), 200):
            part = new[start : start + 200]
            values = await self._link.call(shard.keys.members, "HMGET", shard.keys.members, *part)
            for instance_id, value in zip(part, values if isinstance(values, list) else (), strict=False):
                if value is None:
                    continue  # it has left meanwhile
                with self._tolerate():
                    member = self._sealer.open(value, _member_decoder)
                    if (member.instance_id, member.incarnation) == (instance_id, states[instance_id].incarnation):
                        self._up(shard, member)

    def _drop_members(self, shard: Shard, states: dict[str, State]) -> None:
        missing = [instance_id for instance_id in shard.members if instance_id not in states]
        if shard.unconfirmed_until_s is not None:
            if missing and time.monotonic() < shard.unconfirmed_until_s:
                return
            shard.unconfirmed_until_s = None
        for instance_id in missing:
            self._down(shard, instance_id, "timeout")

    def _compare_sequences(self, shard: Shard, states: dict[str, State]) -> None:
        """Notice a last change that was missed: no newer one comes to show the gap."""
        behind = {}
        for instance_id, state in states.items():
            if shard.members.get(instance_id) != state.incarnation or not state.is_ready:
                continue
            have = shard.sequences.get(instance_id)
            if have is None:
                self._want(shard, instance_id)
            elif have < state.sequence:
                behind[instance_id] = have
                if shard.behind.get(instance_id) == have:
                    self._want(shard, instance_id)
        shard.behind = behind
