"""The answering side of the peer protocol (see `kvmesh.wire.peer`): ports, connections and greetings. What is answered
then is in `peer_answers.py`.

A thread per accepted connection, in blocking calls: what moves the bytes is the kernel, and a peer that is slow,
stopped or malicious holds up nobody but itself. A slot is sent straight from the pool, without a lock: the ledger's
generation, read before the first and after the last byte, says in the trailer whether what was sent is what was asked
for.
"""

from __future__ import annotations

import contextlib
import logging
import math
import socket
import threading
import time
from collections import Counter
from typing import NamedTuple

from kvmesh.core.ledger import SlotLedger
from kvmesh.errors import (
    KVMeshError,
    PeerAuthenticationError,
    PeerCancelledError,
    PeerClosedError,
    PeerProtocolError,
    PeerReadError,
    StartupError,
)
from kvmesh.logs import LogLimiter
from kvmesh.node.peer_answers import Answering, FollowServing, NixlServing, OfferTaking, PeerAnswers, ShmServing
from kvmesh.transfer.base import Deadline, Locate
from kvmesh.transfer.coding import Coding
from kvmesh.transfer.pool import HostPool
from kvmesh.transfer.security import OPEN, PeerSecurity
from kvmesh.transfer.stream import PeerStream
from kvmesh.wire.auth import Role
from kvmesh.wire.peer import (
    FRAME_LIMIT_BYTES,
    HELLO_LIMIT_BYTES,
    PROTOCOL_VERSION,
    UNAUTHENTICATED,
    Hello,
    MessageError,
    Proof,
    Refused,
    decode_hello,
    decode_proof,
    decode_request,
    encode,
    format_differences,
)

log = logging.getLogger(__name__)


class PeerServerStatistics(NamedTuple):
    """Counters since the start."""

    connections: int
    """Open now."""
    accepted: int
    served_chunks: int
    """Chunks sent or validated as VALID."""
    served_bytes: int
    stale: int
    gone: int
    refused: int
    """Connections turned away: too many, wrong identity or wrong format."""
    protocol_errors: int
    unauthenticated: int
    """Connections of strangers, closed: no cluster key or another one, no certificate, or changed on the way."""


class PeerServer:
    """Serves one pool. `start`, `close` and `statistics` from any thread; `locate` is called by the connections'
    threads.
    """

    def __init__(
        self,
        pool: HostPool,
        ledger: SlotLedger,
        locate: Locate,
        ours: Hello,
        *,
        host: str,
        port: int,
        lookup_port: int | None = None,
        nixl: NixlServing | None = None,
        shm: ShmServing | None = None,
        security: PeerSecurity = OPEN,
        following: FollowServing | None = None,
        offers: OfferTaking | None = None,
        questions: Answering | None = None,
        coding: Coding | None = None,
        max_connections: int = 256,
        handshake_timeout_s: float = 5.0,
        stall_timeout_s: float = 10.0,
        idle_timeout_s: float = 600.0,
        spare_idle_s: float = 5.0,
    ) -> None:
        """Binds nothing yet.

        Args:
            pool: the slots to serve.
            ledger: says which of them are readable.
            locate: finds a published chunk by its key.
            ours: this node's Hello: identity and format.
            host: address or name to listen on.
            port: where to listen; 0 takes a free one (see the property `port`).
            lookup_port: a second port for the same protocol, for lookups; None for none.
            nixl: lets peers read our slots with NIXL; None when that is not offered.
            shm: lets peers of this host read our slots by themselves; None when that is not offered.
            security: the cluster key and TLS, where there are any.
            following: tells peers what we hold, for those without a directory; None when nobody is to be told.
            offers: takes over the chunks of peers that are about to leave; None when that is not done here.
            questions: answers those of a controller; None when that is not done here.
            coding: the wire codec that `ours` offers; None for none.
            max_connections: further ones take the place of idle ones, or are refused when there is none.
            handshake_timeout_s: for the first frame of a stranger.
            stall_timeout_s: for a peer that stops in the middle of a frame, or stops reading what it asked for.
            idle_timeout_s: for a connection that asks nothing. Peers reopen theirs without loss.
            spare_idle_s: a connection that has asked something (or was opened) so recently keeps its place when all
                are taken: its peer may be about to ask.
        """
        self._chunk_bytes = pool.chunk_bytes
        self._ours = ours
        self._shm = shm
        self._security = security
        self._binds = [(host, port)] + ([(host, lookup_port)] if lookup_port is not None else [])
        self._max_connections = max_connections
        self._handshake_timeout_s = handshake_timeout_s
        self._patience = Deadline(math.inf, stall_timeout_s)  # no end as long as bytes flow
        self._idle_timeout_s = idle_timeout_s
        self._spare_idle_s = spare_idle_s
        self._listeners: list[socket.socket] = []
        self._ports: list[int] = []
        self._lock = threading.Lock()
        self._streams: dict[PeerStream, threading.Thread] = {}
        self._idle: dict[PeerStream, float] = {}
        """Connections between two requests and since when, the one that has waited longest first."""
        self._acceptors: list[threading.Thread] = []
        self._closing = threading.Event()
        self._counts = Counter[str]()
        self._limiter = LogLimiter()
        self._answers = PeerAnswers(
            pool,
            ledger,
            locate,
            nixl=nixl,
            shm=shm,
            following=following,
            offers=offers,
            questions=questions,
            coding=coding,
            patience=self._patience,
            idle_timeout_s=idle_timeout_s,
            closing=self._closing,
            count=self._count,
        )

    def start(self) -> None:
        """Bind and serve. Raises StartupError that names the port."""
        try:
            for host, port in self._binds:
                self._listeners.append(_listen(host, port))
            self._ports = [listener.getsockname()[1] for listener in self._listeners]
            if self._shm is not None:
                self._listeners.append(self._shm.listen(self.port))
        except StartupError:
            self.close()
            raise
        for listener in self._listeners:
            acceptor = threading.Thread(target=self._accept, args=(listener,), name="kvmesh-peer-accept", daemon=True)
            self._acceptors.append(acceptor)
            acceptor.start()

    @property
    def port(self) -> int:
        """The bound peer port."""
        return self._ports[0]

    @property
    def lookup_port(self) -> int | None:
        """The bound lookup port; None when there is none."""
        return self._ports[1] if len(self._ports) > 1 else None

    def statistics(self) -> PeerServerStatistics:
        """Counters; from any thread."""
        with self._lock:
            counts = self._counts
            return PeerServerStatistics(
                connections=len(self._streams),
                accepted=counts["accepted"],
                served_chunks=counts["served"],
                served_bytes=counts["served"] * self._chunk_bytes,
                stale=counts["stale"],
                gone=counts["gone"],
                refused=counts["refused"],
                protocol_errors=counts["protocol_errors"],
                unauthenticated=counts["unauthenticated"],
            )

    def close(self) -> None:
        """Stop serving: when this returns, no thread of the server reads the pool any more. Safe to call twice."""
        self._closing.set()
        for listener in self._listeners:
            with contextlib.suppress(OSError):  # never connected, on some kernels
                listener.shutdown(socket.SHUT_RDWR)
        for acceptor in self._acceptors:
            acceptor.join()
        for listener in self._listeners:
            listener.close()
        with self._lock:
            serving = dict(self._streams)
        for stream in serving:
            stream.shut_down()
        for thread in serving.values():
            thread.join()

    # -- connections ---------------------------------------------------------------------------------------------------

    def _accept(self, listener: socket.socket) -> None:
        while not self._closing.is_set():
            try:
                sock, address = listener.accept()
            except OSError as error:
                if not self._closing.is_set():
                    log.error("cannot accept peers, trying again: error=%s", error)  # such as: too many open files
                    self._closing.wait(0.5)
                continue
            try:
                peer = "unix:shm" if sock.family == socket.AF_UNIX else f"{address[0]}:{address[1]}"
                self._admit(self._security.accept(sock, peer))
            except Exception as error:  # already gone, or no thread to be had; whatever it is, others are served
                sock.close()
                log.error("cannot serve peer %s: error=%r", address, error)

    def _admit(self, stream: PeerStream) -> None:
        """Give the connection a thread; when all places are taken, that of the one that has been idle longest.

        Without that, 256 nodes that opened theirs early would keep all others out. Who loses an idle connection opens
        another one for its next request.
        """
        displaced: PeerStream | None = None
        with self._lock:
            is_full = len(self._streams) >= self._max_connections
            oldest = next(iter(self._idle.items()), None)
            if is_full and oldest is not None and time.monotonic() - oldest[1] >= self._spare_idle_s:
                displaced = oldest[0]
                del self._idle[displaced]
                is_full = False
            if not is_full:
                self._counts["accepted"] += 1
                thread = threading.Thread(
                    target=self._serve, args=(stream,), name=f"kvmesh-peer-{stream.peer}", daemon=True
                )
                self._streams[stream] = thread
                try:
                    thread.start()
                except RuntimeError:
                    del self._streams[stream]
                    raise
        if displaced is not None:
            displaced.shut_down()
        if is_full:
            self._count(refused=1)
            self._warn(stream, "peer refused peer=%s reason=full connections=%d", stream.peer, self._max_connections)
            if self._security.tls is None:  # its handshake would hold up everybody who comes after
                refusal = Refused("full", f"{self._max_connections} connections are open already")
                with contextlib.suppress(KVMeshError):
                    stream.send_frame(encode(refusal), _soon(0.1))  # a fresh socket's buffer takes it at once
            stream.close()

    def _serve(self, stream: PeerStream) -> None:
        """One connection's thread: from its Hello to its end."""
        try:
            if self._greet(stream):
                self._answer_all(stream)
        except PeerAuthenticationError as error:
            self._count(unauthenticated=1)
            self._warn(stream, "peer refused peer=%s reason=unauthenticated error=%s", stream.peer, error)
        except (PeerProtocolError, MessageError) as error:
            self._count(protocol_errors=1)
            self._warn(stream, "peer connection closed peer=%s reason=protocol error=%s", stream.peer, error)
        except PeerCancelledError:
            pass
        except PeerClosedError:
            log.debug("peer connection closed peer=%s reason=closed_by_peer", stream.peer)
        except KVMeshError as error:
            self._warn(
                stream, "peer connection closed peer=%s reason=%s error=%s", stream.peer, type(error).__name__, error
            )
        except Exception:
            log.exception("peer connection closed peer=%s reason=internal", stream.peer)
        finally:
            with self._lock:
                stream.close()
                self._streams.pop(stream, None)

    def _greet(self, stream: PeerStream) -> bool:
        """Exchange Hellos and, with a cluster key, Proofs; False when this peer is not to be served."""
        deadline = _soon(self._handshake_timeout_s)
        self._security.greet(stream, deadline)
        received = stream.receive_frame(deadline, HELLO_LIMIT_BYTES)
        theirs = decode_hello(received)
        stream.peer = f"{theirs.instance_id} from {stream.peer}"
        try:
            self._security.check_challenge(theirs, stream.peer)
        except PeerAuthenticationError as error:
            _refuse_stranger(stream, error, deadline)
            raise
        sent = encode(self._security.challenge(self._ours))
        stream.send_frame(sent, deadline)
        if theirs.protocol != PROTOCOL_VERSION:
            raise PeerProtocolError(
                stream.peer, expected=f"protocol {PROTOCOL_VERSION}", found=f"protocol {theirs.protocol}"
            )
        self._authenticate(stream, received, sent, deadline)
        wanted = (theirs.wanted_instance_id, theirs.wanted_incarnation)
        if wanted not in {("", ""), (self._ours.instance_id, self._ours.incarnation)}:
            self._count(refused=1)
            self._warn(
                stream, "peer refused peer=%s reason=looking_for_another wanted=%s incarnation=%s", stream.peer, *wanted
            )
            return False
        differing = format_differences(self._ours, theirs)
        if differing:
            self._count(refused=1)
            fields = "; ".join(map(str, differing))
            self._warn(stream, "peer refused peer=%s reason=format_mismatch fields=%s", stream.peer, fields)
            return False
        return True

    def _authenticate(self, stream: PeerStream, theirs: bytes, ours: bytes, deadline: Deadline) -> None:
        """The holder's half of `kvmesh.wire.auth`. Raises PeerAuthenticationError."""
        if self._security.key is None:
            return
        handshake = self._security.key.handshake(Role.HOLDER, theirs, ours)
        if not handshake.accepts(decode_proof(stream.receive_frame(deadline, HELLO_LIMIT_BYTES)).proof):
            error = PeerAuthenticationError(stream.peer, expected="a proof of our cluster key", found="another one")
            _refuse_stranger(stream, error, deadline)
            raise error
        stream.send_frame(encode(Proof(handshake.proof())), deadline)
        stream.secure(handshake.session())

    def _wait_for_request(self, stream: PeerStream) -> bool:
        with self._lock:
            self._idle[stream] = time.monotonic()
        try:
            return stream.wait_readable(self._idle_timeout_s)
        finally:
            with self._lock:
                self._idle.pop(stream, None)

    def _answer_all(self, stream: PeerStream) -> None:
        while self._wait_for_request(stream):
            try:
                payload = stream.receive_frame(self._patience, FRAME_LIMIT_BYTES)
            except PeerReadError as error:
                raise PeerClosedError(stream.peer, found=error.found) from None  # reset between requests: it just left
            if not self._answers.answer(stream, decode_request(payload)):
                return

    # -- counters ------------------------------------------------------------------------------------------------------

    def _warn(self, stream: PeerStream, text: str, *values: object) -> None:
        """One line per address and kind of event at a time: what a stranger can make us write has an end."""
        address = stream.peer.rpartition(":")[0].rpartition(" ")[2]
        with self._lock:
            suppressed = self._limiter.allow(f"{text} {address}", time.monotonic())
        if suppressed:
            text, values = f"{text} suppressed=%d", (*values, suppressed)
        if suppressed is not None:
            log.warning(text, *values)

    def _count(self, **counts: int) -> None:
        with self._lock:
            self._counts.update(counts)


def _refuse_stranger(stream: PeerStream, error: PeerAuthenticationError, deadline: Deadline) -> None:
    """Say why, if it can still be said: the other side's log is where its operator looks."""
    text = f"expected {error.expected}, found {error.found}"
    with contextlib.suppress(KVMeshError):
        stream.send_frame(encode(Refused(UNAUTHENTICATED, text)), deadline)


def _soon(timeout_s: float) -> Deadline:
    return Deadline(time.monotonic() + timeout_s, timeout_s)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=128)
    except OSError as error:
        raise StartupError(
            f"peer port {host}:{port}",
            expected="a free port on an address of this host",
            found=str(error),
            hint="set the peer port (p2p_init_ports, p2p_lookup_ports) or p2p_host to one that is free",
        ) from None
