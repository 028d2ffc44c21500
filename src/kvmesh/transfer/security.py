"""How a node secures its peer connections: connecting, accepting and authenticating, with or without key and TLS."""

from __future__ import annotations

import secrets
import socket
from dataclasses import dataclass

import msgspec

from kvmesh.errors import PeerAuthenticationError, PeerConnectError
from kvmesh.transfer.base import Deadline
from kvmesh.transfer.stream import PeerStream, connect, connect_socket
from kvmesh.transfer.tls import Tls, TlsStream
from kvmesh.transfer.unix_stream import UnixStream
from kvmesh.wire.auth import CHALLENGE_BYTES, PeerKey
from kvmesh.wire.peer import Hello


@dataclass(frozen=True, repr=False)
class PeerSecurity:
    """What a node has to show to peers and wants to see of them. Safe to share between threads."""

    key: PeerKey | None = None
    tls: Tls | None = None

    def connect(self, host: str, port: int, deadline: Deadline, peer: str) -> PeerStream:
        """Connect, and do TLS's handshake. Raises as `connect_socket` and `TlsStream.handshake`."""
        if self.tls is None:
            return connect(host, port, deadline, peer)
        sock = connect_socket(host, port, deadline, peer)
        try:
            stream = TlsStream(sock, peer, self.tls.client, is_server=False)
        except (OSError, ValueError) as error:  # gone again already
            sock.close()
            raise PeerConnectError(peer, found=str(error)) from None
        try:
            stream.handshake(deadline)
        except BaseException:
            stream.close()
            raise
        return stream

    def accept(self, sock: socket.socket, peer: str) -> PeerStream:
        """The stream of an accepted connection. Waits for nothing: `greet` does."""
        if sock.family == socket.AF_UNIX:
            return UnixStream(sock, peer)
        if self.tls is None:
            return PeerStream(sock, peer)
        return TlsStream(sock, peer, self.tls.server, is_server=True)

    def greet(self, stream: PeerStream, deadline: Deadline) -> None:
        """Do TLS's handshake, if there is TLS, on an accepted stream; look at the user of one within this host. Raises
        as `TlsStream.handshake` and `UnixStream.check_user`.
        """
        if isinstance(stream, UnixStream):
            stream.check_user()
        if isinstance(stream, TlsStream):
            stream.handshake(deadline)

    def challenge(self, hello: Hello) -> Hello:
        """Our Hello for one connection."""
        if self.key is None:
            return hello
        return msgspec.structs.replace(hello, challenge=secrets.token_bytes(CHALLENGE_BYTES))

    def check_challenge(self, theirs: Hello, peer: str) -> None:
        """Raises PeerAuthenticationError unless both sides or neither have a cluster key."""
        if self.key is not None and len(theirs.challenge) != CHALLENGE_BYTES:
            raise PeerAuthenticationError(
                peer,
                expected="a node with our cluster key",
                found="one without any",
                hint="set cluster_key_file or KVMESH_CLUSTER_KEY there",
            )
        if self.key is None and theirs.challenge:
            raise PeerAuthenticationError(
                peer,
                expected="a node without a cluster key, as this one",
                found="one with a key",
                hint="set cluster_key_file or KVMESH_CLUSTER_KEY here",
            )


OPEN = PeerSecurity()
"""No key, no TLS: for loopback, tests and benchmarks."""
