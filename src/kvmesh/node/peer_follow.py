"""Lets other nodes follow this one over its peer port, without any directory (`kvmesh.wire.follow`).

The peer server's threads ask, the node's event loop answers: what is told is the node's outbox, the same batches under
the same numbers that go to directories.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
from collections.abc import Callable

from kvmesh.directory.outbox import Outbox
from kvmesh.directory.pace import Pace
from kvmesh.errors import KVMeshError
from kvmesh.transfer.base import Deadline
from kvmesh.transfer.stream import PeerStream
from kvmesh.wire import directory as wire
from kvmesh.wire.follow import BEAT_S, MAX_KEYS_PER_FRAME
from kvmesh.wire.peer import Follow, Refused, encode

BATCHES_AT_ONCE = 16
LOOK_S = 0.25
"""How often a thread that waits for the loop looks whether the server is closing."""
MAX_FOLLOWERS = 128


class Following:
    """The followed side of one node. `serve` runs in the peer server's threads, everything else on the loop."""

    def __init__(self, outbox: Outbox, statistics: Callable[[], wire.NodeStatistics]) -> None:
        self._outbox = outbox
        self._statistics = statistics
        self._loop: asyncio.AbstractEventLoop | None = None
        self._member: wire.Member | None = None
        self._changed = asyncio.Event()
        self._introduce: Callable[[wire.Member], None] = lambda _: None
        self._lock = threading.Lock()
        self._followers = 0

    @property
    def followers(self) -> int:
        """Nodes that follow this one now."""
        return self._followers

    def start(self, member: wire.Member) -> None:
        """From now on there is somebody to follow. Called on the loop."""
        self._loop = asyncio.get_running_loop()
        self._member = member

    def changes_pending(self) -> None:
        """The outbox has something new. Called on the loop."""
        self._changed.set()

    def leave(self) -> None:
        """Be followed no longer."""
        self._member = None
        self._changed.set()

    def on_follower(self, introduce: Callable[[wire.Member], None] | None) -> None:
        """Have `introduce` called, on the loop, with every node that begins to follow this one; None: no longer."""
        self._introduce = introduce or (lambda _: None)

    def serve(self, stream: PeerStream, request: Follow, patience: Deadline, closing: threading.Event) -> None:
        """Tell one follower everything until it leaves or `closing` is set. Raises what `PeerStream` raises."""
        loop, member = self._loop, self._member
        with self._lock:
            is_full = self._followers >= MAX_FOLLOWERS or loop is None or member is None
            self._followers += not is_full
        if is_full or loop is None or member is None:
            stream.send_frame(encode(Refused("full", f"{MAX_FOLLOWERS} nodes follow already")), patience)
            return
        try:
            if request.member is not None:
                loop.call_soon_threadsafe(self._introduce, request.member)
            stream.send_frame(wire.encode(wire.MemberUp(member)), patience)
            sequence, pace = -1, Pace()
            while self._member is not None and not closing.is_set() and not stream.wait_readable(0):
                asked = asyncio.run_coroutine_threadsafe(self._next(sequence, pace), loop)
                answer = _wait(asked, closing)
                if answer is None:
                    return
                sequence, frames = answer
                for frame in frames:
                    stream.send_frame(frame, patience)
        except RuntimeError as error:  # the loop has ended meanwhile
            raise KVMeshError("node", found=str(error)) from None
        finally:
            with self._lock:
                self._followers -= 1

    async def _next(self, sequence: int, pace: Pace) -> tuple[int, list[bytes]]:
        """What comes after `sequence` (-1: the beginning), waited for a while."""
        outbox = self._outbox
        if self._member is None:
            return sequence, []
        if sequence < 0 or not outbox.continues(sequence):
            return self._inventory()
        batch = outbox.next_after(sequence)
        if batch is None:
            self._changed.clear()
            with contextlib.suppress(TimeoutError, asyncio.TimeoutError):
                await asyncio.wait_for(self._changed.wait(), BEAT_S)
            await pace.turn()
            batch = outbox.next_after(sequence)
        if batch is None and not outbox.continues(sequence):
            return self._inventory()
        frames: list[bytes] = []
        while batch is not None and len(frames) < BATCHES_AT_ONCE:
            frames.append(wire.encode(batch))
            sequence = batch.sequence
            batch = outbox.next_after(sequence)
        if not frames and self._member is not None:
            me = (self._member.instance_id, self._member.incarnation)
            frames = [wire.encode(wire.Heartbeat(*me, sequence, self._statistics()))]
        return sequence, frames

    def _inventory(self) -> tuple[int, list[bytes]]:
        assert self._member is not None
        sequence, keys = self._outbox.inventory()
        me = (self._member.instance_id, self._member.incarnation)
        size = MAX_KEYS_PER_FRAME
        parts = [keys[start : start + size] for start in range(0, len(keys), size)] or [[]]
        last = len(parts) - 1
        return sequence, [
            wire.encode(wire.Snapshot(*me, sequence, list[bytes](part), first=index == 0, last=index == last))
            for index, part in enumerate(parts)
        ]


def _wait(
    asked: concurrent.futures.Future[tuple[int, list[bytes]]], closing: threading.Event
) -> tuple[int, list[bytes]] | None:
    """The answer of the loop; None when the server closes first."""
    while not asked.done():
        concurrent.futures.wait((asked,), timeout=LOOK_S)
        if closing.is_set():
            asked.cancel()
            return None
    return None if asked.cancelled() else asked.result()
