"""A node's connection to Redis or Valkey as its directory."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Sequence

from kvmesh.config.redis_url import RedisTarget
from kvmesh.directory.base import DirectoryListener
from kvmesh.directory.outbox import Outbox
from kvmesh.directory.redis_follower import RedisFollower
from kvmesh.directory.redis_health import Health
from kvmesh.directory.redis_index import IndexReader
from kvmesh.directory.redis_link import RedisLink, RedisTrouble
from kvmesh.directory.redis_publisher import RedisPublisher
from kvmesh.wire import directory as wire
from kvmesh.wire.auth import ClusterKey
from kvmesh.wire.redis_layout import Layout, Sealer

log = logging.getLogger("kvmesh.directory")

FIRST_RETRY_S, LONGEST_RETRY_S = 0.1, 3.0
LEAVE_S, CLOSE_S = 1.0, 0.3


class RedisClient:
    """Joins a node to a directory in Redis and keeps it joined. Lives on the node's event loop."""

    def __init__(
        self,
        target: RedisTarget,
        *,
        cluster_name: str,
        heartbeat_interval_s: float,
        instance_timeout_s: float,
        lookup_timeout_s: float,
        listener: DirectoryListener,
        outbox: Outbox,
        cluster_key: ClusterKey | None = None,
    ) -> None:
        """Raises StartupError when the `redis` package, or a file that the address names, is missing."""
        self._link = RedisLink(target, timeout_s=lookup_timeout_s)
        self._layout = Layout(cluster_name)
        self._sealer = Sealer(cluster_name, cluster_key)
        self._listener = listener
        self._outbox = outbox
        self._interval_s = heartbeat_interval_s
        self._timeout_s = instance_timeout_s
        self._lookup_timeout_s = lookup_timeout_s
        self._health = Health(str(target), listener.on_connection)
        self._publisher: RedisPublisher | None = None
        self._follower: RedisFollower | None = None
        self._reader: IndexReader | None = None
        self._follow_inventories = True

    @property
    def problem(self) -> str:
        """What is wrong with the directory now, in words; empty when all is well."""
        return self._health.problem

    async def run(self, member: wire.Member) -> None:
        """Join as `member` and serve until cancelled; then leave."""
        self._follower = follower = RedisFollower(
            self._link,
            self._layout,
            self._sealer,
            self._listener,
            self._health,
            own_id=member.instance_id,
            format_id=member.format.format_id(),
            instance_timeout_s=self._timeout_s,
            timeout_s=self._lookup_timeout_s,
            follow_inventories=self._follow_inventories,
        )
        format_id = member.format.format_id()
        self._reader = reader = IndexReader(self._link, self._layout, format_id, follower.incarnation)
        self._publisher = publisher = RedisPublisher(
            self._link,
            self._layout,
            self._sealer,
            self._listener,
            self._outbox,
            self._health,
            member,
            heartbeat_interval_s=self._interval_s,
            instance_timeout_s=self._timeout_s,
            member_count=lambda: follower.member_count,
            says_so=lambda: None if self._follow_inventories else reader.say_so(),
        )
        try:
            await self._open()
            await asyncio.gather(follower.run(), publisher.run())
        finally:  # not all of them need have ended: before Python 3.12, `wait_for` may lose a cancellation
            with contextlib.suppress(RedisTrouble, TimeoutError, asyncio.TimeoutError):
                await asyncio.wait_for(publisher.leave(), LEAVE_S)
            with contextlib.suppress(TimeoutError, asyncio.TimeoutError):
                await asyncio.wait_for(self._link.close(), CLOSE_S)

    def changes_pending(self) -> None:
        """The listener has changes to take."""
        if self._publisher is not None:
            self._publisher.changes_pending()

    def follow_inventories(self, wanted: bool) -> None:
        """Whether to hear what others hold."""
        self._follow_inventories = wanted
        if self._follower is not None:
            self._follower.follow_inventories(wanted)

    async def ask(self, keys: Sequence[bytes]) -> dict[bytes, list[tuple[str, str]]] | None:
        """Who holds each of `keys`; None when Redis cannot be asked now."""
        if self._reader is None:
            return None
        try:
            return await self._reader.ask(keys)
        except RedisTrouble as error:
            log.debug("directory could not be asked: %s", error)
            return None

    def leave(self) -> None:
        """Be a member no longer, and stay away for good."""
        if self._publisher is not None:
            self._publisher.leave_for_good()

    def report(self, report: wire.FetchReport) -> None:
        """Tell of a finished fetch; may be lost."""
        if self._publisher is not None:
            self._publisher.report(report)

    async def _open(self) -> None:
        pause_s = FIRST_RETRY_S
        while not await self._try_open():
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(2 * pause_s, LONGEST_RETRY_S)

    async def _try_open(self) -> bool:
        try:
            await self._link.open()
        except RedisTrouble as error:
            self._health.trouble("connect", error.kind, str(error))
            return False
        self._health.well("connect")
        return True
