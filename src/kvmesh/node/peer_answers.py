"""What a node answers its peers, request by request (see `kvmesh.wire.peer`). Called by the connections' threads."""

from __future__ import annotations

import logging
import socket
import threading
from collections import Counter
from collections.abc import Sequence
from typing import Protocol

from kvmesh.core.ledger import SlotLedger
from kvmesh.errors import TransferError
from kvmesh.node.chunk_sender import ChunkSender
from kvmesh.transfer.base import Deadline, Locate
from kvmesh.transfer.coding import Coding
from kvmesh.transfer.pool import HostPool
from kvmesh.transfer.stream import PeerStream
from kvmesh.transfer.unix_stream import UnixStream
from kvmesh.wire.peer import (
    Answered,
    Ask,
    Follow,
    Get,
    Held,
    Lookup,
    Message,
    MessageError,
    NixlAttach,
    NixlMetadata,
    Offer,
    Ping,
    Place,
    Pong,
    Refused,
    Request,
    Resolve,
    Resolved,
    ShmAttach,
    ShmAttached,
    Validate,
    Validated,
    encode,
    pack_bits,
)

log = logging.getLogger(__name__)

MAX_ATTACHED = 64
"""Nodes of this host that share our memory; each holds a connection and a thread."""


class NixlServing(Protocol):
    """What the nixl transport needs on this side (see `kvmesh.transfer.nixl_holder`)."""

    def describe(self) -> NixlMetadata:
        """What a peer needs to read from us. Raises TransferError."""
        ...

    def addresses(self, slots: Sequence[int]) -> tuple[int, list[int]]:
        """The serving number and the slots' addresses. Raises TransferError."""
        ...


class FollowServing(Protocol):
    """What serving followers needs (see `kvmesh.node.peer_follow`)."""

    def serve(self, stream: PeerStream, request: Follow, patience: Deadline, closing: threading.Event) -> None:
        """Tell one follower everything until it leaves or `closing` is set. Raises KVMeshError."""
        ...


class OfferTaking(Protocol):
    """What taking chunks over needs (see `kvmesh.node.drain`)."""

    def take(self, offer: Offer) -> Message:
        """Accepted or Refused; may take some seconds."""
        ...


class Answering(Protocol):
    """What answering questions needs (see `kvmesh.node.control`)."""

    def answer(self, ask: Ask) -> Answered:
        """The reply or an error; may take as long as the question allows."""
        ...


class ShmServing(Protocol):
    """What the shm transport needs on this side (see `kvmesh.transfer.shm_holder`)."""

    def listen(self, peer_port: int) -> socket.socket:
        """The socket for nodes of this host. Raises StartupError."""
        ...

    def describe(self) -> tuple[ShmAttached, Sequence[int]]:
        """What a peer needs to read from us, and the descriptors that go with it."""
        ...


class Count(Protocol):
    """Adds to the server's counters."""

    def __call__(self, **counts: int) -> None: ...


class PeerAnswers:
    """The answers of one node over one pool. From any thread."""

    def __init__(
        self,
        pool: HostPool,
        ledger: SlotLedger,
        locate: Locate,
        *,
        nixl: NixlServing | None,
        shm: ShmServing | None,
        following: FollowServing | None,
        offers: OfferTaking | None,
        questions: Answering | None,
        coding: Coding | None,
        patience: Deadline,
        idle_timeout_s: float,
        closing: threading.Event,
        count: Count,
    ) -> None:
        """What is not told of here is as in `PeerServer`. `patience` bounds sending to a peer, `closing` is set when
        the server closes, and `count` is told of `served`, `stale` and `gone` chunks.
        """
        self._pool = pool
        self._ledger = ledger
        self._locate = locate
        self._nixl = nixl
        self._shm = shm
        self._following = following
        self._offers = offers
        self._questions = questions
        self._patience = patience
        self._idle_timeout_s = idle_timeout_s
        self._closing = closing
        self._count = count
        self._sender = ChunkSender(pool, ledger, locate, coding, patience)
        self._lock = threading.Lock()
        self._attached = 0

    def answer(self, stream: PeerStream, request: Request) -> bool:
        """Answer one request; False when that was the last one of its conversation. Raises MessageError and what the
        stream raises.
        """
        if isinstance(request, Get):
            self._send_chunks(stream, request)
        elif isinstance(request, Follow):
            self._follow(stream, request)
            return False
        elif isinstance(request, ShmAttach) and self._shm is not None and isinstance(stream, UnixStream):
            self._attach(stream, self._shm)
        else:
            stream.send_frame(encode(self._answer(request)), self._patience)
        return True

    def _follow(self, stream: PeerStream, request: Follow) -> None:
        if self._following is not None:
            self._following.serve(stream, request, self._patience, self._closing)
        else:
            stream.send_frame(encode(Refused("unsupported", "nobody is followed here")), self._patience)

    def _attach(self, stream: UnixStream, shm: ShmServing) -> None:
        """Hand out our memory, and keep the connection open as long as it is read: its end tells that we are gone."""
        with self._lock:
            is_full = self._attached >= MAX_ATTACHED
            self._attached += 1
        try:
            if is_full:
                refusal = Refused("full", f"{MAX_ATTACHED} nodes share our memory already")
                stream.send_frame(encode(refusal), self._patience)
                return
            attached, descriptors = shm.describe()
            stream.send_frame_with(encode(attached), descriptors, self._patience)
            while not stream.wait_readable(self._idle_timeout_s):
                pass
        finally:
            with self._lock:
                self._attached -= 1

    def _answer(self, request: Ping | Lookup | Validate | NixlAttach | Resolve | ShmAttach | Offer | Ask) -> Message:
        if isinstance(request, Ping):
            return Pong(request.nonce)
        if isinstance(request, Lookup):
            return Held(pack_bits([self._locate(key) is not None for key in request.keys]))
        if isinstance(request, Validate):
            return Validated([self._validate(asked.slot, asked.generation) for asked in request.slots])
        if isinstance(request, ShmAttach):
            return Refused("unsupported", "memory is shared over the unix socket of a node that offers shm")
        if isinstance(request, Offer):
            return (
                Refused("unsupported", "nothing is taken over") if self._offers is None else self._offers.take(request)
            )
        if isinstance(request, Ask):
            return (
                Refused("unsupported", "nothing is answered")
                if self._questions is None
                else self._questions.answer(request)
            )
        if self._nixl is None:
            return Refused("unsupported", "nixl is not offered here")
        try:
            return self._nixl.describe() if isinstance(request, NixlAttach) else self._resolve(self._nixl, request)
        except TransferError as error:
            log.error("cannot serve with nixl: %s", error)
            return Refused("unsupported", str(error)[:1024])

    def _send_chunks(self, stream: PeerStream, get: Get) -> None:
        counts = Counter[str]()
        try:
            owed = self._sender.send(stream, get, counts)
        finally:
            self._count(**counts)
        stream.send(owed, self._patience)

    def _resolve(self, nixl: NixlServing, request: Resolve) -> Resolved:
        found = [self._sender.find(key) for key in request.keys]
        serving, addresses = nixl.addresses([located.slot for located in found if located is not None])
        places: list[Place | None] = []
        remaining = iter(addresses)
        for located in found:
            if located is None:
                self._count(gone=1)
                places.append(None)
            else:
                places.append(Place(next(remaining), self._pool.chunk_bytes, located.generation, located.slot))
        return Resolved(serving, places)

    def _validate(self, slot: int, generation: int) -> bytes:
        """The checksum when the slot still holds what was resolved, otherwise empty."""
        if slot >= self._ledger.slots:
            raise MessageError(f"slot {slot} of a pool with {self._ledger.slots} slots")
        is_readable = generation & 1 and self._ledger.is_current(slot, generation)
        checksum = self._ledger.checksum(slot, generation) if is_readable else None
        if checksum is None:
            self._count(stale=1)
            return b""
        self._count(served=1)
        return checksum
