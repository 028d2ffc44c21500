"""Leaving a cluster without a controller: the node tells its peers what only it holds, and they fetch it.

    preStop hook or a person -> admin port -> Drain.run
        no new announcements and fetches; what is announced can still be fetched
        own engine      which chunks are hot
        directory       which of them nobody else holds
        peers           Offer: each has its engine fetch its share, as the operation `warm` does
        leave           when the directory says that all is held elsewhere, or nothing moves any more

The same steps as those of the controller's operation (`kvmesh.controller.operation_runs`), for Redis and
`static_peers`.
`take` is called by the peer server's threads, everything else runs on the node's event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from kvmesh.core.share_out import Room, share_out
from kvmesh.errors import KVMeshError
from kvmesh.node.bridge import Bridge, NotAnsweredError
from kvmesh.transfer.base import Deadline
from kvmesh.transfer.link import PeerLink, PeerTarget
from kvmesh.wire.control import ControlError
from kvmesh.wire.directory import Member
from kvmesh.wire.operations import ListHot, RunState, Sharing, WarmChunks
from kvmesh.wire.peer import MAX_KEYS, Accepted, Offer, Refused

if TYPE_CHECKING:
    from kvmesh.node.process import Node
    from kvmesh.node.transports import Transports

log = logging.getLogger("kvmesh.operations")

ROUNDS = 3
"""Offers to those who are left, when some have refused theirs."""
POLL_S = 0.05
SETTLED_S = 10.0
"""When nothing has been taken over for so long, nothing will be."""
LEAVE_DELAY_S = 0.1
"""The answer goes first."""
STALL_S = 10.0
ACCEPT_S = 8.0
"""So long a peer may take to say whether it takes an Offer."""


class Drained(msgspec.Struct, frozen=True, kw_only=True):
    """How a drain went."""

    instance_id: str
    sharing: Sharing
    """What the node takes part in from now on."""
    handed_over: int
    """Chunks that nobody else held before, and somebody does now."""
    lost: int
    """Hot chunks that still nobody else holds."""
    seconds: float


class Drain:
    """The drain of one node, and its part in those of others."""

    def __init__(self, node: Node, transports: Transports, bridge: Bridge) -> None:
        self._node = node
        self._bridge = bridge
        self._transports = transports
        self._is_running = False

    async def run(self, *, hand_over: int, timeout_s: float, leave: bool) -> Drained:
        """Stop sharing, have peers take over at most `hand_over` chunks, and leave (or stay without sharing).

        Raises ControlError when this node has left already (`left`), is being drained (`busy`), or has chunks that
        nobody can take over (`no_receiver`); then it goes on as before.
        """
        node, started_s = self._node, time.monotonic()
        if node.sharing is Sharing.LEFT:
            raise ControlError("left", "this instance has left; it comes back when its engine is started anew")
        if self._is_running:
            raise ControlError("busy", "this instance is being drained already")
        self._is_running = True
        try:
            node.set_sharing(Sharing.DRAINING)
            handed_over, lost = await self._hand_over(hand_over, started_s + timeout_s) if hand_over else (0, 0)
        except BaseException:
            node.set_sharing(Sharing.ON)
            raise
        finally:
            self._is_running = False
        node.set_sharing(Sharing.DRAINED)
        if leave:
            asyncio.get_running_loop().call_later(LEAVE_DELAY_S, node.leave)
        seconds = time.monotonic() - started_s
        log.info("drained handed_over=%d lost=%d seconds=%.1f leaves=%s", handed_over, lost, seconds, leave)
        sharing = Sharing.LEFT if leave else Sharing.DRAINED
        return Drained(
            instance_id=node.instance_id, sharing=sharing, handed_over=handed_over, lost=lost, seconds=seconds
        )

    # -- handing over --------------------------------------------------------------------------------------------------

    async def _hand_over(self, limit: int, until_s: float) -> tuple[int, int]:
        """How many chunks were handed over, and how many were not."""
        report = await self._node.operations.finish(ListHot(limit=limit), max(1.0, until_s - time.monotonic()))
        if report.state is not RunState.DONE:
            raise ControlError("engine", report.text or "the engine does not say which chunks are hot")
        alone = await self._alone(report.keys)
        found = len(alone)
        receivers = {peer.member.instance_id: peer.member for peer in self._node.peers}
        for _ in range(ROUNDS):
            if not alone or time.monotonic() >= until_s:
                break
            refused = await self._offer_all(receivers, alone, until_s)
            for name in refused:
                del receivers[name]
            if not receivers:
                break
            alone = await self._settle(alone, until_s)
            if not refused:
                break
        if alone and not receivers:
            hint = "start another instance of its format, or drain with hand_over 0 and lose them"
            text = f"there is nobody to hand over to, and {len(alone)} chunks are nowhere else: {hint}"
            raise ControlError("no_receiver", text)
        return found - len(alone), len(alone)

    async def _offer_all(self, receivers: dict[str, Member], keys: Sequence[bytes], until_s: float) -> list[str]:
        """Offer each its share; returns those who have not taken it."""
        replica = self._node.replica
        rooms = {name: Room(member.slots, len(replica.keys_of(name))) for name, member in receivers.items()}
        shares = share_out(rooms, keys)
        taken = await asyncio.gather(
            *(asyncio.to_thread(self._offer, receivers[name], mine, until_s) for name, mine in shares)
        )
        return [name for (name, _), has_taken in zip(shares, taken, strict=True) if not has_taken]

    def _offer(self, member: Member, keys: Sequence[bytes], until_s: float) -> bool:
        """Whether this peer takes these. In a thread."""
        deadline = Deadline(until_s, STALL_S)
        target = PeerTarget.of(member)
        try:
            link = PeerLink.dial(target, self._transports.hello, deadline, self._transports.security)
            try:
                for start in range(0, len(keys), MAX_KEYS):
                    left_s = max(1.0, deadline.remaining_s())
                    link.request(Offer(list(keys[start : start + MAX_KEYS]), left_s), Accepted, deadline)
            finally:
                link.close()
        except KVMeshError as error:
            log.warning("chunks not taken over peer=%s chunks=%d: %s", member.instance_id, len(keys), error)
            return False
        return True

    async def _settle(self, keys: list[bytes], until_s: float) -> list[bytes]:
        """Wait until others hold all of `keys`, nothing moves any more or the time is up; returns what is left."""
        moved_at_s = time.monotonic()
        while keys and time.monotonic() < min(until_s, moved_at_s + SETTLED_S):
            await asyncio.sleep(POLL_S)
            left = await self._told_alone(keys)
            if left is None or len(left) < len(keys):  # a directory that is slow to answer says nothing about peers
                keys, moved_at_s = keys if left is None else left, time.monotonic()
        return keys

    async def _alone(self, keys: Sequence[bytes]) -> list[bytes]:
        """Those of `keys` that nobody else is known to hold."""
        told = await self._told_alone(keys)
        return list(keys) if told is None else told

    async def _told_alone(self, keys: Sequence[bytes]) -> list[bytes] | None:
        """Those of `keys` that nobody else holds; None when the directory has to be asked and does not say."""
        held = await self._node.asker.ask(keys) if self._node.asks and keys else set[bytes]()
        if held is None:
            return None
        return [key for key in keys if key not in held and not self._node.replica.holders(key)]

    # -- taking over ---------------------------------------------------------------------------------------------------

    def take(self, offer: Offer) -> Accepted | Refused:
        """A peer is about to leave: have these chunks fetched. Called by the peer server's threads."""
        try:
            return self._bridge.run(lambda: self._accept(offer), ACCEPT_S)
        except NotAnsweredError as error:
            return Refused("full", str(error))

    async def _accept(self, offer: Offer) -> Accepted | Refused:
        if self._node.sharing is not Sharing.ON:
            return Refused("full", f"this instance is {self._node.sharing.value} itself")
        keys = [key for key in offer.keys if key not in self._node.inventory]
        try:
            if keys:
                await self._node.operations.begin(WarmChunks(keys=keys), offer.seconds)
        except ControlError as error:
            return Refused("full", error.text[:1024])
        return Accepted()
