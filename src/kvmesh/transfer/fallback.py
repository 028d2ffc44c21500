"""A transport that needs something of the machine (shared memory, RDMA), and tcp where that turns out not to work.

Whether memory can be shared or NIXL's agents reach each other is known for certain only when it has been tried: a
fabric may not lead to every host, memory may not be pinned, a large pool takes its time to be. None of this is to cost
hits as long as the peer can be reached at all.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from kvmesh.core.reasons import MissReason
from kvmesh.transfer.base import (
    ChunkOutcome,
    Deadline,
    FetchItem,
    PeerTransport,
    Progress,
    TransportStatistics,
)

log = logging.getLogger(__name__)

RETRY_S = 5.0
"""How often a way that did not work is tried again, while there are fetches."""
_QUICK = frozenset({MissReason.PEER_UNREACHABLE, MissReason.PEER_LOST})
"""Leave time to try the other way at once."""
_NO_WAY = _QUICK | {MissReason.PEER_STALLED, MissReason.DEADLINE}
"""What a fetch that brought nothing ends with when the way does not work, or the peer."""


class FallbackTransport:
    """One peer, reached by `better` where that works and by `tcp` otherwise (see `PeerTransport`). All methods may be
    called from any thread.

    A fetch over `better` that brings nothing, because of the peer or the way to it, is repeated over tcp where there is
    time left; later ones go over tcp until a connection of `better`, tried beside them, stands.
    """

    def __init__(self, better: PeerTransport, tcp: PeerTransport, peer: str, *, retry_s: float = RETRY_S) -> None:
        """Takes both over: they are closed with it. `peer` is for the log."""
        self._better = better
        self._tcp = tcp
        self._peer = peer
        self._retry_s = retry_s
        self._retrier = ThreadPoolExecutor(1, thread_name_prefix=f"kvmesh-{better.name}-retry")
        self._lock = threading.Lock()
        self._failed: MissReason | None = None
        """Why `better` is not used now."""
        self._is_said = False
        self._is_retrying = False
        self._retry_at_s = 0.0

    @property
    def name(self) -> str:
        """Of the transport that the next fetch will use."""
        return (self._better if self._failed is None else self._tcp).name

    def warm_up(self, deadline: Deadline) -> MissReason | None:
        """Connect now (see `PeerTransport`)."""
        reason = self._better.warm_up(deadline)
        if reason is None or reason not in _NO_WAY:
            return reason
        self._fail(reason)
        return self._tcp.warm_up(deadline) if deadline.remaining_s() > 0 else reason

    def fetch(
        self, items: Sequence[FetchItem], deadline: Deadline, progress: Progress | None = None
    ) -> list[ChunkOutcome]:
        """Pull `items` into our slots (see `PeerTransport`)."""
        if not self._is_failed():
            held_back = _HeldBack(progress)
            outcomes = self._better.fetch(items, deadline, held_back)
            reason = outcomes[0].reason if outcomes else None
            has_brought = any(outcome.reason is None for outcome in outcomes)
            if not has_brought and reason in _NO_WAY:
                self._fail(reason)
            if has_brought or reason not in _QUICK or deadline.remaining_s() <= 0:
                held_back.release()
                return outcomes
        outcomes = self._tcp.fetch(items, deadline, progress)
        if any(outcome.reason is None for outcome in outcomes):
            self._say()
        return outcomes

    def statistics(self) -> TransportStatistics:
        """Counters of both."""
        better, tcp = self._better.statistics(), self._tcp.statistics()
        return TransportStatistics(
            connections=better.connections + tcp.connections,
            connects=better.connects + tcp.connects,
            fetched_chunks=better.fetched_chunks + tcp.fetched_chunks,
            fetched_bytes=better.fetched_bytes + tcp.fetched_bytes,
            last_error=better.last_error or tcp.last_error,
        )

    def close(self) -> None:
        """Close both (see `PeerTransport`)."""
        self._better.close()
        self._tcp.close()
        self._retrier.shutdown(wait=False, cancel_futures=True)

    def _is_failed(self) -> bool:
        """Whether tcp is to be used; sees to it that the better way is tried again."""
        with self._lock:
            if self._failed is None:
                return False
            is_due = not self._is_retrying and time.monotonic() >= self._retry_at_s
            self._is_retrying |= is_due
        if is_due:
            with contextlib.suppress(RuntimeError):  # closed meanwhile
                self._retrier.submit(self._retry)
        return True

    def _retry(self) -> None:
        reason = self._better.warm_up(Deadline(time.monotonic() + self._retry_s, self._retry_s))
        with self._lock:
            self._is_retrying = False
            self._retry_at_s = time.monotonic() + self._retry_s
            was_said, self._is_said = self._is_said, self._is_said and reason is not None
            self._failed = reason
        if reason is None and was_said:
            log.info("peer %s is reached by %s again", self._peer, self._better.name)

    def _fail(self, reason: MissReason) -> None:
        with self._lock:
            self._failed = reason
            self._retry_at_s = time.monotonic() + self._retry_s

    def _say(self) -> None:
        """Tell, once, that it is the way that does not work, not the peer."""
        with self._lock:
            failed, was_said, self._is_said = self._failed, self._is_said, True
        if failed is not None and not was_said:
            why = self._better.statistics().last_error or failed.value
            log.warning(
                "peer %s cannot be reached by %s, using tcp until it can: %s", self._peer, self._better.name, why
            )


class _HeldBack:
    """Passes on what was decided, from the first hit on: a fetch without any may be repeated."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._held: list[ChunkOutcome] | None = []

    def __call__(self, outcome: ChunkOutcome) -> None:
        if self._held is not None:
            self._held.append(outcome)
            if outcome.reason is not None:
                return
            self.release()
        elif self._progress is not None:
            self._progress(outcome)

    def release(self) -> None:
        """Pass on what was held back, and everything from now on."""
        held, self._held = self._held or [], None
        if self._progress is not None:
            for outcome in held:
                self._progress(outcome)
