"""Why something was not shared: the one enumeration used by metrics, logs, the HTTP API and the web page.

Invariant 2 of the architecture: every failure is a miss, and every miss has one of these reasons.
"""

from __future__ import annotations

from enum import Enum


class MissReason(str, Enum):
    """The reason of one chunk's miss. The value is the label in metrics and JSON: stable, lower case."""

    NO_PEERS = "no_peers"
    """No other instance with our format is a member."""
    NOT_PUBLISHED = "not_published"
    """No holder in the directory: nobody has computed it, or its announcement has not arrived yet."""
    EVICTED = "evicted"
    """The directory named a holder, the holder no longer has the chunk."""
    STALE = "stale"
    """The holder reused the slot while it was sending; what arrived was thrown away."""
    CORRUPT = "corrupt"
    """The bytes that arrived do not have the checksum with which they were published."""
    FORMAT_MISMATCH = "format_mismatch"
    """The peer's KV is not interchangeable with ours; the differing field is in the log and the API."""
    DEADLINE = "deadline"
    """The fetch's deadline passed before the chunk had arrived."""
    PEER_STALLED = "peer_stalled"
    """The peer sent no byte for `stall_timeout_s`."""
    PEER_UNREACHABLE = "peer_unreachable"
    """The peer could not be connected to."""
    PEER_LOST = "peer_lost"
    """The connection broke in the middle of the fetch."""
    UNAUTHENTICATED = "unauthenticated"
    """The peer and this node do not take each other for members of one cluster (its key, a certificate), or what came
    was changed on the way.
    """
    PROTOCOL = "protocol"
    """The peer sent something that the protocol does not allow; its connection was closed."""
    BREAKER_OPEN = "breaker_open"
    """The peer failed recently and is left alone for a moment."""
    RECENTLY_FAILED = "recently_failed"
    """This very chunk could not be fetched a moment ago; it is not tried again at once."""
    NO_DIRECTORY = "no_directory"
    """No holder is known, and the directory cannot be reached now, which might name one."""
    DIRECTORY_SLOW = "directory_slow"
    """The directory was asked who holds the chunk, and had not answered when the engine could not wait any longer."""
    NODE_DOWN = "node_down"
    """The node process of this engine is not running; it is being restarted."""
    POOL_FULL = "pool_full"
    """No slot of the host pool was free to fetch into."""
    SHARING_OFF = "sharing_off"
    """This instance publishes, but its `retrieve_locations` do not name its peers."""
    BELOW_MINIMUM = "below_minimum"
    """The peers hold fewer tokens of the prompt than `min_retrieve_tokens`."""
    GATE_REFUSED = "gate_refused"
    """Computing it is predicted to be faster than fetching it (`fetch_gate`)."""
    DRAINING = "draining"
    """Nothing is fetched because the pool is being reset, or the engine is stopping."""
    BELOW_ONE_CHUNK = "below_one_chunk"
    """The prompt is shorter than one chunk, and only whole chunks are shared."""
    TENANT_SALT = "tenant_salt"
    """The same tokens are known under another `cache_salt` (or none); those of different salts are never shared."""
    NOT_ASKED = "not_asked"
    """The engine did not ask for the chunk: the request or the model does not allow it to be loaded."""
    TRUNCATED = "truncated"
    """An earlier chunk of the same prefix failed, so this one could not have been used."""


PEER_FAULTS = frozenset(
    {
        MissReason.PEER_STALLED,
        MissReason.PEER_UNREACHABLE,
        MissReason.PEER_LOST,
        MissReason.UNAUTHENTICATED,
        MissReason.PROTOCOL,
        MissReason.CORRUPT,
    }
)
"""Reasons that speak against the peer itself, not against one chunk: they open its breaker."""
