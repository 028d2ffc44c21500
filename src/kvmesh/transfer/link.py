"""The asking side of one conversation with a peer's node: connect, greet, ask (see `kvmesh.wire.peer`)."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from kvmesh.errors import (
    FormatMismatch,
    PeerAuthenticationError,
    PeerConnectError,
    PeerProtocolError,
    PeerRefusedError,
)
from kvmesh.transfer.base import Deadline
from kvmesh.transfer.security import OPEN, PeerSecurity
from kvmesh.transfer.stream import PeerStream
from kvmesh.wire.auth import PeerKey, Role
from kvmesh.wire.directory import Member
from kvmesh.wire.peer import (
    FRAME_LIMIT_BYTES,
    HELLO_LIMIT_BYTES,
    PROTOCOL_VERSION,
    UNAUTHENTICATED,
    Held,
    Hello,
    Lookup,
    Message,
    MessageError,
    Ping,
    Pong,
    Proof,
    Refused,
    decode_answer,
    decode_greeting,
    decode_proven,
    encode,
    format_differences,
    unpack_bits,
)


class PeerTarget(NamedTuple):
    """Whom to talk to, and where that one was last known to listen."""

    instance_id: str
    """Empty: whoever listens there."""
    incarnation: str
    host: str
    port: int
    transports: tuple[str, ...] = ("tcp",)

    @classmethod
    def of(cls, member: Member) -> PeerTarget:
        """As the directory names it."""
        return cls(member.instance_id, member.incarnation, member.peer_host, member.peer_port, tuple(member.transports))

    def __str__(self) -> str:
        return f"{self.instance_id} at {self.host}:{self.port}"


_A = TypeVar("_A", bound=Message)


class PeerLink:
    """One greeted connection, for one thread at a time (`shut_down`: any thread). A method that raised leaves it
    useless: close it.
    """

    def __init__(self, stream: PeerStream, theirs: Hello) -> None:
        self.stream = stream
        self.theirs = theirs
        self._nonce = 0

    @property
    def peer(self) -> str:
        return self.stream.peer

    @classmethod
    def dial(cls, target: PeerTarget, ours: Hello, deadline: Deadline, security: PeerSecurity = OPEN) -> PeerLink:
        """Connect, greet and, with a cluster key, prove to each other that both have it.

        Raises PeerConnectError (nobody, or somebody else, listens there), PeerAuthenticationError, FormatMismatch,
        PeerRefusedError, PeerProtocolError and what `PeerStream` raises.
        """
        stream = security.connect(target.host, target.port, deadline, str(target))
        return cls.greet(stream, target, ours, deadline, security)

    @classmethod
    def greet(
        cls, stream: PeerStream, target: PeerTarget, ours: Hello, deadline: Deadline, security: PeerSecurity = OPEN
    ) -> PeerLink:
        """The same over a stream that is connected already, and is closed when this raises."""
        peer = str(target)
        try:
            hello = encode(security.challenge(ours.wanting(target.instance_id, target.incarnation)))
            stream.send_frame(hello, deadline)
            answer = stream.receive_frame(deadline, HELLO_LIMIT_BYTES)
            theirs = _greeting(answer, peer)
            _check_protocol(theirs, peer)
            security.check_challenge(theirs, peer)
            if security.key is not None:
                _authenticate(stream, security.key, hello, answer, deadline)
            _check_identity(theirs, target, peer)
            _check_format(ours, theirs, peer)
        except BaseException:
            stream.close()
            raise
        return cls(stream, theirs)

    def send(self, message: Message, deadline: Deadline) -> None:
        """Send a request whose answer is read later."""
        self.stream.send_frame(encode(message), deadline)

    def receive(self, kind: type[_A], deadline: Deadline) -> _A:
        """The next answer, which must be of `kind`. Raises PeerRefusedError, PeerProtocolError and what PeerStream
        raises.
        """
        try:
            answer = decode_answer(self.stream.receive_frame(deadline, FRAME_LIMIT_BYTES))
        except MessageError as violation:
            raise PeerProtocolError(self.peer, found=str(violation)) from None
        if isinstance(answer, kind):
            return answer
        if isinstance(answer, Refused):
            raise refusal(answer, self.peer)
        raise PeerProtocolError(self.peer, expected=kind.__name__, found=type(answer).__name__)

    def request(self, message: Message, kind: type[_A], deadline: Deadline) -> _A:
        """Ask and wait for the answer. Raises as `receive`."""
        self.send(message, deadline)
        return self.receive(kind, deadline)

    def lookup(self, keys: Sequence[bytes], deadline: Deadline) -> list[bool]:
        """Which of `keys` (at most MAX_KEYS) the peer holds now. Raises as `receive`."""
        held = self.request(Lookup(list(keys)), Held, deadline)
        try:
            return unpack_bits(held.bitmap, len(keys))
        except MessageError as violation:
            raise PeerProtocolError(self.peer, found=str(violation)) from None

    def ping(self, deadline: Deadline) -> None:
        """Return when the peer's process has answered. Raises as `receive`."""
        self.send_ping(deadline)
        self.receive_pong(deadline)

    def send_ping(self, deadline: Deadline) -> None:
        """First half of `ping`, for callers with something else to do meanwhile."""
        self._nonce += 1
        self.send(Ping(self._nonce), deadline)

    def receive_pong(self, deadline: Deadline) -> None:
        """Second half of `ping`."""
        if self.receive(Pong, deadline).nonce != self._nonce:
            raise PeerProtocolError(self.peer, expected=f"pong {self._nonce}", found="another one")

    def is_quiet(self) -> bool:
        """True while the peer has neither closed nor said anything unasked: an idle link that may be used again."""
        return not self.stream.wait_readable(0)

    def shut_down(self) -> None:
        """Make the call that another thread is in fail at once."""
        self.stream.shut_down()

    def close(self) -> None:
        """Close the connection. Never raises."""
        with contextlib.suppress(OSError):
            self.stream.close()


def _greeting(payload: bytes, peer: str) -> Hello:
    try:
        greeting = decode_greeting(payload)
    except MessageError as violation:
        raise PeerProtocolError(peer, expected="a kvmesh node's Hello", found=str(violation)) from None
    if isinstance(greeting, Refused):
        raise refusal(greeting, peer)
    return greeting


def refusal(refused: Refused, peer: str) -> PeerRefusedError | PeerAuthenticationError:
    """What to raise for a peer's answer that it will not."""
    kind = PeerAuthenticationError if refused.code == UNAUTHENTICATED else PeerRefusedError
    return kind(peer, found=f"refused ({refused.code}): {refused.text}")


def _authenticate(stream: PeerStream, key: PeerKey, ours: bytes, theirs: bytes, deadline: Deadline) -> None:
    """The fetcher's half of `kvmesh.wire.auth`. Raises PeerAuthenticationError."""
    handshake = key.handshake(Role.FETCHER, ours, theirs)
    stream.send_frame(encode(Proof(handshake.proof())), deadline)
    try:
        answer = decode_proven(stream.receive_frame(deadline, HELLO_LIMIT_BYTES))
    except MessageError as violation:
        raise PeerProtocolError(stream.peer, expected="a Proof", found=str(violation)) from None
    if isinstance(answer, Refused):
        raise refusal(answer, stream.peer)
    if not handshake.accepts(answer.proof):
        raise PeerAuthenticationError(stream.peer, expected="a proof of our cluster key", found="another one")
    stream.secure(handshake.session())


def _check_protocol(theirs: Hello, peer: str) -> None:
    if theirs.protocol != PROTOCOL_VERSION:
        raise PeerProtocolError(peer, expected=f"protocol {PROTOCOL_VERSION}", found=f"protocol {theirs.protocol}")


def _check_identity(theirs: Hello, target: PeerTarget, peer: str) -> None:
    if target.instance_id and (theirs.instance_id, theirs.incarnation) != (target.instance_id, target.incarnation):
        raise PeerConnectError(
            peer,
            expected=f"incarnation {target.incarnation}",
            found=f"instance {theirs.instance_id} incarnation {theirs.incarnation}: the address was reused",
        )


def _check_format(ours: Hello, theirs: Hello, peer: str) -> None:
    found = format_differences(ours, theirs)
    if found:
        rest = "; ".join(str(difference) for difference in found[1:])
        raise FormatMismatch(*found[0], peer=peer, hint=f"also differing: {rest}" if rest else "")
