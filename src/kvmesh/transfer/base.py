"""The transport interface: how chunks move from a peer's slots into ours.

A transport is pulled by the receiver and blocks its thread; the node gives each fetch a thread. Small on purpose, so
that a fake fits beside it (`fake.py`). The one promise every transport makes: **when `fetch` has returned, nothing will
write into the slots it was given any more**, whatever the peer does later. tcp keeps it by closing the socket, nixl by
destroying its agent, shm because our own threads are the only ones that write.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from kvmesh.core.plan import FetchItem
from kvmesh.core.reasons import MissReason

__all__ = [
    "ChunkOutcome",
    "Deadline",
    "FetchItem",
    "Locate",
    "Located",
    "PeerTransport",
    "Progress",
    "TransportStatistics",
]


class ChunkOutcome(NamedTuple):
    """What became of one item. `reason` is None exactly when the slot holds the bytes that were published under the
    key.
    """

    item: FetchItem
    reason: MissReason | None
    checksum: bytes | None
    """xxh3-128 of the bytes as published by the holder (and verified on arrival unless that is off); None on a miss."""


class Deadline(NamedTuple):
    """When a fetch must be over. Both times end it; all hops of one request inherit the same deadline."""

    at_s: float
    """time.monotonic() at which the fetch is given up."""
    stall_s: float
    """Longest time without a byte from the peer."""

    def remaining_s(self) -> float:
        """Seconds until `at_s`; negative when it has passed."""
        return self.at_s - time.monotonic()


class Located(NamedTuple):
    """Where a holder has a chunk right now."""

    slot: int
    generation: int
    checksum: bytes
    """xxh3-128 as recorded in the ledger for that generation."""


Locate = Callable[[bytes], Located | None]
"""Finds a published chunk by its key; None when it is not held. Called by several threads at a time, for every chunk
served.
"""

Progress = Callable[[ChunkOutcome], None]
"""Called in the fetching thread as each chunk is decided, in the order of the items."""


class TransportStatistics(NamedTuple):
    """A transport's counters since it was made."""

    connections: int
    """Open now."""
    connects: int
    """Opened so far."""
    fetched_chunks: int
    fetched_bytes: int
    last_error: str
    """What ended a conversation with this peer last; empty when nothing ever did."""


class PeerTransport(Protocol):
    """One peer, reached in one way. `fetch` may be called from several threads at a time."""

    @property
    def name(self) -> str:
        """`tcp`, `shm`, `nixl` or `fake`: the label in metrics."""
        ...

    def warm_up(self, deadline: Deadline) -> MissReason | None:
        """Connect now, so that the first fetch does not have to; None on success. Blocks its thread, never raises.

        Called when the node learns of the peer. A fetch connects by itself where this was not done or failed.
        """
        ...

    def fetch(
        self, items: Sequence[FetchItem], deadline: Deadline, progress: Progress | None = None
    ) -> list[ChunkOutcome]:
        """Pull `items` in prefix order into our slots; one outcome per item, in order.

        Never raises for anything the peer, the network or the clock did: that is a `reason`. After a chunk failed for a
        reason that ends the transfer (lost, stalled, deadline, protocol), the rest carries the same reason. A chunk the
        holder does not have (EVICTED, STALE) ends the usable prefix, so the rest may be given up as TRUNCATED.
        """
        ...

    def statistics(self) -> TransportStatistics:
        """Counters; from any thread."""
        ...

    def close(self) -> None:
        """Drop connections. A running `fetch` ends soon after with PEER_LOST. Safe to call twice, from any thread."""
        ...
