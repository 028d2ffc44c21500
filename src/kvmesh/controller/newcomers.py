"""Members whom the others have not been told of yet. Pure state.

If each newcomer were a frame of its own to everybody, a thousand members that join at once, as after a restart of the
controller, would be told of each other in half a million frames. So newcomers are held, as Changes are, until the next
flush, and go out in one frame to each member. Nothing about a newcomer (Changes, a Snapshot) goes out before it.
"""

from __future__ import annotations

from collections.abc import Mapping

from kvmesh.controller.instances import Instance, Send, address
from kvmesh.wire import directory as wire

MAX_MEMBERS_PER_FRAME = 2_000
"""About 1 MB."""


class Newcomers:
    """Who is to be told of."""

    def __init__(self, instances: Mapping[str, Instance]) -> None:
        """`instances`: the members, by id; the registry's own, read here."""
        self._instances = instances
        self._held: dict[str, None] = {}

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, instance_id: str) -> bool:
        return instance_id in self._held

    def hold(self, instance_id: str) -> None:
        """A member that is new, or has changed."""
        self._held[instance_id] = None

    def forget(self, instance_id: str) -> None:
        """It has gone: telling of it after its MemberDown would bring it back."""
        self._held.pop(instance_id, None)

    def tell(self) -> list[Send]:
        """All that are held, to everybody. A single one is spared itself; several find themselves among the others, and
        ignore that.
        """
        held = [self._instances[instance_id] for instance_id in self._held]
        self._held.clear()
        receivers = [one for one in self._instances.values() if not one.downstream.lost and held != [one]]
        if not receivers or not held:
            return []
        if len(held) == 1:
            up = wire.MemberUp(held[0].member)
            return [address(up, wire.encode(up), receivers)]
        sends = []
        for start in range(0, len(held), MAX_MEMBERS_PER_FRAME):
            ups = wire.MembersUp([one.member for one in held[start : start + MAX_MEMBERS_PER_FRAME]])
            sends.append(address(ups, wire.encode(ups), receivers))
        return sends
