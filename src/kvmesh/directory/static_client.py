"""No directory at all: a node follows its peers one by one (`kvmesh.wire.follow`), those on a list and those who follow
it. Also what a node falls back to when its directory is gone for long.

A thread per followed peer reads in blocking calls, as everything between peers does; what it reads is applied on the
node's event loop, one message at a time, so that a peer that tells more than we can take has to wait. This is for a
few dozen instances: connections grow with the square of their number, and the limits say where to use a directory.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import math
import random
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from kvmesh.config.values import format_host_port
from kvmesh.directory.base import DirectoryListener
from kvmesh.errors import FormatMismatch, KVMeshError, PeerProtocolError, PeerRefusedError
from kvmesh.transfer.base import Deadline
from kvmesh.transfer.link import PeerLink, PeerTarget
from kvmesh.transfer.security import PeerSecurity
from kvmesh.wire import directory as wire
from kvmesh.wire.follow import BEAT_S, Told, told_decoder
from kvmesh.wire.peer import FRAME_LIMIT_BYTES, Follow, Hello, Refused, decode_answer

log = logging.getLogger("kvmesh.directory")

MAX_PEERS = 128
"""Peers followed at a time: each takes a thread here and there."""
CONNECT_S = 3.0
SILENCE_S = 3.5 * BEAT_S
"""A peer that says nothing for so long has stopped."""
RESOLVE_S = 10.0
"""How often names are looked up again: one name may stand for many peers, which come and go."""
FIRST_RETRY_S, LONGEST_RETRY_S = 0.25, 5.0
HOPELESS_RETRY_S = 30.0
"""For a peer of another format, for ourselves, and for a second address of a peer."""
FORGET_S = 60.0
"""A peer that is on no list and has not been reached for so long is not tried any more."""

LOOK_S = 0.25
"""How often a thread that waits for the loop looks whether it is to end."""

Address = tuple[str, int]


class StaticStatistics(NamedTuple):
    """Sizes, for status."""

    addresses: int
    followed: int


class _Peer:
    """One address that is followed, or tried."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self.link: PeerLink | None = None
        self.member: wire.Member | None = None
        """Who is followed there now."""
        self.problem = ""
        self.reached_at_s = time.monotonic()
        self.stop = threading.Event()


class StaticClient:
    """Follows peers without a directory. Lives on the node's event loop; each peer has a thread."""

    def __init__(
        self,
        addresses: Callable[[], Iterable[Address]],
        hello: Hello,
        security: PeerSecurity,
        listener: DirectoryListener,
        *,
        instance_timeout_s: float,
        on_follower: Callable[[Callable[[wire.Member], None] | None], None],
    ) -> None:
        """
        Args:
            addresses: whom to follow, asked now and then; names may stand for several.
            hello: our own, as peers get to see it.
            security: how peer connections are secured.
            listener: is told what the peers say.
            instance_timeout_s: how long a peer that cannot be reached stays a member.
            on_follower: is given what to call with each node that begins to follow us.
        """
        self._addresses = addresses
        self._hello = hello
        self._security = security
        self._listener = listener
        self._timeout_s = instance_timeout_s
        self._on_follower = on_follower
        self._member: wire.Member | None = None
        self._peers: dict[Address, _Peer] = {}
        self._introduced: dict[Address, None] = {}
        self._members: dict[str, _Peer] = {}
        """By instance id, whose chunks the listener knows of."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._threads: ThreadPoolExecutor | None = None
        self._connected = self._has_left = False
        self._closing = threading.Event()
        self._look = asyncio.Event()

    # -- DirectoryClient -----------------------------------------------------------------------------------------------

    @property
    def problem(self) -> str:
        """Which peers cannot be followed, and why; empty when all are."""
        troubled = [peer for peer in self._peers.values() if peer.problem and peer.member is None]
        named = [f"{format_host_port(*peer.address)}: {peer.problem}" for peer in troubled[:5]]
        more = f"; and {len(troubled) - 5} more" if len(troubled) > 5 else ""
        if not self._peers:
            return "no peer is known to be followed"
        return "; ".join(named) + more

    def statistics(self) -> StaticStatistics:
        """Sizes now."""
        return StaticStatistics(len(self._peers), len(self._members))

    async def run(self, member: wire.Member) -> None:
        """Follow until cancelled."""
        self._loop = asyncio.get_running_loop()
        self._member = member
        self._threads = ThreadPoolExecutor(MAX_PEERS + 1, thread_name_prefix="follow")
        self._on_follower(self._introduce)
        try:
            while True:
                await self._find_peers()
                self._look.clear()
                try:
                    await asyncio.wait_for(self._look.wait(), RESOLVE_S)
                except (TimeoutError, asyncio.TimeoutError):
                    continue
        finally:
            self._on_follower(None)
            self._closing.set()
            for peer in self._peers.values():
                _end(peer)
            self._threads.shutdown(wait=False, cancel_futures=True)

    def changes_pending(self) -> None:
        """Our outbox has something new: the peer server tells those who follow us."""

    def follow_inventories(self, wanted: bool) -> None:
        """Always: there is nobody to ask."""

    async def ask(self, keys: Sequence[bytes]) -> None:
        """There is nobody to ask."""

    def leave(self) -> None:
        """Follow nobody any more."""
        self._has_left = True
        for peer in self._peers.values():
            _end(peer)
        self._peers.clear()
        self._tell()

    def report(self, report: wire.FetchReport) -> None:
        """Nobody keeps reports here."""

    # -- whom to follow ------------------------------------------------------------------------------------------------

    def _introduce(self, member: wire.Member) -> None:
        """Somebody follows us: follow it too."""
        address = (member.peer_host, member.peer_port)
        known = self._members.get(member.instance_id)
        if known is not None and known.member is not None and known.member.incarnation == member.incarnation:
            return
        if address not in self._introduced and len(self._introduced) < MAX_PEERS:
            self._introduced[address] = None
            self._look.set()

    async def _find_peers(self) -> None:
        assert self._loop is not None
        if self._has_left:
            return
        listed = list(self._addresses())[:MAX_PEERS]
        found = await self._loop.run_in_executor(self._threads, _resolve, [*listed, *self._introduced])
        now_s = time.monotonic()
        for address, peer in list(self._peers.items()):
            is_wanted = address in found and not (
                address in self._introduced and now_s - peer.reached_at_s > FORGET_S and address not in listed
            )
            if not is_wanted and peer.member is None:
                _end(peer)
                del self._peers[address]
                self._introduced.pop(address, None)
        for address in found:
            if address not in self._peers and len(self._peers) < MAX_PEERS:
                self._peers[address] = peer = _Peer(address)
                self._loop.run_in_executor(self._threads, self._follow, peer)

    # -- one thread per peer -------------------------------------------------------------------------------------------

    def _follow(self, peer: _Peer) -> None:
        pause_s = FIRST_RETRY_S
        while not self._closing.is_set() and not peer.stop.is_set():
            started_s = time.monotonic()
            hopeless = self._follow_once(peer)
            if time.monotonic() - started_s > LONGEST_RETRY_S:
                pause_s = FIRST_RETRY_S
            peer.stop.wait(HOPELESS_RETRY_S if hopeless else pause_s * random.uniform(0.5, 1.0))
            pause_s = min(2 * pause_s, LONGEST_RETRY_S)

    def _follow_once(self, peer: _Peer) -> bool:
        """Follow until the connection ends; True when there is no point in trying again soon."""
        try:
            self._converse(peer)
        except FormatMismatch as error:
            self._failed(peer, str(error))
            return True
        except KVMeshError as error:
            self._failed(peer, str(error))
        except RuntimeError:  # the loop has ended
            return True
        except Exception as error:
            log.exception("peer cannot be followed address=%s", format_host_port(*peer.address))
            self._failed(peer, repr(error))
        else:
            return True
        finally:
            link, peer.link = peer.link, None
            if link is not None:
                link.close()
            self._call(self._lost, peer)
        return False

    def _converse(self, peer: _Peer) -> None:
        """Returns when there is nothing to follow here: ourselves, or somebody who is followed elsewhere."""
        target = PeerTarget("", "", *peer.address)
        link = PeerLink.dial(target, self._hello, Deadline(time.monotonic() + CONNECT_S, CONNECT_S), self._security)
        peer.link = link
        theirs = link.theirs
        if peer.stop.is_set() or self._is_known(peer, theirs):
            return
        patience = Deadline(math.inf, SILENCE_S)
        link.send(Follow(self._member), patience)
        while not peer.stop.is_set():
            payload = link.stream.receive_frame(patience, FRAME_LIMIT_BYTES)
            told = _decode(payload, link.peer)
            if not self._ask(self._take, peer, theirs, told):
                return

    def _is_known(self, peer: _Peer, theirs: Hello) -> bool:
        if theirs.instance_id == self._hello.instance_id:
            if theirs.incarnation != self._hello.incarnation:
                self._failed(peer, f"it has our instance_id {theirs.instance_id}; give each instance one of its own")
            return True
        other = self._members.get(theirs.instance_id)
        return other is not None and other is not peer and other.link is not None

    def _failed(self, peer: _Peer, problem: str) -> None:
        if problem and problem != peer.problem and not peer.stop.is_set():
            log.warning("cannot follow peer address=%s: %s", format_host_port(*peer.address), problem)
        peer.problem = problem

    def _call(self, function: Callable[[_Peer], None], peer: _Peer) -> None:
        assert self._loop is not None
        if not self._closing.is_set():
            try:
                self._loop.call_soon_threadsafe(function, peer)
            except RuntimeError:  # the loop has ended
                return

    def _ask(self, function: Callable[[_Peer, Hello, Told], bool], peer: _Peer, theirs: Hello, told: Told) -> bool:
        """Have the loop apply one message, and wait for that: a peer cannot make us keep more than one."""
        assert self._loop is not None

        async def apply() -> bool:
            return function(peer, theirs, told)

        asked = asyncio.run_coroutine_threadsafe(apply(), self._loop)
        while not self._closing.is_set() and not peer.stop.is_set():
            concurrent.futures.wait((asked,), timeout=LOOK_S)
            if asked.done():
                return asked.result()
        asked.cancel()
        return False

    # -- on the loop ---------------------------------------------------------------------------------------------------

    def _take(self, peer: _Peer, theirs: Hello, told: Told) -> bool:
        """Apply what a peer says; False ends the conversation for long. Raises PeerProtocolError for a gap in its
        changes: the next conversation, soon, begins with a snapshot.
        """
        who = (theirs.instance_id, theirs.incarnation)
        if isinstance(told, wire.MemberUp):
            return self._up(peer, who, told.member)
        if peer.member is None or (told.instance_id, told.incarnation) != who:
            peer.problem = f"it speaks of {told.instance_id[:64]} instead of itself"
            return False
        peer.reached_at_s = time.monotonic()
        if isinstance(told, wire.Changes) and not self._listener.on_changes(told):
            expected, found = "changes without a gap", f"changes {told.sequence}, which do not follow"
            raise PeerProtocolError(told.instance_id, expected, found)
        if isinstance(told, wire.Snapshot):
            self._listener.on_snapshot(told)
        return True

    def _up(self, peer: _Peer, who: tuple[str, str], member: wire.Member) -> bool:
        if (member.instance_id, member.incarnation) != who or member.format.format_id() != self._hello.format_id:
            peer.problem = "it does not introduce itself as it has greeted"
            return False
        other = self._members.get(member.instance_id)
        if other is not None and other is not peer and other.link is not None:
            return False
        before = peer.member
        if before is not None and before.instance_id != member.instance_id:  # the address was reused
            self._members.pop(before.instance_id, None)
            self._listener.on_member_down(before.instance_id, before.incarnation, "replaced")
        self._members[member.instance_id] = peer
        if other is not None and other is not peer:
            other.member = None
        peer.member, peer.problem, peer.reached_at_s = member, "", time.monotonic()
        self._listener.on_member_up(member)
        self._tell()
        return True

    def _lost(self, peer: _Peer) -> None:
        """The connection has ended. The peer stays a member for a while: it may be about to come back."""
        assert self._loop is not None
        if peer.member is not None:
            self._loop.call_later(self._timeout_s, self._drop_if_gone, peer, peer.member)
        self._tell()

    def _drop_if_gone(self, peer: _Peer, member: wire.Member) -> None:
        if self._members.get(member.instance_id) is not peer or peer.member is not member or peer.link is not None:
            return
        del self._members[member.instance_id]
        peer.member = None
        self._listener.on_member_down(member.instance_id, member.incarnation, "timeout")

    def _tell(self) -> None:
        connected = any(peer.link is not None and peer.member is not None for peer in self._peers.values())
        if connected != self._connected:
            self._connected = connected
            self._listener.on_connection(connected)


def _end(peer: _Peer) -> None:
    peer.stop.set()
    link = peer.link
    if link is not None:
        link.shut_down()


def _decode(payload: bytes, peer: str) -> Told:
    try:
        return told_decoder.decode(payload)
    except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
        problem = PeerProtocolError(peer, expected="what a followed node says", found=str(error)[:200])
    try:
        answer = decode_answer(payload)
    except ValueError:
        raise problem from None
    if isinstance(answer, Refused):
        raise PeerRefusedError(peer, found=f"refused ({answer.code}): {answer.text}")
    raise problem


def _resolve(addresses: list[Address]) -> list[Address]:
    """Every address that these stand for; one that cannot be looked up stands for itself."""
    found: dict[Address, None] = {}
    for host, port in addresses:
        try:
            answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            found[host, port] = None
            continue
        for *_, address in answers:
            found[str(address[0]), port] = None
    return list(found)
