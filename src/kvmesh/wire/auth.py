"""Who belongs to the cluster, and whether anything was changed between two nodes. Pure; this is the specification.

All members share one cluster key. Nothing is ever encrypted or signed with it: from it, HKDF-SHA256 (RFC 5869) derives
a separate key for each purpose, so that what leaks about one says nothing about another.

Peer connections. Each Hello (`kvmesh.wire.peer`) carries a fresh challenge of 32 random bytes. With H_f and H_h, the
payloads of the two Hello frames exactly as they were sent,

    transcript = SHA256("kvmesh peer 1" | len(H_f) | H_f | len(H_h) | H_h)
    session    = HKDF(peer key, transcript)
    proofs     = HKDF(session, "fetcher proof"), HKDF(session, "holder proof")
    MAC keys   = HKDF(session, "fetcher to holder"), HKDF(session, "holder to fetcher")

    fetcher                               holder
     |-- Hello(challenge) --------------->|
     |<--------------- Hello(challenge) --|
     |-- Proof -------------------------->|  wrong: Refused("unauthenticated"), closed, nothing else is read
     |<-------------------------- Proof --|  wrong: closed, nothing is asked

The fetcher proves first, so that a stranger who merely connects learns nothing with which to try keys offline. Both
identities, the wanted identity and both roles are under the proofs: a proof says nothing in another connection, in the
other role or towards another peer.

From then on everything in a direction (frames, chunk headers, chunk trailers) is numbered from 0, and carries

    BLAKE2b-128(key = the direction's MAC key, number as 8 bytes little endian | kind, one byte | the bytes themselves)

so that what is changed, left out, repeated, swapped or sent back is refused. Numbers are consecutive, so a trailer
belongs to the header before it. Chunk payloads are bound through the checksum in the trailer only, and xxh3-128 is no
cryptographic hash: it finds accidents. Somebody who can change packets on the way can forge a payload to it; against
that, and against listeners, use TLS (`docs/security.md`).
"""

from __future__ import annotations

import hmac
import struct
from enum import Enum
from hashlib import blake2b, sha256
from typing import Final, NamedTuple

KEY_MIN_BYTES: Final = 16
CHALLENGE_BYTES: Final = 32
PROOF_BYTES: Final = 32
MAC_BYTES: Final = 16
_HASH_BYTES = 32
_LENGTH = struct.Struct("<Q")
_NUMBER = struct.Struct("<Qc")


class AuthenticationError(ValueError):
    """Bytes do not carry the MAC that they must have; the connection must be closed."""


def hkdf_sha256(secret: bytes, info: bytes, length_bytes: int = 32, salt: bytes = b"") -> bytes:
    """HKDF with SHA-256, extract and expand (RFC 5869)."""
    pseudo_random = hmac.digest(salt or bytes(_HASH_BYTES), secret, "sha256")
    blocks, block = b"", b""
    for number in range(1, -(-length_bytes // _HASH_BYTES) + 1):
        block = hmac.digest(pseudo_random, block + info + bytes([number]), "sha256")
        blocks += block
    return blocks[:length_bytes]


class ClusterKey:
    """The secret that all members share. Shows itself to nobody; `derive` is all there is to do with it."""

    __slots__ = ("_secret",)

    def __init__(self, text: str) -> None:
        """Raises ValueError, without the text, when it is too short."""
        secret = text.strip().encode()
        if len(secret) < KEY_MIN_BYTES:
            raise ValueError(f"a cluster key has at least {KEY_MIN_BYTES} bytes")
        self._secret = secret

    def derive(self, purpose: str) -> bytes:
        """32 bytes for one purpose."""
        return hkdf_sha256(self._secret, b"kvmesh " + purpose.encode())

    def peer_key(self) -> PeerKey:
        """What peer connections are authenticated with."""
        return PeerKey(self.derive("peer connections"))

    def http_token(self) -> str:
        """What an HTTP request that changes something must show."""
        return self.derive("http token").hex()

    def __repr__(self) -> str:
        return "ClusterKey(***)"

    def __reduce__(self) -> str:
        raise TypeError("a cluster key is not to be pickled")


class Role(Enum):
    """The two ends of a peer connection. The value is the label in what is derived for it."""

    FETCHER = b"fetcher"
    HOLDER = b"holder"

    @property
    def other(self) -> Role:
        """The opposite end."""
        return Role.HOLDER if self is Role.FETCHER else Role.FETCHER


class PeerKey:
    """Authenticates peer connections. Safe to share between threads."""

    __slots__ = ("_secret",)

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def handshake(self, role: Role, fetcher_hello: bytes, holder_hello: bytes) -> Handshake:
        """The proofs of one connection, from the payloads of its Hello frames."""
        digest = sha256(b"kvmesh peer 1")
        for hello in (fetcher_hello, holder_hello):
            digest.update(_LENGTH.pack(len(hello)) + hello)
        return Handshake(role, hkdf_sha256(self._secret, digest.digest()))

    def __repr__(self) -> str:
        return "PeerKey(***)"


class Handshake:
    """One side's view of one connection: what it shows, what it wants to see, and what follows."""

    __slots__ = ("_role", "_session")

    def __init__(self, role: Role, session: bytes) -> None:
        self._role = role
        self._session = session

    def proof(self) -> bytes:
        """What we show."""
        return self._proof_of(self._role)

    def accepts(self, proof: bytes) -> bool:
        """Whether the other side has shown the same key over the same Hellos."""
        return hmac.compare_digest(self._proof_of(self._role.other), proof)

    def session(self) -> Session:
        """The MACs of the connection; to be used only after `accepts` has said yes."""
        return Session(self._chain(self._role, self._role.other), self._chain(self._role.other, self._role))

    def _proof_of(self, role: Role) -> bytes:
        return hkdf_sha256(self._session, role.value + b" proof", PROOF_BYTES)

    def _chain(self, sender: Role, receiver: Role) -> MacChain:
        return MacChain(hkdf_sha256(self._session, sender.value + b" to " + receiver.value))


class Kind(Enum):
    """What is under a MAC."""

    FRAME = b"F"
    HEADER = b"H"
    TRAILER = b"T"


class MacChain:
    """One direction of one connection: numbers what goes by. For one thread at a time."""

    __slots__ = ("_keyed", "_number")

    def __init__(self, key: bytes) -> None:
        self._keyed = blake2b(key=key, digest_size=MAC_BYTES)
        self._number = 0

    def mac(self, kind: Kind, data: bytes | bytearray | memoryview) -> bytes:
        """The MAC of what is sent next."""
        keyed = self._keyed.copy()  # spares it the key's block
        keyed.update(_NUMBER.pack(self._number, kind.value))
        keyed.update(data)
        self._number += 1
        return keyed.digest()

    def check(self, kind: Kind, data: bytes | bytearray | memoryview, mac: bytes | bytearray | memoryview) -> None:
        """Take what has come next. Raises AuthenticationError, after which nothing more is to be taken."""
        if not hmac.compare_digest(self.mac(kind, data), mac):
            raise AuthenticationError("wrong MAC: changed, left out, repeated or swapped on the way")


class Session(NamedTuple):
    """Both directions of one authenticated connection, as one side sees them."""

    sending: MacChain
    receiving: MacChain
