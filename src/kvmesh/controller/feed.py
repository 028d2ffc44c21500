"""The controller's ZMQ sockets: frames in, the registry's answers out.

Plain ZMQ sockets on the asyncio loop, not `zmq.asyncio`: a fan-out is thousands of sends in a row, each of which must
say at once whether its receiver can take it, and a future for each would cost more than the send.

Whatever comes in, however wrong, costs its sender one log line and nobody else anything.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple

import zmq

from kvmesh.controller.admission import Admission
from kvmesh.controller.asks import Asks
from kvmesh.controller.instances import Peer, Send, SocketName
from kvmesh.controller.intake import Intake
from kvmesh.controller.log import LogLimiter, log
from kvmesh.controller.peer_asks import PeerAsks
from kvmesh.controller.registry import Registry, SendFailure
from kvmesh.controller.sockets import Sockets
from kvmesh.transfer.security import OPEN, PeerSecurity
from kvmesh.wire import directory as wire

logger = logging.getLogger(__name__)

SNAPSHOT_PAUSE_S = 0.02
"""Requests for snapshots gather for so long, so that members that come together share one encoding."""
LONGEST_GATHERING_S = 1.0
"""And on until all that waits to be read has been read, but no longer than this: who comes meanwhile shares it, too."""
FLUSH_PAUSE = 9.0
"""After Changes were sent on, others follow no sooner than so many times the CPU time that it took: a tenth of a core,
and the more there is to send, the more goes into each frame. ZMQ's own thread has several times as much to do with a
frame as we have (a system call, and on one machine the receiver's side of it).
"""
NEWCOMERS_PAUSE = 36.0
"""The same after newcomers were told: they come in crowds, as after a restart of ours, and all are told of them."""
LONGEST_PAUSE_S = 0.25
"""But no later than this."""
BEHIND_PAUSE_S = 0.2
"""So much longer while more waits to be read: what a controller that is behind saves on frames lets it catch up."""
SHARED_FRAME_BYTES = 64 * 1024
"""From here on a frame is shared between the queues of its receivers; below, copying it is cheaper."""
SHARED_BY_MANY_BYTES = 128
MANY_RECEIVERS = 16
"""For so many receivers from there on: a thousand members that join at once are told of each other a million times,
which would be a gigabyte of copies while they are slow to read.
"""
_MORE = zmq.NOBLOCK | zmq.SNDMORE


class FeedStatistics(NamedTuple):
    """Counts since the start. `received` is by socket and kind of message, `malformed` and `refused_handshakes` by
    socket.
    """

    received: dict[tuple[str, str], int]
    malformed: dict[str, int]
    handler_errors: int
    sent_frames: int
    sent_bytes: int
    send_failures: dict[str, int]
    refused_handshakes: dict[str, int]


class Feed:
    """Joins the registry to the sockets. Everything runs on the loop on which `start` was called."""

    def __init__(
        self,
        registry: Registry,
        sockets: Sockets,
        clock: Callable[[], float] = time.monotonic,
        security: PeerSecurity = OPEN,
    ) -> None:
        """`security`: for questions to nodes that are not connected to us."""
        self._registry = registry
        self._clock = clock
        self._routers: dict[SocketName, zmq.Socket[bytes]] = {"reply": sockets.reply}
        if sockets.heartbeat is not None:
            self._routers["heartbeat"] = sockets.heartbeat
        self._intakes = {
            name: Intake(
                router,
                lambda frames, name=name: self._guard(name, frames),  # type: ignore[misc]
                self._after_requests,
            )
            for name, router in self._routers.items()
        }
        self._admission = Admission(sockets, clock, registry.refusals)
        self.asks = Asks(registry, self._send_ask, PeerAsks(security))
        self._pull = Intake(sockets.pull, lambda frames: self._guard("pull", frames), self._send_held)
        self._flush_due_s = 0.0
        self._flush_timer: asyncio.TimerHandle | None = None
        self._owed = asyncio.Event()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._limiter = LogLimiter()
        self._received: Counter[tuple[str, str]] = Counter()
        self._malformed: Counter[str] = Counter()
        self._failures: Counter[str] = Counter()
        self._handler_errors = 0
        self._sent_frames = 0
        self._sent_bytes = 0

    def start(self) -> None:
        """Start taking messages. The loop must be running."""
        work = {f"intake_{name}": intake.run() for name, intake in self._intakes.items()}
        work |= {f"admission_{name}": intake.run() for name, intake in self._admission.intakes.items()}
        work |= {"intake_pull": self._pull.run(), "ticker": self._tick(), "snapshots": self._send_owed()}
        for name, coroutine in work.items():
            task = self._tasks[name] = asyncio.create_task(coroutine, name=f"feed_{name}")
            task.add_done_callback(_log_death)

    async def stop(self) -> None:
        """End all tasks. The sockets stay open: they are their maker's to close."""
        self.asks.stop()
        if self._flush_timer is not None:
            self._flush_timer.cancel()
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def problems(self) -> list[str]:
        """What is broken here, in words; empty when all is well."""
        if not self._tasks:
            return ["the feed has not been started"]
        return [
            f"task {name} has ended: no messages are handled there" for name, task in self._tasks.items() if task.done()
        ]

    def statistics(self) -> FeedStatistics:
        return FeedStatistics(
            dict(self._received),
            dict(self._malformed),
            self._handler_errors,
            self._sent_frames,
            self._sent_bytes,
            dict(self._failures),
            dict(self._admission.refused),
        )

    # -- in ------------------------------------------------------------------------------------------------------------

    def _guard(self, socket: SocketName | str, frames: list[zmq.Frame]) -> None:
        """Handle one message; nothing that goes wrong with it gets out of here."""
        try:
            if socket == "pull":
                self._on_event(frames)
            else:
                self._on_request("heartbeat" if socket == "heartbeat" else "reply", frames)
        except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
            self._malformed[socket] += 1
            self._complain("malformed_message", socket, frames, error)
        except Exception as error:
            self._handler_errors += 1
            self._complain("handler_error", socket, frames, error)

    def _on_request(self, socket: SocketName, frames: list[zmq.Frame]) -> None:
        if len(frames) != 2:
            raise ValueError(f"{len(frames) - 1} frames instead of one: connect a DEALER")
        request = wire.request_decoder.decode(frames[1].buffer)
        self._received[socket, type(request).__name__] += 1
        if isinstance(request, wire.Answer):
            self.asks.on_answer(request)
        now_s = self._clock()
        self.send(self._registry.on_request(request, Peer(socket, frames[0].bytes), now_s), now_s)
        if isinstance(request, (wire.Register, wire.SnapshotRequest)):
            self._owed.set()

    def _on_event(self, frames: list[zmq.Frame]) -> None:
        if len(frames) != 1:
            raise ValueError(f"{len(frames)} frames instead of one")
        frame = frames[0].bytes
        event = wire.event_decoder.decode(frame)
        self._received["pull", type(event).__name__] += 1
        now_s = self._clock()
        self.send(self._registry.on_event(event, frame, now_s), now_s)
        if isinstance(event, wire.Snapshot) and event.last:
            self._owed.set()

    def _after_requests(self, is_empty: bool) -> None:
        """Only newcomers are told from here: when Changes go is a matter of how many of them wait."""
        if self._registry.has_newcomers():
            self._send_held(is_empty)

    def _send_held(self, is_empty: bool) -> None:
        """Send on what the members have told, now or when it is time. `is_empty`: nothing more waits to be read."""
        if self._flush_timer is not None or not self._registry.has_held():
            return
        wait_s = self._flush_due_s - self._clock() + (0.0 if is_empty else BEHIND_PAUSE_S)
        if wait_s <= 0:
            self._flush()
        elif is_empty:
            self._flush_timer = asyncio.get_running_loop().call_later(wait_s, self._flush)

    def _flush(self) -> None:
        self._flush_timer = None
        now_s, spent_s = self._clock(), time.thread_time()
        pause = FLUSH_PAUSE
        try:
            sends = self._registry.flush(now_s)
            if any(isinstance(send.message, (wire.MemberUp, wire.MembersUp)) for send in sends):
                pause = NEWCOMERS_PAUSE
                self._owed.set()  # their inventories have waited for this
            self.send(sends, now_s)
        except Exception as error:  # a bug of ours costs these changes, and members that miss them ask for snapshots
            self._handler_errors += 1
            self._complain("handler_error", "pull", [], error)
        self._flush_due_s = self._clock() + min(LONGEST_PAUSE_S, pause * (time.thread_time() - spent_s))

    def _complain(self, event: str, socket: str, frames: list[zmq.Frame], error: Exception) -> None:
        address = _address(frames)
        suppressed = self._limiter.allow(f"{event} {socket} {address}", self._clock())
        if suppressed is None:
            return
        log(
            logger,
            logging.ERROR,
            event,
            socket=socket,
            peer=address,
            bytes=sum(len(frame) for frame in frames),
            error=f"{type(error).__name__}: {error}",
            suppressed=suppressed,
        )
        if event == "handler_error":
            logger.error("traceback", exc_info=error)

    # -- out -----------------------------------------------------------------------------------------------------------

    def send(self, sends: Iterable[Send], now_s: float) -> None:
        """Hand frames to their connections. Never waits: what a connection does not take is the registry's to judge."""
        full: set[Peer] = set()
        touched: set[SocketName] = set()
        for send in sends:
            shared = len(send.frame) >= (SHARED_BY_MANY_BYTES if len(send.to) >= MANY_RECEIVERS else SHARED_FRAME_BYTES)
            payload = zmq.Frame(send.frame, copy=False) if shared else send.frame
            bulk = isinstance(send.message, (wire.Changes, wire.Batch, wire.Snapshot))
            for peer in send.to:
                touched.add(peer.socket)
                # After a refused part the rest of a snapshot is of no use, even if there should be room again.
                failure = SendFailure.FULL if bulk and peer in full else self._send_one(peer, payload, copy=not shared)
                if failure is None:
                    self._sent_frames += 1
                    self._sent_bytes += len(send.frame)
                    continue
                self._failures[failure.value] += 1
                full.add(peer)
                self._registry.on_send_failed(peer, send, failure, now_s)
        for name in touched & self._intakes.keys():
            self._intakes[name].wake()

    def _send_one(self, peer: Peer, payload: bytes | zmq.Frame, *, copy: bool) -> SendFailure | None:
        if not peer.is_connected:
            return SendFailure.GONE
        try:
            router = self._routers[peer.socket]  # as `send_multipart` does it, which takes twice as long
            router.send(peer.routing_id, _MORE)  # room for one is room for both
            router.send(payload, zmq.NOBLOCK, copy=copy)
        except zmq.Again:
            return SendFailure.FULL
        except zmq.ZMQError as error:
            if error.errno != errno.EHOSTUNREACH:
                log(logger, logging.ERROR, "send_failed", socket=peer.socket, error=error)
            return SendFailure.GONE
        return None

    def _send_ask(self, peer: Peer, frame: bytes) -> SendFailure | None:
        failure = self._send_one(peer, frame, copy=True)
        if failure is None:
            self._sent_frames += 1
            self._sent_bytes += len(frame)
        else:
            self._failures[failure.value] += 1
        self._intakes[peer.socket].wake()
        return failure

    # -- by themselves -------------------------------------------------------------------------------------------------

    async def _tick(self) -> None:
        period_s = min(1.0, self._registry.heartbeat_interval_s / 2)
        while True:
            now_s = self._clock()
            self.send(self._registry.tick(now_s, self._behind_s()), now_s)
            self._owed.set()  # members may have caught up
            await asyncio.sleep(period_s)

    def _behind_s(self) -> float:
        """How old what waits in our sockets may be: nobody is silent whose words we have not read yet."""
        return max(0.0, time.monotonic() - self._emptied_at_s())

    def _emptied_at_s(self) -> float:
        """Up to when everything that had come was read, by the time of the monotonic clock."""
        intakes = [*self._intakes.values(), self._pull]
        for intake in intakes:
            intake.wake()  # an empty socket says so on its next turn
        return min(intake.emptied_at_s for intake in intakes)

    async def _gather(self) -> None:
        """Let requests for snapshots come in."""
        since_s = time.monotonic()
        while time.monotonic() - since_s < LONGEST_GATHERING_S:
            await asyncio.sleep(SNAPSHOT_PAUSE_S)
            if self._emptied_at_s() > since_s:
                return

    async def _send_owed(self) -> None:
        while True:
            await self._owed.wait()
            await self._gather()
            self._owed.clear()
            while sends := self._registry.next_snapshot(self._clock()):
                self.send(sends, self._clock())
                await asyncio.sleep(0)


def _address(frames: list[zmq.Frame]) -> str:
    try:
        return str(frames[-1].get("Peer-Address"))
    except (zmq.ZMQError, IndexError):
        return "unknown"


def _log_death(task: asyncio.Task[None]) -> None:
    if task.cancelled():
        return
    error = task.exception()
    log(logger, logging.CRITICAL, "task_died", task=task.get_name(), error=repr(error))
    if error is not None:
        logger.critical("traceback", exc_info=error)
