"""What an engine knows of its node and of the directory behind it."""

from __future__ import annotations

from typing import NamedTuple

from kvmesh.core.reasons import MissReason
from kvmesh.wire.operations import Sharing


class NodeState(NamedTuple):
    """What is known of the node and its directory, for miss reasons and status."""

    alive: bool
    directory_connected: bool
    directory_ever_connected: bool
    peers: int
    sharing: Sharing = Sharing.ON
    asks: bool = False
    """The node asks the directory for each request (`NodeHandle.ask`) instead of knowing everything."""

    def why_invisible(self) -> MissReason:
        """Why a chunk that no other instance is known to hold is not known of."""
        if not self.alive:
            return MissReason.NODE_DOWN
        if self.sharing is not Sharing.ON:
            return MissReason.DRAINING
        if not self.directory_connected:
            return MissReason.NO_DIRECTORY
        return MissReason.NOT_PUBLISHED if self.peers else MissReason.NO_PEERS


DOWN = NodeState(False, False, False, 0)
