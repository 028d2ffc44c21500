"""Every error that kvmesh raises, in one tree.

    KVMeshError                 root: catch this to catch all of ours
    |- ConfigError              the configuration cannot be used; lists every problem at once
    |- StartupError             something this process needs at start is not there (port busy, no shared memory, ...)
    |  |- VersionError          a program or protocol of a version that is not supported
    |  `- UnsupportedError      a combination (hardware, layout, option) that kvmesh does not do
    |- FormatMismatch           two instances hold KV that is not interchangeable; names the field that differs
    |- PeerError                a conversation with one peer ended early; `.peer` says which
    |  |- LocalPeerError        our side ended it: the peer did nothing wrong and may be asked again
    |  |  |- PeerCancelledError     we gave up on purpose (shutdown, nobody waits for the answer any more)
    |  |  `- LocalProtocolError     we were about to say something the protocol forbids: a bug of ours
    |  `- RemotePeerError       the peer, or the network between, ended it: counts against that peer
    |     |- PeerConnectError       no connection came about
    |     |- PeerReadError          the connection broke while we read
    |     |- PeerWriteError         the connection broke while we wrote
    |     |- PeerTimeoutError       nothing came, or not enough, before the deadline
    |     |  `- PeerStalledError       no byte came for the stall time; the deadline itself has not passed
    |     |- PeerProtocolError      the peer said something the protocol forbids
    |     |- PeerAuthenticationError    one of us does not take the other for a member of the cluster
    |     |- PeerClosedError        the peer closed in good order
    |     `- PeerRefusedError       the peer answered, and the answer is no (full, draining)
    |- DirectoryError           the directory (controller, Redis, list of peers) cannot do its part
    |  |- DirectoryUnavailableError  it cannot be reached or does not answer; the replica goes on without it
    |  `- DirectoryRefusedError  it answered, and the answer is no (id taken, wrong key)
    |     `- ApiRefusedError          the controller's HTTP API said no; `.status` and `.code` say how
    |- TransferError            a transport could not move slots (set-up, registration, checksum); not a peer's doing
    |  `- NixlError              NIXL refused or failed something
    |- ModelError               a model folder cannot be made (package not reachable, not the expected one, ...)
    `- LedgerError              the slot ledger in shared memory is not what it must be (magic, version, size, range)

Rules that hold for all of them:

- An error names the *thing* it is about, what was *expected*, what was *found*, and what to do about it (*hint*). The
  message is made of these four, and they stay readable as attributes, for logs, the API and tests.
- `ConfigError`, `StartupError` and `FormatMismatch` end a start. All others are met at run time and never reach a
  request: whoever catches one turns it into a miss with a reason (`kvmesh.core.reasons`).
- They survive pickling, because they may cross from one process to another.
- No error carries a secret: whoever raises one masks passwords first (`kvmesh.config.mask_secrets`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "ApiRefusedError",
    "ConfigError",
    "ConfigProblem",
    "DirectoryError",
    "DirectoryRefusedError",
    "DirectoryUnavailableError",
    "FormatMismatch",
    "KVMeshError",
    "LedgerError",
    "LocalPeerError",
    "LocalProtocolError",
    "ModelError",
    "NixlError",
    "PeerAuthenticationError",
    "PeerCancelledError",
    "PeerClosedError",
    "PeerConnectError",
    "PeerError",
    "PeerProtocolError",
    "PeerReadError",
    "PeerRefusedError",
    "PeerStalledError",
    "PeerTimeoutError",
    "PeerWriteError",
    "RemotePeerError",
    "StartupError",
    "TransferError",
    "UnsupportedError",
    "VersionError",
]


def _sentence(thing: str, expected: str, found: str, hint: str) -> str:
    """One line of the four parts; parts that are empty are left out."""
    middle = ", ".join(
        part for part in (f"expected {expected}" if expected else "", f"found {found}" if found else "") if part
    )
    text = ": ".join(part for part in (thing, middle) if part)
    return f"{text}; {hint}" if hint else text


class KVMeshError(Exception):
    """Root of the tree.

    Args:
        thing: what the error is about, as the reader knows it: a key, a port, a peer, a file.
        expected: what would have been right. Empty where `thing` alone says it all.
        found: what was there instead.
        hint: what to do about it, as an order: "set peer_port to a free port".
    """

    def __init__(self, thing: str, expected: str = "", found: str = "", hint: str = "") -> None:
        super().__init__(thing, expected, found, hint)
        self.thing = thing
        self.expected = expected
        self.found = found
        self.hint = hint

    def __str__(self) -> str:
        return _sentence(self.thing, self.expected, self.found, self.hint)


@dataclass(frozen=True, slots=True)
class ConfigProblem:
    """One thing that is wrong with a configuration.

    `key` is the name as the user wrote it, `where` the place ("a.yaml:7", "env KVMESH_HOST", "extra", "default").
    """

    key: str
    where: str
    expected: str
    found: str
    hint: str = ""

    def __str__(self) -> str:
        thing = f"{self.key} ({self.where})" if self.where else self.key
        return _sentence(thing, self.expected, self.found, self.hint)


class ConfigError(KVMeshError):
    """The configuration cannot be used. `problems` holds every reason, not only the first; `hint` is about them all."""

    def __init__(self, problems: Iterable[ConfigProblem], hint: str = "") -> None:
        listed = tuple(problems)
        found = "1 problem" if len(listed) == 1 else f"{len(listed)} problems"
        super().__init__("configuration", found=found, hint=hint)
        self.args = (listed, hint)  # what unpickling hands to __init__
        self.problems = listed

    def __str__(self) -> str:
        lines = [f"configuration: {self.found}", *(f"  - {problem}" for problem in self.problems)]
        return "\n".join([*lines, self.hint] if self.hint else lines)


class StartupError(KVMeshError):
    """Something that this process needs at start is missing, busy or broken."""


class VersionError(StartupError):
    """A program, library or protocol has a version that is not supported."""


class UnsupportedError(StartupError):
    """A combination of hardware, layout or options that kvmesh does not do."""


class FormatMismatch(KVMeshError):  # noqa: N818 - the field calls this state a mismatch
    """The KV of two instances is not interchangeable. `field` is the first field that differs."""

    def __init__(self, field: str, ours: str, theirs: str, peer: str = "", hint: str = "") -> None:
        thing = f"format of peer {peer}, field {field}" if peer else f"format, field {field}"
        super().__init__(thing, expected=ours, found=theirs, hint=hint)
        self.args = (field, ours, theirs, peer, hint)
        self.field = field
        self.ours = ours
        self.theirs = theirs
        self.peer = peer


class PeerError(KVMeshError):
    """A conversation with one peer ended early.

    Args:
        peer: who, as the log should name it: instance id, address, or "id at address".
        expected, found, hint: as in KVMeshError.
    """

    def __init__(self, peer: str, expected: str = "", found: str = "", hint: str = "") -> None:
        super().__init__(f"peer {peer}", expected, found, hint)
        self.args = (peer, expected, found, hint)
        self.peer = peer


class LocalPeerError(PeerError):
    """Our side ended the conversation; the peer did nothing wrong."""


class PeerCancelledError(LocalPeerError):
    """We gave up on purpose: shutting down, or nobody waits for the answer any more."""


class LocalProtocolError(LocalPeerError):
    """We were about to say something that the protocol forbids: a bug of ours."""


class RemotePeerError(PeerError):
    """The peer, or the network between, ended the conversation."""


class PeerConnectError(RemotePeerError):
    """No connection came about: refused, unreachable, name unknown."""


class PeerReadError(RemotePeerError):
    """The connection broke while we read from it."""


class PeerWriteError(RemotePeerError):
    """The connection broke while we wrote to it."""


class PeerTimeoutError(RemotePeerError):
    """Nothing came from the peer, or not enough, before the deadline."""


class PeerStalledError(PeerTimeoutError):
    """The peer sent (or took) no byte for the stall time; the deadline itself has not passed."""


class PeerProtocolError(RemotePeerError):
    """The peer said something that the protocol forbids. The connection is closed and not used again."""


class PeerAuthenticationError(RemotePeerError):
    """One of the two does not take the other for a member of the cluster (cluster key, certificate), or what came was
    changed on the way.
    """


class PeerClosedError(RemotePeerError):
    """The peer closed the connection in good order, with answers still owed."""


class PeerRefusedError(RemotePeerError):
    """The peer understood and said no: too many connections, draining."""


class DirectoryError(KVMeshError):
    """The directory (controller, Redis, list of peers) cannot do its part."""


class DirectoryUnavailableError(DirectoryError):
    """The directory cannot be reached or does not answer. Lookups go on from the replica."""


class DirectoryRefusedError(DirectoryError):
    """The directory understood and said no: instance id taken, wrong cluster key."""


class ApiRefusedError(DirectoryRefusedError):
    """The controller's HTTP API answered with an error.

    Args:
        thing, found, hint: as in KVMeshError; the last two are the controller's own words.
        status: of HTTP, 400 or above.
        code: the API's own name for it, such as "unknown_instance"; empty when the answer was none of the API's.
    """

    def __init__(self, thing: str, found: str, hint: str = "", status: int = 0, code: str = "") -> None:
        super().__init__(thing, found=found, hint=hint)
        self.args = (thing, found, hint, status, code)
        self.status = status
        self.code = code

    def __str__(self) -> str:
        told = f"{self.thing}: {self.found}"
        return f"{told}; {self.hint}" if self.hint else told


class TransferError(KVMeshError):
    """A transport could not move slots: set-up, memory registration or checksum."""


class NixlError(TransferError):
    """NIXL refused or failed something; `found` has its own words."""


class ModelError(KVMeshError):
    """A folder with a model for demonstrations or tests cannot be made."""


class LedgerError(KVMeshError):
    """The slot ledger in shared memory is not what it must be: magic, version, size or slot number."""
