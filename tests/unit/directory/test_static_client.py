"""Following peers without a directory: what ends a conversation, and how soon the next one begins."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator

import pytest

from kvmesh.directory.static_client import StaticClient
from kvmesh.node.peer_server import PeerServer
from kvmesh.transfer.base import Deadline
from kvmesh.transfer.security import OPEN
from kvmesh.transfer.stream import PeerStream
from kvmesh.wire import directory as wire
from kvmesh.wire.peer import Follow, Hello
from support.transfer_holder import HOLDER, HOLDER_INCARNATION, Store, hello, kv_format
from unit.controller.makers import make_member
from unit.directory.test_merge import Listener

CHUNK_BYTES = 4096


class Followed:
    """A peer that says the same in each conversation, and counts them."""

    def __init__(self, *words: wire.Message) -> None:
        self._words = words
        self.conversations = threading.Semaphore(0)

    def serve(self, stream: PeerStream, request: Follow, patience: Deadline, closing: threading.Event) -> None:
        self.conversations.release()
        for word in self._words:
            stream.send_frame(wire.encode(word), patience)
        while not closing.is_set() and not stream.wait_readable(0.05):
            pass


class Replica(Listener):
    """Every change is a gap to it."""

    def on_changes(self, changes: wire.Changes) -> bool:
        super().on_changes(changes)
        return False


@pytest.fixture
def store() -> Iterator[Store]:
    made = Store(1, CHUNK_BYTES)
    yield made
    made.close()


async def test_a_gap_is_mended_at_once(store: Store) -> None:
    """The next conversation, which begins with a snapshot, does not wait as if there were nothing to follow."""
    peer_format = kv_format(CHUNK_BYTES)
    told = make_member(HOLDER, incarnation=HOLDER_INCARNATION, format=peer_format)
    followed = Followed(wire.MemberUp(told), wire.Changes(HOLDER, HOLDER_INCARNATION, 7, [], []))
    theirs = Hello.of(HOLDER, HOLDER_INCARNATION, peer_format)
    server = PeerServer(store.pool, store.ledger, store.locate, theirs, host="127.0.0.1", port=0, following=followed)
    server.start()
    listener = Replica()

    def nobody_follows(introduce: Callable[[wire.Member], None] | None) -> None:
        del introduce

    client = StaticClient(
        lambda: [("127.0.0.1", server.port)],
        hello(CHUNK_BYTES, "me", "0" * 16),
        OPEN,
        listener,
        instance_timeout_s=30.0,
        on_follower=nobody_follows,
    )
    running = asyncio.create_task(client.run(make_member("me", incarnation="0" * 16, format=peer_format)))
    try:
        for _ in range(3):
            assert await asyncio.to_thread(followed.conversations.acquire, timeout=10)
        assert listener.members == {HOLDER: HOLDER_INCARNATION}
    finally:
        running.cancel()
        await asyncio.wait((running,))
        await asyncio.to_thread(server.close)
