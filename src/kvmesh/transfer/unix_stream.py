"""A connected unix socket that carries the peer protocol and, with a frame, file descriptors."""

from __future__ import annotations

import array
import contextlib
import os
import socket
import struct
from collections.abc import Sequence

from kvmesh.errors import (
    PeerAuthenticationError,
    PeerClosedError,
    PeerConnectError,
    PeerProtocolError,
    PeerReadError,
    PeerTimeoutError,
    PeerWriteError,
)
from kvmesh.transfer.base import Deadline
from kvmesh.transfer.stream import PeerStream
from kvmesh.wire.auth import Kind
from kvmesh.wire.framing import LENGTH_BYTES, pack_frame

_CREDENTIALS = struct.Struct("iII")
_INT_BYTES = array.array("i").itemsize


class UnixStream(PeerStream):
    """A `PeerStream` over a unix socket."""

    def __init__(self, sock: socket.socket, peer: str) -> None:
        super().__init__(sock, peer)
        self._unix = sock

    def check_user(self) -> None:
        """Raises PeerAuthenticationError unless the other side's process runs as our user. The kernel says so: for the
        side that has connected, of the process that listens; for the other one, of the process that has connected.
        """
        found = user_of(self._unix)
        if found != os.geteuid():
            raise PeerAuthenticationError(
                self.peer, expected=f"a process of our user, uid {os.geteuid()}", found=f"uid {found}"
            )

    def send_frame_with(self, payload: bytes, descriptors: Sequence[int], deadline: Deadline) -> None:
        """Send one frame, and duplicates of `descriptors` with it. Raises as `send`."""
        if self.sending is not None:
            payload += self.sending.mac(Kind.FRAME, payload)
        frame = memoryview(pack_frame(payload))
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
        by_deadline = self._arm(socket.SO_SNDTIMEO, deadline)
        try:
            count = self._unix.sendmsg([frame], rights)
        except BlockingIOError:
            raise self._timed_out(by_deadline, "room to send") from None
        except OSError as error:
            raise self._broken(PeerWriteError, error) from None
        if count < len(frame):
            self.send([frame[count:]], deadline)

    def receive_frame_with(self, deadline: Deadline, limit_bytes: int, most: int) -> tuple[bytes, list[int]]:
        """The next frame's payload and the descriptors that came with it, at most `most`; they are the caller's now.

        Raises as `receive_frame`; then all descriptors are closed.
        """
        descriptors: list[int] = []
        try:
            prefix = self._receive_prefix(descriptors, most, deadline)
            payload = self.receive_rest(prefix, deadline, limit_bytes)
        except BaseException:
            close_all(descriptors)
            raise
        return payload, descriptors

    def _receive_prefix(self, descriptors: list[int], most: int, deadline: Deadline) -> bytes:
        """A frame's length. Descriptors come with the first byte; what is sent with later ones the kernel drops."""
        prefix = b""
        while len(prefix) < LENGTH_BYTES:
            by_deadline = self._arm(socket.SO_RCVTIMEO, deadline)
            space = socket.CMSG_SPACE(most * _INT_BYTES) if not prefix else 0
            try:
                data, ancillary, flags, _ = self._unix.recvmsg(
                    LENGTH_BYTES - len(prefix), space, socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                raise self._timed_out(by_deadline, "a byte") from None
            except OSError as error:
                raise self._broken(PeerReadError, error) from None
            for level, kind, rights in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    found = array.array("i")
                    found.frombytes(rights[: len(rights) - len(rights) % _INT_BYTES])
                    descriptors.extend(found)
            if not data:
                raise self._broken(PeerClosedError, None)
            if space and flags & socket.MSG_CTRUNC:
                raise PeerProtocolError(
                    self.peer, expected=f"at most {most} descriptors that we may take", found="more, or others"
                )
            prefix += data
        return prefix


def user_of(sock: socket.socket) -> int:
    """The effective user id of the process at the other end of a unix socket."""
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(credentials)[1])


def connect_unix(address: bytes, deadline: Deadline, peer: str) -> UnixStream:
    """Connect to a socket of this host. Raises PeerConnectError, PeerTimeoutError, PeerAuthenticationError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        allowed_s = deadline.remaining_s()
        if allowed_s <= 0:
            raise PeerTimeoutError(peer, expected="a connection before the deadline", found="none")
        sock.settimeout(min(allowed_s, deadline.stall_s))
        sock.connect(address)
        stream = UnixStream(sock, peer)
        stream.check_user()
    except OSError as error:
        sock.close()
        raise PeerConnectError(peer, expected="its socket on this host", found=str(error)) from None
    except BaseException:
        sock.close()
        raise
    return stream


def close_all(descriptors: Sequence[int]) -> None:
    """Close descriptors that came from somebody else."""
    for fd in descriptors:
        with contextlib.suppress(OSError):
            os.close(fd)
