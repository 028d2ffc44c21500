"""A node's connection to the controller, as specified in `kvmesh.wire.directory`.

One DEALER for requests and the fan-out, one PUSH for our own events, and (when configured) a DEALER for heartbeats.
ZMQ reconnects below us; we only have to notice silence (no acknowledged heartbeat) and strangers (a restarted
controller does not know us).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Sequence

import zmq
import zmq.asyncio

from kvmesh.directory.base import DirectoryListener
from kvmesh.directory.handshakes import Handshakes
from kvmesh.directory.outbox import Outbox
from kvmesh.directory.pace import Pace
from kvmesh.logs import LogLimiter
from kvmesh.wire import directory as wire
from kvmesh.wire.auth import ClusterKey
from kvmesh.wire.curve import CurveKeys, secure_node

log = logging.getLogger("kvmesh.directory")

MAX_FRAME_BYTES = 32 * 1024 * 1024
"""A Registered names every member: under 1 kB each."""
MAX_MEMBERS = 20_000
"""As many as a controller admits. Whoever names more is not believed."""
RECEIVE_QUEUE_FRAMES = 50
"""Beyond so many unread frames the controller has to wait, and sends snapshots later."""
SHORTEST_INTERVAL_S, LONGEST_INTERVAL_S = 0.05, 60.0
"""Between heartbeats, whatever the controller asks for."""
SEND_QUEUE_FRAMES = 1000
"""Beyond so many unsent frames events are dropped; the gap then asks for a snapshot."""
SNAPSHOT_RETRY_S = 1.0
MAX_QUESTIONS = 1000
RETRY_S = 0.25
"""Until a message is tried again that no connection has taken."""


class ControllerClient:
    """Joins a node to a controller and keeps it joined. Lives on the node's event loop."""

    def __init__(
        self,
        *,
        pull_url: str,
        reply_url: str,
        heartbeat_url: str | None,
        heartbeat_interval_s: float,
        listener: DirectoryListener,
        outbox: Outbox,
        cluster_key: ClusterKey | None = None,
    ) -> None:
        self._listener = listener
        self._outbox = outbox
        self._interval_s = heartbeat_interval_s
        self._context = zmq.asyncio.Context()
        self._curve = None if cluster_key is None else CurveKeys.derive(cluster_key)
        self._handshakes = Handshakes(self._context, has_key=cluster_key is not None)
        self._push = self._socket(zmq.PUSH, pull_url)
        self._dealer = self._socket(zmq.DEALER, reply_url)
        self._beat = self._socket(zmq.DEALER, heartbeat_url) if heartbeat_url else self._dealer
        self._reply_url = reply_url
        self._sequence = 0
        self._registration = 0
        self._received_bytes = 0
        """Of notices since the last Registered; tells the controller what is still under way, and what was lost."""
        self._member: wire.Member | None = None
        self._registered = False
        self._connected = False
        self._has_left = False
        self._answered_at_s = 0.0
        self._controller = ""
        self._members: dict[str, str] = {}
        """Incarnation by instance id, as the controller last told."""
        self._unconfirmed: set[str] = set()
        """Members of an earlier controller that its successor has not named yet."""
        self._asked: dict[str, float] = {}
        """When a snapshot of an instance was last asked for."""
        self._pending = asyncio.Event()
        self._refusal = ""
        self._asks = False
        self._number = 0
        self._questions: dict[int, asyncio.Future[wire.Holders]] = {}
        """Queries that are out, by number."""
        self._limiter = LogLimiter()
        self._drop_timer: asyncio.TimerHandle | None = None
        self._inventory_timer: asyncio.TimerHandle | None = None
        self.dropped_frames = self._dropped_at_report = 0

    def _socket(self, kind: int, url: str) -> zmq.asyncio.Socket:
        socket = self._context.socket(kind)
        socket.linger = 0
        socket.sndhwm = SEND_QUEUE_FRAMES
        socket.rcvhwm = RECEIVE_QUEUE_FRAMES
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        socket.setsockopt(zmq.IMMEDIATE, 1)  # nothing is queued for a controller that is away
        socket.setsockopt(zmq.RECONNECT_IVL, 100)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
        if self._curve is not None:
            secure_node(socket, self._curve)
        self._handshakes.watch(socket, url)
        socket.connect(url)
        return socket

    @property
    def problem(self) -> str:
        """What is wrong with the controller now, in words; empty when all is well."""
        return self._refusal or ("" if self._connected else f"the controller at {self._reply_url} does not answer")

    # -- DirectoryClient -----------------------------------------------------------------------------------------------

    async def run(self, member: wire.Member) -> None:
        self._member = member
        tasks: list[Coroutine[None, None, None]] = [self._heartbeats(), self._publishes(), self._receives(self._dealer)]
        if self._beat is not self._dealer:
            tasks.append(self._receives(self._beat))
        tasks += self._handshakes.tasks()
        try:
            await asyncio.gather(*tasks)
        finally:
            await self._leave()
            if self._inventory_timer is not None:
                self._inventory_timer.cancel()
            self._context.destroy(linger=100)

    def changes_pending(self) -> None:
        self._pending.set()

    def follow_inventories(self, wanted: bool) -> None:
        """Whether to hear what others hold."""
        if wanted == self._asks:
            self._asks = not wanted
            if self._registered:
                self._register_again()

    async def ask(self, keys: Sequence[bytes]) -> dict[bytes, list[tuple[str, str]]] | None:
        """Who holds each of `keys`; None when the controller cannot be asked now."""
        if not self._registered or not self._connected or self._member is None or len(self._questions) >= MAX_QUESTIONS:
            return None
        found: dict[bytes, list[tuple[str, str]]] = {}
        for start in range(0, len(keys), wire.MAX_QUERY_KEYS):
            part = list(keys[start : start + wire.MAX_QUERY_KEYS])
            self._number += 1
            number = self._number
            self._questions[number] = answer = asyncio.get_running_loop().create_future()
            self._send(self._dealer, wire.Query(self._member.instance_id, self._member.incarnation, number, part))
            try:
                holders = await answer
            finally:
                del self._questions[number]
            if len(holders.holders) != len(part):
                return None
            for key, places in zip(part, holders.holders, strict=True):
                if places:
                    found[key] = [holders.instances[place] for place in places if place < len(holders.instances)]
        return found

    def report(self, report: wire.FetchReport) -> None:
        if self._registered:
            self._send(self._push, report)

    def leave(self) -> None:
        self._has_left = True
        if self._registered and self._member is not None:
            self._send(self._dealer, wire.Leave(self._member.instance_id, self._member.incarnation))
        log.info("left the cluster url=%s", self._reply_url)
        self._registered = self._connected = False
        self._listener.on_connection(False)

    # -- loops ---------------------------------------------------------------------------------------------------------

    async def _heartbeats(self) -> None:
        """Register until accepted, then beat; silence means the controller is gone."""
        assert self._member is not None
        member = self._member
        pause_s = RETRY_S
        while True:
            now_s = time.monotonic()
            if self._connected and now_s - self._answered_at_s > 2.5 * self._interval_s:
                self._set_connected(False)
            if self._registered:
                pause_s = RETRY_S
                beat = wire.Heartbeat(
                    member.instance_id,
                    member.incarnation,
                    self._sequence,
                    self._listener.statistics(),
                    registration=self._registration,
                    received_bytes=self._received_bytes,
                )
                self._send(self._beat, beat)
                self._report_use(whole=False)
                await asyncio.sleep(self._interval_s)
            else:
                is_under_way = not self._has_left and self._send(self._dealer, wire.Register(member, asks=self._asks))
                await asyncio.sleep(min(self._interval_s, pause_s))
                # Who is not answered yet may have hundreds before it; who is not connected is the first to notice.
                pause_s = min(self._interval_s, 2 * pause_s) if is_under_way else RETRY_S

    async def _publishes(self) -> None:
        pace = Pace()
        while True:
            await self._pending.wait()
            await pace.turn()
            self._pending.clear()
            if self._registered and self._connected:
                self._publish()

    def _publish(self) -> None:
        if not self._outbox.continues(self._sequence):
            self._send_inventory()
        while (changes := self._outbox.next_after(self._sequence)) is not None:
            self._sequence = changes.sequence
            self._send(self._push, changes)

    async def _receives(self, socket: zmq.asyncio.Socket) -> None:
        while True:
            frames = await socket.recv_multipart()
            try:
                notice = wire.notice_decoder.decode(frames[-1])
            except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
                suppressed = self._limiter.allow("malformed", time.monotonic())
                if suppressed is not None:
                    log.error(
                        "controller sent a malformed message bytes=%d error=%r suppressed=%d",
                        len(frames[-1]),
                        str(error)[:500],
                        suppressed,
                    )
                continue
            self._answered_at_s = time.monotonic()
            if not isinstance(notice, wire.Registered | wire.HeartbeatAck | wire.Refused | wire.Ask):
                self._received_bytes += len(frames[-1])
            try:
                self._on_notice(notice)
            except Exception:  # whatever it is, it costs this notice and not the node
                if self._limiter.allow("notice", time.monotonic()) is not None:
                    log.exception("notice could not be applied kind=%s", type(notice).__name__)

    # -- messages ------------------------------------------------------------------------------------------------------

    def _on_notice(self, notice: wire.Notice) -> None:
        listener = self._listener
        match notice:
            case _ if self._has_left:
                return
            case wire.Registered():
                self._on_registered(notice)
            case wire.Refused():
                if notice.text != self._refusal:
                    self._refusal = notice.text
                    log.error("controller refused this instance code=%s: %s", notice.code, notice.text)
            case wire.HeartbeatAck():
                if notice.known:
                    self._set_connected(True)
                elif self._registered:
                    log.warning("controller does not know this instance (was it restarted?); registering again")
                    self._register_again()
            case wire.MemberUp():
                self._member_up(notice.member)
            case wire.MembersUp():
                for member in notice.members:
                    self._member_up(member)
            case wire.MemberDown():
                if self._members.get(notice.instance_id) == notice.incarnation:
                    self._member_down(notice.instance_id, notice.reason)
            case wire.Holders():
                question = self._questions.get(notice.number)
                if question is not None and not question.done():
                    question.set_result(notice)
            case wire.Resync():
                self._send_inventory()
            case wire.Changes():
                self._apply(notice)
            case wire.Batch():
                for changes in notice.changes:
                    self._apply(changes)
            case wire.Snapshot():
                if not listener.on_snapshot(notice):
                    self._ask_snapshot(notice.instance_id, notice.incarnation)
            case wire.Ask():
                self._on_ask(notice)

    def _on_ask(self, ask: wire.Ask) -> None:
        member = self._member
        if member is None or (ask.instance_id, ask.incarnation) != (member.instance_id, member.incarnation):
            return  # meant for another life of ours; whoever asked knows that it has ended

        def answer(said: wire.Answer) -> None:
            self._send(self._dealer, said)

        self._listener.on_ask(ask, answer)

    def _apply(self, changes: wire.Changes) -> None:
        if not self._listener.on_changes(changes):
            self._ask_snapshot(changes.instance_id, changes.incarnation)

    def _on_registered(self, notice: wire.Registered) -> None:
        assert self._member is not None
        self._refusal = ""
        self._registered = True
        self._registration, self._received_bytes = notice.registration, 0
        asked_s = notice.heartbeat_interval_s or self._interval_s
        self._interval_s = min(max(asked_s, SHORTEST_INTERVAL_S), LONGEST_INTERVAL_S)
        if self._controller and self._controller != notice.controller_incarnation:
            self._unconfirmed = set(self._members)
            if self._drop_timer is not None:
                self._drop_timer.cancel()
            loop = asyncio.get_running_loop()
            self._drop_timer = loop.call_later(notice.instance_timeout_s, self._drop_unconfirmed)
        self._controller = notice.controller_incarnation
        self._set_connected(True)
        named = {member.instance_id for member in notice.members}
        if not self._unconfirmed:  # first, which makes room
            for instance_id in [known for known in self._members if known not in named]:
                self._member_down(instance_id, "left")
        for member in notice.members:
            self._member_up(member)
        self._send_inventory()
        self._report_use(whole=True)

    def _register_again(self) -> None:
        assert self._member is not None
        self._registered = False
        self._send(self._dealer, wire.Register(self._member, asks=self._asks))

    def _member_up(self, member: wire.Member) -> None:
        assert self._member is not None
        if member.instance_id == self._member.instance_id:
            return
        if len(self._members) >= MAX_MEMBERS and member.instance_id not in self._members:
            if self._limiter.allow("members", time.monotonic()) is not None:
                log.error("controller names more than %d members; the others are not used", MAX_MEMBERS)
            return
        self._unconfirmed.discard(member.instance_id)
        self._members[member.instance_id] = member.incarnation
        try:
            self._listener.on_member_up(member)
        except Exception:  # a member that cannot be used costs itself, not those named after it
            if self._limiter.allow("member", time.monotonic()) is not None:
                log.exception("member cannot be used instance=%s", member.instance_id)

    def _member_down(self, instance_id: str, reason: str) -> None:
        self._unconfirmed.discard(instance_id)
        self._asked.pop(instance_id, None)
        incarnation = self._members.pop(instance_id)
        self._listener.on_member_down(instance_id, incarnation, reason)

    def _drop_unconfirmed(self) -> None:
        """The restarted controller has had its time: who has not come back to it is gone."""
        for instance_id in list(self._unconfirmed):
            self._member_down(instance_id, "timeout")

    def _report_use(self, *, whole: bool) -> None:
        """A report that is lost leaves keys out of the sample for good, so after a loss the next one is whole."""
        report = self._listener.take_use_report(whole=whole or self.dropped_frames > self._dropped_at_report)
        if report is not None:
            self._dropped_at_report = self.dropped_frames
            self._send(self._push, report)

    def _send_inventory(self) -> None:
        """All of it; again soon when it is not taken: the connection for events may come after that for requests."""
        assert self._member is not None
        if self._inventory_timer is not None:
            self._inventory_timer.cancel()
            self._inventory_timer = None
        if not self._registered:
            return
        self._sequence, keys = self._outbox.inventory()
        size = wire.MAX_KEYS_PER_MESSAGE
        parts = [keys[start : start + size] for start in range(0, len(keys), size)] or [[]]
        for index, part in enumerate(parts):
            snapshot = wire.Snapshot(
                self._member.instance_id,
                self._member.incarnation,
                self._sequence,
                list[bytes](part),
                first=index == 0,
                last=index == len(parts) - 1,
            )
            if not self._send(self._push, snapshot):
                self._inventory_timer = asyncio.get_running_loop().call_later(RETRY_S, self._send_inventory)
                return

    def _ask_snapshot(self, instance_id: str, incarnation: str) -> None:
        if instance_id not in self._members:
            return
        now_s = time.monotonic()
        if now_s - self._asked.get(instance_id, -SNAPSHOT_RETRY_S) < SNAPSHOT_RETRY_S:
            return
        self._asked[instance_id] = now_s
        log.info("asking for a snapshot instance=%s", instance_id)
        self._send(self._dealer, wire.SnapshotRequest(instance_id, incarnation))

    def _set_connected(self, connected: bool) -> None:
        self._answered_at_s = time.monotonic()
        if connected == self._connected:
            return
        self._connected = connected
        if connected:
            log.info("joined the controller url=%s", self._reply_url)
            self._pending.set()
        else:
            log.warning(
                "controller is silent url=%s; known chunks stay usable, new ones are not learnt", self._reply_url
            )
        self._listener.on_connection(connected)

    async def _leave(self) -> None:
        """Also while the registration is not answered yet; a controller that knows nothing of us passes over it."""
        if self._member is not None and not self._has_left:
            self._send(self._dealer, wire.Leave(self._member.instance_id, self._member.incarnation))

    def _send(self, socket: zmq.asyncio.Socket, message: wire.Message) -> bool:
        """Hand one frame to ZMQ without waiting. A full queue or no connection drops it (False): the gap it leaves is
        repaired.
        """
        sent = socket.send(wire.encode(message), zmq.NOBLOCK)
        assert isinstance(sent, asyncio.Future)  # pyzmq decides a NOBLOCK send at once
        if sent.done() and isinstance(sent.exception(), zmq.Again):
            self.dropped_frames += 1
            return False
        return True
