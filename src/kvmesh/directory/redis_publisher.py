"""Tells others through Redis what this node holds (`kvmesh.wire.redis_layout`): joins, publishes, beats, leaves.

One lock orders everything that is sent; a batch is sent again until Redis has said yes or the directory turns out to
have other numbers, which ends in joining again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import secrets
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from kvmesh.directory.base import DirectoryListener
from kvmesh.directory.outbox import Outbox
from kvmesh.directory.pace import Pace
from kvmesh.directory.redis_health import Health
from kvmesh.directory.redis_index import IndexWriter
from kvmesh.directory.redis_link import Argument, RedisLink, RedisTrouble
from kvmesh.directory.redis_scripts import (
    BEAT,
    CENSUS,
    DIFFERENT,
    JOIN,
    LEAVE,
    OK,
    PUBLISH,
    READY,
    REAP,
    TAKEN,
    UPLOAD,
    Script,
)
from kvmesh.wire import directory as wire
from kvmesh.wire.redis_layout import (
    MAX_LOG_ENTRIES,
    SHARDS,
    SHARED_TTL_S,
    Layout,
    RedisValueError,
    Sealer,
    parse_format_id,
)

log = logging.getLogger("kvmesh.directory")

SILENT_INTERVALS = 1.5
"""An instance that has missed so many heartbeats may lose its id to another one."""
MAX_EVENTS_AT_JOIN = 64
"""More batches than this are not told one by one when joining again: the set has them."""
UPLOAD_KEYS = 1000
RETRY_S, LONGEST_RETRY_S = 0.1, 5.0
CENSUS_BEATS = 5
MAX_REPORTS = 100
"""Fetch reports waiting for the next heartbeat; further ones are dropped."""
KEPT_REPORTS = 500
OFFERED_KEYS = 20_000

_encoder = msgspec.msgpack.Encoder()
_member_decoder = msgspec.msgpack.Decoder(wire.Member)


class RedisPublisher:
    """One instance's side of the directory. Lives on the node's event loop."""

    def __init__(
        self,
        link: RedisLink,
        layout: Layout,
        sealer: Sealer,
        listener: DirectoryListener,
        outbox: Outbox,
        health: Health,
        member: wire.Member,
        *,
        heartbeat_interval_s: float,
        instance_timeout_s: float,
        member_count: Callable[[], int],
        says_so: Callable[[], Awaitable[None] | None],
    ) -> None:
        """
        Args:
            link: where to write.
            layout: the names of keys.
            sealer: puts MACs on values.
            listener: has the statistics.
            outbox: what is to be told.
            health: is told of troubles.
            member: ourselves.
            heartbeat_interval_s: between two heartbeats.
            instance_timeout_s: after which others are dead.
            member_count: how many others there are: they share the work of looking for the dead.
            says_so: is called with each heartbeat; tells others that this node asks, if it does.
        """
        self._link = link
        self._layout = layout
        self._sealer = sealer
        self._listener = listener
        self._outbox = outbox
        self._health = health
        self._member = member
        self._format_id = member.format.format_id()
        self._keys = layout.shard_of(self._format_id, member.instance_id)
        self._set = self._keys.published(member.instance_id)
        self._sealed_member = sealer.seal(_encoder.encode(member))
        self._interval_s = heartbeat_interval_s
        self._timeout_s = instance_timeout_s
        self._member_count = member_count
        self._says_so = says_so
        self._index = IndexWriter(link, layout, member, outbox)
        self._shared_ttl_ms = int(1000 * max(SHARED_TTL_S, 3 * instance_timeout_s))
        self._set_ttl_ms = int(1000 * 3 * instance_timeout_s)
        self._sequence = 0
        """Of the last batch that Redis has confirmed."""
        self._set_size = 0
        """What the set had then, by Redis's own count."""
        self._withheld: dict[bytes, None] = {}
        """Keys for which Redis had no memory. They are offered again with each heartbeat."""
        self._in_doubt = False
        """The answer to the batch after that was lost."""
        self._joined = self._ever_joined = self._has_left = False
        self._entered = False
        """Redis may know us: a registration has been sent."""
        self._wake = asyncio.Event()
        """Ends the wait for the next heartbeat."""
        self._pending = asyncio.Event()
        self._order = asyncio.Lock()
        self._reports: deque[wire.FetchReport] = deque(maxlen=MAX_REPORTS)
        self._beats = 0
        self._reap_shard = random.randrange(SHARDS)
        self._foreign: set[str] = set()
        """Other formats that the listener has been told of."""

    def changes_pending(self) -> None:
        """The listener has changes to take."""
        self._pending.set()

    def report(self, report: wire.FetchReport) -> None:
        """Send with the next heartbeat."""
        self._reports.append(report)

    async def run(self) -> None:
        """Join and publish until cancelled."""
        await asyncio.gather(self._live(), self._publishes())

    def leave_for_good(self) -> None:
        """Leave with the next step, and do not come back."""
        self._has_left = True
        self._wake.set()

    async def leave(self) -> None:
        """Take everything of ours out, and do not come back. Raises RedisTrouble."""
        self._has_left = True
        async with self._order:
            if self._entered:
                keys = (self._keys.members, self._keys.state, self._keys.beats, self._keys.who, self._keys.statistics)
                await self._run(LEAVE, (*keys, self._set), MAX_LOG_ENTRIES)
                self._joined = self._entered = False
                await self._index.withdraw()  # last: nobody believes it of an instance that is no member

    # -- heartbeats ----------------------------------------------------------------------------------------------------

    async def _live(self) -> None:
        failures = 0
        while True:
            if await self._live_once():
                failures = 0
                with contextlib.suppress(TimeoutError, asyncio.TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), self._interval_s * random.uniform(0.8, 1.0))
                self._wake.clear()
            else:
                pause_s = min(RETRY_S * 2**failures, self._interval_s, LONGEST_RETRY_S)
                await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
                failures = min(failures + 1, 10)

    async def _live_once(self) -> bool:
        try:
            if self._has_left:
                await self.leave()
                return True
            async with self._order:
                if self._joined:
                    await self._beat()
                if not self._joined:
                    await self._join()
            if self._joined:
                await self._look_around()
                self._offer_withheld()
                await self._tend_index()
        except RedisTrouble as error:
            self._health.trouble("heartbeat", error.kind, str(error))
            return False
        self._health.well("heartbeat")
        return self._joined

    async def _beat(self) -> None:
        keys = self._keys
        statistics = self._sealer.seal(_encoder.encode(self._listener.statistics()))
        answer = await self._run(
            BEAT,
            (*(keys.epoch, keys.members, keys.state, keys.beats, keys.who, keys.log, keys.statistics), self._set),
            *(self._sequence, self._set_size, self._shared_ttl_ms, self._set_ttl_ms, statistics),
        )
        code = answer[0] if isinstance(answer, list) and answer else None
        if code == OK:
            return
        self._joined = False
        if code == TAKEN:
            log.warning("another instance has taken our id instance=%s", self._member.instance_id)
        elif code == DIFFERENT and self._in_doubt:
            self._joined = True  # sending the batch again settles it
            self._pending.set()
        else:
            log.warning("directory does not know this instance, or not its chunks (was it restarted?); joining again")
            if code == DIFFERENT:
                self._outbox.bump()  # somebody may have read a set that was not whole
                self._ever_joined = False

    async def _look_around(self) -> None:
        """Find those whose heartbeats have stopped; tell what others watch for; now and then look who else is here."""
        shards = self._layout.shards(self._format_id)
        for _ in range(min(SHARDS, -(-2 * SHARDS // (1 + self._member_count())))):
            self._reap_shard = (self._reap_shard + 1) % SHARDS
            keys = shards[self._reap_shard]
            await self._link.run(
                REAP,
                (keys.members, keys.state, keys.beats, keys.who, keys.statistics),
                (int(self._timeout_s * 1000), MAX_LOG_ENTRIES),
            )
        self._beats += 1
        try:
            while self._reports:
                await self._tell(self._reports.popleft())
            if self._beats % CENSUS_BEATS == 1:
                await self._census()
                self._health.well("census")
        except RedisTrouble as error:
            if error.kind != "full":  # these can wait
                self._health.trouble("census", error.kind, str(error))

    async def _tend_index(self) -> None:
        try:
            if (saying := self._says_so()) is not None:
                await saying
            async with self._order:  # so that no change overtakes another
                await self._index.beat(self._interval_s)
        except RedisTrouble as error:
            self._health.trouble("index", error.kind, str(error))
        else:
            self._health.well("index")

    async def _tell(self, report: wire.FetchReport) -> None:
        sealed = self._sealer.seal(wire.encode(report))
        stream = self._layout.reports
        await self._link.call(stream, "XADD", stream, "MAXLEN", "~", KEPT_REPORTS, "*", "d", sealed)
        await self._link.call(stream, "PEXPIRE", stream, self._shared_ttl_ms)

    async def _census(self) -> None:
        """Say which format is in use here, and tell the node of one instance of each other format: its log then says
        what differs.
        """
        example = self._layout.example(self._format_id)
        await self._link.call(example, "SET", example, self._sealed_member, "PX", self._shared_ttl_ms)
        found = await self._link.run(CENSUS, (self._layout.formats,), (self._format_id, self._shared_ttl_ms))
        for value in found if isinstance(found, list) else ():
            try:
                format_id = parse_format_id(value)
                if format_id == self._format_id or format_id in self._foreign:
                    continue
                example = self._layout.example(format_id)
                member = self._sealer.open(await self._link.call(example, "GET", example), _member_decoder)
            except RedisValueError:
                continue
            if member.format.format_id() == format_id:
                self._foreign.add(format_id)
                self._listener.on_member_up(member)

    # -- joining -------------------------------------------------------------------------------------------------------

    async def _join(self) -> None:
        """Register and bring the whole inventory. Raises RedisTrouble."""
        keys = self._keys
        self._entered = True
        answer = await self._run(
            JOIN,
            (keys.epoch, keys.members, keys.state, keys.beats, keys.who, self._set),
            *(self._member.peer_address, self._sealed_member, self._sequence),
            *(int(1000 * SILENT_INTERVALS * self._interval_s), self._shared_ttl_ms),
            *(secrets.token_hex(8), MAX_LOG_ENTRIES),
        )
        code, detail = answer if isinstance(answer, list) and len(answer) == 2 else (None, b"")
        if code == TAKEN:
            address = detail.decode(errors="replace") if isinstance(detail, bytes) else "unknown"
            raise RedisTrouble(
                "duplicate_instance",
                f"instance id {self._member.instance_id} is taken: an instance at {address} has it and is alive, this "
                f"one is at {self._member.peer_address}: give each instance an instance_id of its own",
            )
        if code != OK or not isinstance(detail, bytes):
            raise RedisTrouble("error", f"the directory's answer to a registration is {answer!r:.80}")
        sequence, inventory = self._outbox.inventory()
        events = self._events()
        for start in range(0, len(inventory), UPLOAD_KEYS):
            part = inventory[start : start + UPLOAD_KEYS]
            if await self._run(UPLOAD, (keys.state, self._set), detail, self._set_ttl_ms, *part) != OK:
                return
        sealed = [self._sealer.seal(wire.encode(event)) for event in events]
        tail: tuple[Argument, ...] = (detail, sequence, MAX_LOG_ENTRIES, *sealed)
        if await self._run(READY, (keys.state, keys.who, keys.log), *tail) != OK:
            return
        self._joined = self._ever_joined = True
        self._sequence, self._set_size, self._in_doubt = sequence, len(inventory), False
        self._withheld.clear()
        self._health.well("publish")
        self._pending.set()

    def _events(self) -> list[wire.Changes]:
        """What others have not been told yet: those who know everything else then need no more than this."""
        events: list[wire.Changes] = []
        sequence = self._sequence
        while self._ever_joined and (batch := self._outbox.next_after(sequence)) is not None:
            events.append(batch)
            sequence = batch.sequence
            if len(events) > MAX_EVENTS_AT_JOIN:
                return []
        return events

    # -- publishing ----------------------------------------------------------------------------------------------------

    async def _publishes(self) -> None:
        failures, pace = 0, Pace()
        while True:
            await self._pending.wait()
            await pace.turn()
            self._pending.clear()
            if await self._publish_all():
                failures = 0
                continue
            self._pending.set()
            await asyncio.sleep(min(RETRY_S * 2**failures, LONGEST_RETRY_S) * random.uniform(0.5, 1.0))
            failures = min(failures + 1, 10)

    async def _publish_all(self) -> bool:
        try:
            while self._joined and await self._publish_one():
                pass
        except RedisTrouble as error:
            self._health.trouble("publish", error.kind, str(error))
            return False
        return True

    async def _publish_one(self) -> bool:
        """Send one batch; False when there is none, or none may be sent now. Raises RedisTrouble."""
        async with self._order:
            if not self._joined:
                return False
            batch = self._outbox.next_after(self._sequence)
            if batch is None:
                self._joined = self._outbox.continues(self._sequence)  # if not, the next heartbeat joins again
                return False
            self._in_doubt = True
            try:
                answer = await self._send(batch)
            except RedisTrouble as error:
                if error.kind != "full" or not batch.added:
                    raise
                self._withhold(batch, error)
                answer = await self._send(msgspec.structs.replace(batch, added=[]))
            self._in_doubt = False
            if not isinstance(answer, list) or len(answer) != 2 or answer[0] != OK:
                self._joined = False  # as above
                return False
            self._sequence, self._set_size = batch.sequence, answer[1]
            if not self._withheld:
                self._health.well("publish")
            await self._index.apply(batch)
            return True

    async def _send(self, batch: wire.Changes) -> Any:
        sealed = self._sealer.seal(wire.encode(batch))
        keys: tuple[Argument, ...] = (len(batch.removed), *batch.removed, *batch.added)
        return await self._run(
            PUBLISH,
            (self._keys.state, self._keys.log, self._set),
            *(batch.sequence, self._set_ttl_ms, MAX_LOG_ENTRIES, sealed, *keys),
        )

    def _withhold(self, batch: wire.Changes, error: RedisTrouble) -> None:
        """A full Redis takes removals, but no additions: let those go on, and offer these again later."""
        self._health.trouble("publish", error.kind, str(error))
        self._withheld.update(dict.fromkeys(batch.added))

    def _offer_withheld(self) -> None:
        """Some of them; when they are taken, the next heartbeat offers more."""
        if not self._withheld:
            return
        offered = list(self._withheld)[:OFFERED_KEYS]
        for key in offered:
            del self._withheld[key]
        self._outbox.repeat(offered)
        self._pending.set()

    async def _run(self, script: Script, keys: tuple[str, ...], *arguments: Argument) -> Any:
        """A script about ourselves: id and incarnation come first."""
        return await self._link.run(script, keys, (self._member.instance_id, self._member.incarnation, *arguments))
