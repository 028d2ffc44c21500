"""Connections kept open and lent to one thread at a time, and the books of a fetch that several connections work on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from kvmesh.core.reasons import MissReason
from kvmesh.errors import PeerCancelledError, PeerConnectError, PeerTimeoutError
from kvmesh.transfer.base import ChunkOutcome, Deadline, FetchItem, Progress


class Connection(Protocol):
    """What can be lent."""

    def is_quiet(self) -> bool:
        """True while an idle connection may be used again."""
        ...

    def shut_down(self) -> None:
        """Make the call that another thread is in fail soon. From any thread."""
        ...

    def close(self) -> None:
        """By the thread that has it on loan, or when nobody has. Never raises."""
        ...


_C = TypeVar("_C", bound=Connection)


@dataclass(frozen=True)
class Lease(Generic[_C]):
    """A connection on loan."""

    connection: _C
    is_fresh: bool
    """Made for this loan; otherwise it was idle, and the peer may have closed it without our knowing."""


class _Dialling(Generic[_C]):
    """A connection that is being made in a thread of its own, for somebody who waits for it or has left."""

    def __init__(self) -> None:
        self.connection: _C | None = None
        self.error: BaseException | None = None
        self.is_awaited = True

    @property
    def is_over(self) -> bool:
        return self.connection is not None or self.error is not None


class Leases(Generic[_C]):
    """Connections to one peer: at most `limit` open, at most `keep` of them idle. Thread-safe."""

    def __init__(
        self, dial: Callable[[Deadline], _C], *, peer: str, keep: int, limit: int, longest_dial_s: float = 0.0
    ) -> None:
        """`longest_dial_s`: for connections that cannot be made within a deadline, nor be given up.

        So long `dial` gets, in a thread of its own. Who waits for it leaves at its deadline, and what comes later is
        for whoever is next.
        """
        self._dial = dial
        self._longest_dial_s = longest_dial_s
        self._peer = peer
        self._keep = keep
        self._limit = limit
        self._changed = threading.Condition()
        self._idle: list[_C] = []
        self._lent: list[_C] = []
        self._dialling = 0
        self._coming = 0
        """Those of them that nobody waits for any more: whoever is next waits for them instead of making another."""
        self._closed = False
        self.connects = 0

    @property
    def open(self) -> int:
        """Connections open now."""
        return len(self._idle) + len(self._lent)

    def take(self, deadline: Deadline, *, wait: bool, fresh: bool = False) -> Lease[_C] | None:
        """Borrow an idle connection, or a new one. None when the limit is reached and `wait` is false.

        Args:
            deadline: for the dialling, and for the waiting until somebody gives one back.
            wait: wait for a connection when the limit is reached.
            fresh: take no idle one; they are closed, because one of them has just turned out dead.

        Raises PeerTimeoutError, PeerCancelledError after `close`, and whatever `dial` raises.
        """
        with self._changed:
            while True:
                if self._is_closed():
                    raise PeerCancelledError(self._peer, found="transport closed")
                while self._idle:
                    connection = self._idle.pop()
                    if not fresh and connection.is_quiet():
                        self._lent.append(connection)
                        return Lease(connection, is_fresh=False)
                    connection.close()
                if len(self._lent) + self._dialling < self._limit and not self._coming:
                    self._dialling += 1
                    break
                if not wait:
                    return None
                remaining_s = max(0.0, deadline.at_s - time.monotonic())
                if not self._changed.wait(min(remaining_s, threading.TIMEOUT_MAX)):
                    raise PeerTimeoutError(self._peer, expected="a free connection before the deadline")
        if self._longest_dial_s:
            return Lease(self._dial_aside(deadline), is_fresh=True)
        try:
            connection = self._dial(deadline)
        except BaseException:
            with self._changed:
                self._dialling -= 1
                self._changed.notify()
            raise
        with self._changed:
            self._dialling -= 1
            self._lent.append(connection)
            self.connects += 1
            is_open = not self._is_closed()
        if is_open:
            return Lease(connection, is_fresh=True)
        self.discard(connection)
        raise PeerCancelledError(self._peer, found="transport closed")

    def _dial_aside(self, deadline: Deadline) -> _C:
        dialling = _Dialling[_C]()
        try:
            threading.Thread(
                target=self._dial_for, args=(dialling, deadline.stall_s), name=f"kvmesh-dial-{self._peer}", daemon=True
            ).start()
        except RuntimeError as error:
            with self._changed:
                self._dialling -= 1
                self._changed.notify()
            raise PeerConnectError(self._peer, expected="a thread to connect in", found=str(error)) from None
        with self._changed:
            while not (dialling.is_over or self._closed):
                remaining_s = deadline.at_s - time.monotonic()
                if remaining_s <= 0:
                    break
                self._changed.wait(min(remaining_s, threading.TIMEOUT_MAX))
            if not dialling.is_over:
                dialling.is_awaited = False
                self._coming += 1
        if dialling.error is not None:
            raise dialling.error
        if dialling.connection is not None:
            return dialling.connection
        if self._is_closed():
            raise PeerCancelledError(self._peer, found="transport closed")
        raise PeerTimeoutError(self._peer, expected="a connection before the deadline")

    def _dial_for(self, dialling: _Dialling[_C], stall_s: float) -> None:
        """In a thread of its own."""
        try:
            connection = self._dial(Deadline(time.monotonic() + self._longest_dial_s, stall_s))
        except BaseException as error:
            with self._changed:
                self._dialling -= 1
                self._coming -= not dialling.is_awaited
                dialling.error = error
                self._changed.notify_all()
            return
        with self._changed:
            self._dialling -= 1
            self._coming -= not dialling.is_awaited
            self.connects += 1
            is_lent, keep = dialling.is_awaited and not self._closed, False
            if is_lent:
                self._lent.append(connection)
                dialling.connection = connection
            elif not self._closed and len(self._idle) < self._keep:
                self._idle.append(connection)
                keep = True
            self._changed.notify_all()
        if not is_lent and not keep:
            connection.close()

    def give_back(self, connection: _C) -> None:
        """Return a connection that is in good order: nothing asked is unanswered."""
        with self._changed:
            self._lent.remove(connection)
            keep = not self._closed and len(self._idle) < self._keep
            if keep:
                self._idle.append(connection)
            self._changed.notify()
        if not keep:
            connection.close()

    def discard(self, connection: _C) -> None:
        """Close a connection that is not to be used again. When this returns, it is closed."""
        connection.close()
        with self._changed:
            self._lent.remove(connection)
            self._changed.notify()

    def _is_closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        """Close the idle ones and interrupt the others; their borrowers close them."""
        with self._changed:
            self._closed = True
            idle, self._idle = self._idle, []
            for connection in self._lent:
                connection.shut_down()
            self._changed.notify_all()
        for connection in idle:
            connection.close()


class FetchBook:
    """What became of each item of one fetch, and what to pull next. Thread-safe, except `report`."""

    def __init__(self, items: Sequence[FetchItem], progress: Progress | None) -> None:
        self.items = items
        self._progress = progress
        self._lock = threading.Lock()
        self._outcomes: list[ChunkOutcome | None] = [None] * len(items)
        self._taken = 0
        self._reported = 0
        self._end: MissReason | None = None

    def take(self, count: int) -> range:
        """Indices of the next run of at most `count` items in prefix order; empty when nothing is left to pull."""
        with self._lock:
            if self._end is not None:
                return range(0)
            start = self._taken
            self._taken = min(start + count, len(self.items))
            return range(start, self._taken)

    @property
    def taken(self) -> int:
        """Items handed out so far: the index of the next one."""
        return self._taken

    def hit(self, index: int, checksum: bytes) -> None:
        """The item's slot holds what was published."""
        self._outcomes[index] = ChunkOutcome(self.items[index], None, checksum)

    def miss(self, index: int, reason: MissReason) -> None:
        """The item was not fetched. The prefix ends before it."""
        self._outcomes[index] = ChunkOutcome(self.items[index], reason, None)

    def end(self, reason: MissReason) -> None:
        """Pull nothing more; items that nobody has taken yet are missed for `reason`, the first one given."""
        with self._lock:
            self._end = self._end or reason

    def report(self) -> None:
        """Tell the caller of the fetch what has been decided without a gap. In the fetching thread only."""
        while self._reported < len(self._outcomes):
            outcome = self._outcomes[self._reported]
            if outcome is None:
                return
            self._reported += 1
            if self._progress is not None:
                self._progress(outcome)

    def close(self) -> list[ChunkOutcome]:
        """Decide what is still open, report the rest and return all outcomes in order. In the fetching thread, at its
        end.
        """
        reason = self._end or MissReason.TRUNCATED
        for index, outcome in enumerate(self._outcomes):
            if outcome is None:
                self.miss(index, reason)
        self.report()
        return [outcome for outcome in self._outcomes if outcome is not None]
