"""A controller that shows what is in Redis: page, API and metrics of a cluster whose directory is there.

It only reads (a read-only user or a replica will do), so several may watch at once. What it reads is given to the
registry as if the instances had come themselves; what the registry would answer them is not sent anywhere. Questions to
them go to their peer ports (`peer_asks.py`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from kvmesh.config.redis_url import RedisTarget
from kvmesh.controller.instances import Peer
from kvmesh.controller.registry import Registry
from kvmesh.directory.redis_answers import entries, pairs, streams
from kvmesh.directory.redis_follower import RedisFollower
from kvmesh.directory.redis_health import Health
from kvmesh.directory.redis_link import RedisLink, RedisTrouble
from kvmesh.wire import directory as wire
from kvmesh.wire.auth import ClusterKey
from kvmesh.wire.redis_layout import Layout, RedisValueError, Sealer, parse_format_id

logger = logging.getLogger(__name__)

TIMEOUT_S = 3.0
MAX_FORMATS = 256
RETRY_S = 1.0
REPORTS_PER_READ = 500

_statistics_decoder = msgspec.msgpack.Decoder(wire.NodeStatistics)
_report_decoder = msgspec.msgpack.Decoder(wire.FetchReport)


class _Followed(NamedTuple):
    follower: RedisFollower
    health: Health
    task: asyncio.Task[None]


class RedisWatch:
    """Fills a registry from Redis. Lives on the controller's event loop."""

    def __init__(self, target: RedisTarget, *, cluster_name: str, key: ClusterKey | None, registry: Registry) -> None:
        """Raises StartupError when the `redis` package, or a file that the address names, is missing."""
        self._link = RedisLink(target, timeout_s=TIMEOUT_S)
        self._layout = Layout(cluster_name)
        self._sealer = Sealer(cluster_name, key)
        self._registry = registry
        self._health = Health(str(target), lambda _: None)
        self._followed: dict[str, _Followed] = {}
        self._report_id = "$"

    @property
    def problem(self) -> str:
        """What is wrong with the directory now, in words; empty when all is well."""
        texts = [self._health.problem, *(followed.health.problem for followed in self._followed.values())]
        return "; ".join(dict.fromkeys(text for text in texts if text))

    async def run(self) -> None:
        """Watch until cancelled."""
        try:
            await asyncio.gather(self._look(), self._keep(), self._read_reports())
        finally:
            for followed in self._followed.values():
                followed.task.cancel()
            await asyncio.wait_for(self._link.close(), TIMEOUT_S)

    async def _look(self) -> None:
        while True:
            pause_s = self._registry.heartbeat_interval_s if await self._look_once() else RETRY_S
            await asyncio.sleep(pause_s)

    async def _keep(self) -> None:
        """Whether an instance is alive is for the other instances to judge, who say so in Redis."""
        while True:
            now_s = time.monotonic()
            for instance in self._registry.instances.values():
                if not instance.peer.is_connected:
                    instance.last_contact_s = now_s
            await asyncio.sleep(self._registry.heartbeat_interval_s / 2)

    async def _look_once(self) -> bool:
        try:
            await self._link.open()
            found = await self._link.call(self._layout.formats, "ZRANGE", self._layout.formats, -MAX_FORMATS, -1)
            for value in found if isinstance(found, list) else ():
                self._follow(parse_format_id(value))
            for format_id in self._followed:
                await self._beat(format_id)
        except RedisTrouble as error:
            self._health.trouble("watch", error.kind, str(error))
            return False
        except RedisValueError as error:
            self._health.trouble("watch", "malformed", str(error))
            return False
        self._health.well("watch")
        return True

    def _follow(self, format_id: str) -> None:
        if format_id in self._followed or len(self._followed) >= MAX_FORMATS:
            return
        health = Health(f"{self._link.target} format={format_id}", lambda _: None)
        follower = RedisFollower(
            self._link,
            self._layout,
            self._sealer,
            _Intake(self._registry),
            health,
            own_id="",
            format_id=format_id,
            instance_timeout_s=self._registry.instance_timeout_s,
            timeout_s=TIMEOUT_S,
        )
        self._followed[format_id] = _Followed(follower, health, asyncio.create_task(follower.run()))

    async def _beat(self, format_id: str) -> None:
        """Take everybody's counters."""
        follower = self._followed[format_id].follower
        for shard in self._layout.shards(format_id):
            answer = await self._link.call(shard.statistics, "HGETALL", shard.statistics)
            for name, value in pairs(answer):
                instance_id = name.decode(errors="replace")
                incarnation = follower.incarnation(instance_id)
                instance = self._registry.instances.get(instance_id)
                if incarnation is None or instance is None or instance.peer.is_connected:
                    continue
                try:
                    statistics = self._sealer.open(value, _statistics_decoder)
                except RedisValueError:
                    continue
                beat = wire.Heartbeat(instance_id, incarnation, 0, statistics)
                self._registry.on_request(beat, Peer.of_redis(instance_id), time.monotonic())

    async def _read_reports(self) -> None:
        while True:
            if not await self._read_reports_once():
                await asyncio.sleep(RETRY_S)

    async def _read_reports_once(self) -> bool:
        stream = self._layout.reports
        try:
            answer = await self._link.read_streams({stream: self._report_id}, count=REPORTS_PER_READ, block_ms=1000)
        except RedisTrouble:
            return False  # `_look` says it
        for _, found in streams(answer):
            for entry_id, fields in entries(found):
                self._report_id = entry_id
                try:
                    report = self._sealer.open(fields.get(b"d"), _report_decoder)
                except RedisValueError:
                    continue
                self._registry.on_event(report, b"", time.monotonic())
        return True


class _Intake:
    """Gives one format's members and inventories to the registry."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def on_connection(self, connected: bool) -> None:
        """Said elsewhere."""

    def on_member_up(self, member: wire.Member) -> None:
        known = self._registry.instances.get(member.instance_id)
        if known is None or not known.peer.is_connected:  # else it has come to this controller itself
            register = wire.Register(member, asks=True)
            self._registry.on_request(register, Peer.of_redis(member.instance_id), time.monotonic())

    def on_member_down(self, instance_id: str, incarnation: str, reason: str) -> None:
        del reason
        known = self._registry.instances.get(instance_id)
        if known is not None and not known.peer.is_connected:
            self._registry.on_request(
                wire.Leave(instance_id, incarnation), Peer.of_redis(instance_id), time.monotonic()
            )

    def on_changes(self, changes: wire.Changes) -> bool:
        return self._take(changes)

    def on_snapshot(self, part: wire.Snapshot) -> bool:
        return self._take(part) or not part.last

    def statistics(self) -> wire.NodeStatistics:
        return wire.NodeStatistics()

    def on_ask(self, ask: wire.Ask, answer: Callable[[wire.Answer], None]) -> None:
        """Nobody asks a controller."""

    def take_use_report(self, *, whole: bool) -> None:
        """A controller looks nothing up."""

    def _take(self, event: wire.Changes | wire.Snapshot) -> bool:
        known = self._registry.instances.get(event.instance_id)
        if known is None or known.peer.is_connected:
            return True
        self._registry.on_event(event, b"", time.monotonic())
        return known.group.replica.sequence(event.instance_id) is not None
