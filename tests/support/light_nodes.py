"""Nodes without pool and network: an inventory, a replica, and a real directory client between them."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterable

from kvmesh.bench.stand_in import stand_in_format
from kvmesh.core.format import Format
from kvmesh.core.keys import ChunkKey
from kvmesh.core.replica import Replica
from kvmesh.directory.base import DirectoryClient
from kvmesh.directory.outbox import Outbox
from kvmesh.wire.directory import Answer, Ask, Changes, Member, NodeStatistics, Snapshot
from kvmesh.wire.redis_layout import KEYS_PER_ENTRY


class LightNode:
    """A DirectoryListener on the test's event loop."""

    def __init__(self, instance_id: str, kv_format: Format | None = None, *, peer_port: int = 1) -> None:
        self.member = Member(
            instance_id=instance_id,
            incarnation=secrets.token_hex(8),
            peer_host="127.0.0.1",
            peer_port=peer_port,
            admin_port=0,
            transports=("tcp",),
            format=kv_format or stand_in_format(4096),
            slots=1000,
            version="test",
        )
        self.replica = Replica()
        self.published: dict[ChunkKey, None] = {}
        self.client: DirectoryClient | None = None
        self.connected = False
        self.strangers: list[Member] = []
        self.downs: list[tuple[str, str]] = []
        self.snapshots = 0
        self._added: dict[ChunkKey, None] = {}
        self._removed: dict[ChunkKey, None] = {}
        self.outbox = Outbox(instance_id, self.member.incarnation, self, batch_keys=KEYS_PER_ENTRY)

    # -- the engine's part ---------------------------------------------------------------------------------------------

    def put(self, keys: Iterable[bytes]) -> None:
        for key in map(ChunkKey, keys):
            if key not in self.published:
                self.published[key] = self._added[key] = None
        self._tell()

    def drop(self, keys: Iterable[bytes]) -> None:
        for key in map(ChunkKey, keys):
            if key in self.published:
                del self.published[key]
                if key in self._added:
                    del self._added[key]
                else:
                    self._removed[key] = None
        self._tell()

    def _tell(self) -> None:
        if self.client is not None:
            self.client.changes_pending()

    def sees(self, other: LightNode) -> bool:
        """Whether it knows exactly what the other one has published."""
        mine = self.replica
        is_known = mine.incarnation(other.member.instance_id) == other.member.incarnation
        return is_known and mine.keys_of(other.member.instance_id) == set(other.published)

    # -- DirectoryListener ---------------------------------------------------------------------------------------------

    def on_connection(self, connected: bool) -> None:
        self.connected = connected

    def on_member_up(self, member: Member) -> None:
        if member.format != self.member.format:
            self.strangers.append(member)
            return
        self.replica.member_up(member.instance_id, member.incarnation)

    def on_member_down(self, instance_id: str, incarnation: str, reason: str) -> None:
        self.downs.append((instance_id, reason))
        self.replica.member_down(instance_id, incarnation)

    def on_changes(self, changes: Changes) -> bool:
        return not self.replica.apply_changes(
            changes.instance_id, changes.incarnation, changes.sequence, changes.added, changes.removed
        ).gap

    def on_snapshot(self, part: Snapshot) -> bool:
        self.snapshots += part.last
        return not self.replica.apply_snapshot(
            part.instance_id, part.incarnation, part.sequence, part.keys, part.first, part.last
        ).gap

    def keys(self) -> list[ChunkKey]:
        return list(self.published)

    def __contains__(self, key: bytes) -> bool:
        return key in self.published

    def take_changes(self, limit: int) -> tuple[list[ChunkKey], list[ChunkKey]]:
        removed = list(self._removed)[:limit]
        added = list(self._added)[: limit - len(removed)]
        for key in removed:
            del self._removed[key]
        for key in added:
            del self._added[key]
        return added, removed

    def on_ask(self, ask: Ask, answer: Callable[[Answer], None]) -> None:
        raise AssertionError("nobody asks a light node")

    def take_use_report(self, *, whole: bool) -> None:
        return None

    def statistics(self) -> NodeStatistics:
        return NodeStatistics(published_chunks=len(self.published), replica_chunks=len(self.replica))


async def eventually(check: Callable[[], object], timeout_s: float = 40.0) -> None:
    """Wait until `check` is true: for what another process does in its own time."""
    until_s = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < until_s, f"waited {timeout_s} s"
        await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def joined(node: LightNode, make: Callable[[LightNode], DirectoryClient]) -> AsyncIterator[LightNode]:
    """The node with a running client, which leaves at the end."""
    node.client = make(node)
    running = asyncio.create_task(node.client.run(node.member))
    try:
        yield node
    finally:
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
