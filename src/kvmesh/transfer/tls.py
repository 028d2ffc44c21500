"""Peer connections inside TLS 1.3, with certificates on both sides.

A member is whoever has a certificate of the cluster's CA; host names are not compared, because peers are found by
address. Everything above (Hellos, cluster key, chunks) is the same as without TLS.

OpenSSL retries by itself when the kernel's time-outs end a call on a blocking socket, so these sockets use Python's own
time-outs. A record holds at most 16 KiB, and each is one call: more CPU per byte than the plain stream takes (the
transfer benchmark tells how much).
"""

from __future__ import annotations

import contextlib
import math
import socket
import ssl
from collections.abc import Sequence
from typing import NamedTuple

from kvmesh.config import TlsFiles
from kvmesh.errors import (
    KVMeshError,
    PeerAuthenticationError,
    PeerClosedError,
    PeerReadError,
    PeerWriteError,
    StartupError,
)
from kvmesh.transfer.base import Deadline
from kvmesh.transfer.stream import ARM_TOLERANCE_S, SHORTEST_S, PeerStream

_SEND_PIECE_BYTES = 256 << 10
"""One call's worth: the stall time bounds a call, and a call of OpenSSL returns only when all of it is sent."""
_TLS_HINT = "all instances of a cluster need TLS files of one CA, or none of them"


class Tls(NamedTuple):
    """What a node needs to speak TLS with its peers. Safe to share between threads."""

    client: ssl.SSLContext
    server: ssl.SSLContext

    @classmethod
    def load(cls, files: TlsFiles) -> Tls:
        """Read the files. Raises StartupError that names the one that is no good."""
        client, server = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        client.check_hostname = False
        server.num_tickets = 0  # nobody resumes; and a ticket would make an idle connection look as if it had spoken
        for context in (client, server):
            context.minimum_version = ssl.TLSVersion.TLSv1_3
            context.verify_mode = ssl.CERT_REQUIRED
            load_certificate(context, files)
            try:
                context.load_verify_locations(files.ca_file)
            except OSError as error:  # ssl.SSLError is one
                raise _unusable("tls_ca_file", files.ca_file, "certificates of a CA (PEM)", error) from None
        return cls(client, server)


def load_certificate(context: ssl.SSLContext, files: TlsFiles) -> None:
    """Have `context` show our certificate. Raises StartupError."""
    try:
        context.load_cert_chain(files.cert_file, files.key_file, password=_no_password)
    except (OSError, ValueError) as error:
        thing = f"tls_cert_file {files.cert_file} with tls_key_file"
        raise _unusable(thing, files.key_file, "a certificate and its private key (PEM)", error) from None


def _no_password() -> str:
    raise ValueError("the private key has a password; remove it (openssl pkey -in old -out new)")


def _unusable(name: str, file: str, expected: str, error: Exception) -> StartupError:
    return StartupError(f"{name} {file}", expected=expected, found=str(error))


class TlsStream(PeerStream):
    """A PeerStream inside TLS. `handshake` comes first, in the thread that uses the stream."""

    def __init__(self, sock: socket.socket, peer: str, context: ssl.SSLContext, *, is_server: bool) -> None:
        """Sends nothing yet."""
        self._tls = context.wrap_socket(sock, server_side=is_server, do_handshake_on_connect=False)
        self._allowed_s = math.nan
        super().__init__(self._tls, peer)

    def handshake(self, deadline: Deadline) -> None:
        """Raises PeerAuthenticationError when one side does not take the other's certificate, and as `receive_into`."""
        by_deadline = self._limit(deadline)
        try:
            self._tls.do_handshake()
        except TimeoutError:
            raise self._timed_out(by_deadline, "a TLS handshake") from None
        except (ssl.SSLEOFError, ConnectionError) as error:
            raise self._broken_off(error) from None
        except ssl.SSLError as error:
            raise PeerAuthenticationError(
                self.peer,
                expected="TLS with a certificate of the CA in tls_ca_file",
                found=_words(error),
                hint=_TLS_HINT,
            ) from None
        except OSError as error:
            raise self._broken(PeerReadError, error) from None

    def receive_parts(self, views: Sequence[memoryview], deadline: Deadline) -> None:
        """Fill `views` one after the other, record by record. Raises as `receive_into`."""
        for view in views:
            received = 0
            while received < len(view):
                by_deadline = self._limit(deadline)
                try:
                    count = self._tls.recv_into(view[received:])
                except TimeoutError:
                    raise self._timed_out(by_deadline, "a byte") from None
                except ssl.SSLError as error:
                    raise self._distrusted(error) from None
                except (OSError, ValueError) as error:
                    raise self._broken(PeerReadError, error) from None
                if not count:
                    raise self._broken(PeerClosedError, None)
                received += count

    def send(self, parts: Sequence[bytes | memoryview], deadline: Deadline) -> None:
        """As without TLS: when this returns, every byte has been encrypted and copied, so the memory may be reused."""
        small: list[bytes | memoryview] = []
        for part in parts:
            if len(part) < _SEND_PIECE_BYTES:
                small.append(part)
                continue
            self._send(b"".join(small), deadline)  # one record and one call for a header and what comes before it
            small.clear()
            view = memoryview(part)
            for start in range(0, len(view), _SEND_PIECE_BYTES):
                self._send(view[start : start + _SEND_PIECE_BYTES], deadline)
        self._send(b"".join(small), deadline)

    def _send(self, data: bytes | memoryview, deadline: Deadline) -> None:
        while len(data):
            by_deadline = self._limit(deadline)
            try:
                count = self._tls.send(data)
            except TimeoutError:
                raise self._timed_out(by_deadline, "room to send") from None
            except (OSError, ValueError) as error:
                raise self._broken(PeerWriteError, error) from None
            data = data[count:]

    def wait_readable(self, timeout_s: float) -> bool:
        """True when there is something to read, what has been decrypted already included."""
        return bool(self._tls.pending()) or super().wait_readable(timeout_s)

    def shut_down(self) -> None:
        """As without TLS. Not by the TLS socket's own method: after it, reads would return undecrypted bytes."""
        self._shut = True
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self._tls, socket.SHUT_RDWR)

    def _limit(self, deadline: Deadline) -> bool:
        """Bound the next call; True when it is the deadline that bounds it, not the stall time."""
        by_deadline, allowed_s = self._allowance(deadline)
        if not abs(self._allowed_s - allowed_s) < ARM_TOLERANCE_S:
            try:
                self._tls.settimeout(max(allowed_s, SHORTEST_S) if math.isfinite(allowed_s) else None)
            except OSError as error:
                raise self._broken(PeerReadError, error) from None
            self._allowed_s = allowed_s
        return by_deadline

    def _broken_off(self, error: OSError) -> KVMeshError:
        """It may have died just now; or it takes our handshake for a frame that is too long."""
        if self._shut:
            return self._broken(PeerReadError, error)
        found = f"the connection closed in the TLS handshake ({error.strerror or error})"
        return PeerReadError(self.peer, expected="a TLS handshake", found=found, hint=_TLS_HINT)

    def _distrusted(self, error: ssl.SSLError) -> KVMeshError:
        """In TLS 1.3 a client hears only with its first read that its certificate was not taken."""
        if self._shut or isinstance(error, (ssl.SSLEOFError, ssl.SSLZeroReturnError)):
            return self._broken(PeerReadError, error)
        return PeerAuthenticationError(self.peer, expected="TLS records", found=_words(error))


def _words(error: ssl.SSLError) -> str:
    return getattr(error, "verify_message", "") or error.reason or str(error)
