"""The serving side of shm: a unix socket on which nodes of this host get read-only descriptors of pool and ledger.

From then on they read by themselves, and this process has nothing to do with it. The socket is an abstract one, which
exists in one network namespace: containers that share no network share no memory either, and fetch over tcp. Its name
is made of what the directory says of the holder, so that a peer sees without asking anybody whether it is on this host.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence

from kvmesh.core.ledger import SlotLedger
from kvmesh.errors import StartupError
from kvmesh.transfer.pool import HostPool
from kvmesh.transfer.unix_stream import close_all, user_of
from kvmesh.wire.peer import MAX_SEGMENTS, ShmAttached, ShmSegment

BACKLOG = 32


def socket_address(peer_port: int, incarnation: str) -> bytes:
    """Where the holder with that peer port and incarnation listens, if it is on this host."""
    return f"\0kvmesh-shm-{peer_port}-{incarnation}".encode()


def why_not_shared(peer_port: int, incarnation: str) -> str | None:
    """Why a holder's memory cannot be shared; None when it can. Does not wait."""
    try:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    except OSError as error:  # too many open files
        return f"no socket to be had: {error}"
    with sock:
        try:
            sock.connect(socket_address(peer_port, incarnation))
        except BlockingIOError:
            return None  # it listens and is busy; who it is shows later
        except OSError:
            return "the peer is not on this host, or in another network namespace"
        user = user_of(sock)
    return None if user == os.geteuid() else f"the peer runs as another user, uid {user}"


class ShmHolder:
    """Hands out descriptors of one pool and its ledger. All methods may be called from any thread."""

    def __init__(self, pool: HostPool, ledger: SlotLedger, incarnation: str) -> None:
        """Opens the pool's and the ledger's files once more, for reading only. Raises StartupError."""
        self._incarnation = incarnation
        self._descriptors: list[int] = []
        files = [ledger.fd, *(segment.fd for segment in pool.segments)]
        if len(files) > MAX_SEGMENTS + 1:
            expected, found = f"a pool of at most {MAX_SEGMENTS} files", f"{len(files) - 1} files"
            raise StartupError("sharing memory with nodes of this host", expected=expected, found=found)
        try:
            for fd in files:
                self._descriptors.append(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            close_all(self._descriptors)
            raise StartupError(
                "sharing memory with nodes of this host",
                expected="the pool's files to be readable through /proc/self/fd",
                found=str(error),
                hint="mount /proc, or set transfer_channel to tcp",
            ) from None
        self._attached = ShmAttached([ShmSegment(part.offset_bytes, part.length_bytes) for part in pool.segments])

    def listen(self, peer_port: int) -> socket.socket:
        """Bind and listen. Raises StartupError."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            sock.bind(socket_address(peer_port, self._incarnation))
            sock.listen(BACKLOG)
        except OSError as error:
            sock.close()
            raise StartupError(
                "sharing memory with nodes of this host",
                expected="an abstract unix socket",
                found=str(error),
                hint="set transfer_channel to tcp",
            ) from None
        return sock

    def describe(self) -> tuple[ShmAttached, Sequence[int]]:
        """What a peer needs to read from us, and the descriptors that go with it, which stay ours."""
        return self._attached, self._descriptors

    def close(self) -> None:
        """Close our descriptors; whoever has got duplicates keeps them. Safe to call twice."""
        descriptors, self._descriptors = self._descriptors, []
        close_all(descriptors)
