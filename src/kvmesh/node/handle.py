"""The engine's end of the link: starts the node, watches it, restarts it, and answers lookups from memory.

Threads: one reads the link and looks after the process, one writes. What the scheduler thread calls (`is_visible`,
`publish`, `retract`, `fetch`, `take_finished`) neither waits nor does I/O: it reads a set or appends to a queue.

A node that dies is absent until it is back: nothing is visible, and jobs that were out fail with NODE_DOWN *after* the
process is known to be dead, because only then nothing writes into their slots any more. A node that does not finish a
job in time is killed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import select
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import msgspec

from kvmesh.core.format import Format
from kvmesh.core.gate import Rate, Saved, Source
from kvmesh.core.ledger import SlotLedger
from kvmesh.core.reasons import MissReason
from kvmesh.node.asked import AskedKeys
from kvmesh.node.child import NodeProcess
from kvmesh.node.fetch_jobs import FetchJobs, FinishedJob
from kvmesh.node.state import DOWN, NodeState
from kvmesh.transfer.pool import PoolSegment
from kvmesh.wire import link
from kvmesh.wire.framing import FrameBuffer, pack_frame
from kvmesh.wire.operations import Report, RunState, Sharing

log = logging.getLogger("kvmesh.handle")

DEAF_S = 10.0
"""How long the node may leave its link unread before it is killed: nothing piles up behind a stopped node for ever."""
STOPPED_S = 0.5
"""A wait that took so much longer than asked for says that this process did not run."""
FIRST_RESTART_DELAY_S = 0.2
LONGEST_RESTART_DELAY_S = 5.0
MAX_OUTGOING = 10_000
"""Messages that may wait for the node. Beyond them it is told later, in one go, which slots to look at again."""
MAX_WAITING_RECORDS = 1_000
"""With more messages than this waiting, records of requests are left out: they serve people, not requests."""
MAX_UNTOLD_RECORDS = 200
MAX_SLOTS_PER_MESSAGE = 100_000
MAX_ASKED_KEYS = 20_000
"""Keys of one question: a request has at most some thousand chunks."""
WAKE_S = 1.0
"""The reading thread looks at deadlines this often while nothing comes."""


class NodeHandle:
    """One engine's node process. Make it, `start` it, use it from the scheduler thread, `close` it."""

    def __init__(
        self,
        config_wire: bytes,
        kv_format: Format,
        ledger: SlotLedger,
        segments: Sequence[PoolSegment],
        *,
        log_level: str = "INFO",
    ) -> None:
        # Our own descriptors: whoever opened the pool may close theirs before a node has to be started again.
        self._segments = tuple(link.Segment(os.dup(fd), offset, length) for fd, offset, length in segments)
        self._start = link.Start(
            config=config_wire,
            format=kv_format,
            ledger_fd=ledger.fd,
            segments=self._segments,
            engine_pid=os.getpid(),
        )
        self._log_level = log_level
        self._child = NodeProcess(self._command)
        self._visible: set[bytes] = set()
        self._asked = AskedKeys()
        self._fastest: Source | None = None
        self._jobs = FetchJobs()
        self._lock = threading.Lock()
        """Guards what follows; held for a few assignments at a time, never across I/O."""
        self._state = DOWN
        self._life = 0
        """Number of nodes lost so far. A message meant for an earlier node is never sent to a later one."""
        self._missed_slots: set[int] = set()
        """Slots that changed while no node was there to be told, or too much was waiting for it already."""
        self._untold: deque[link.RequestRecord] = deque(maxlen=MAX_UNTOLD_RECORDS)
        """Records of requests that came while there was no node; told to the next one."""
        self.lost_records = 0
        self._outgoing: queue.SimpleQueue[tuple[int, link.Message] | None] = queue.SimpleQueue()
        self._sending_since_s: float | None = None
        self._ready: link.Ready | None = None
        self.on_request: Callable[[link.Operate | link.MakeKeys], None] = self._refuse
        """Takes what the node asks of the engine; called on the reading thread. Set before `start`."""
        self.tokenizer = ""
        """Folder of the model's tokenizer. Set before `start`."""
        self._closing = threading.Event()
        self._threads: list[threading.Thread] = []
        self.restarts = 0
        self.changes = 0
        """Goes up after every change of `state`, `restarts` or `visible_count`: so that who shows them need not look at
        all of them after every step. Moved by one thread at a time.
        """

    # -- life ----------------------------------------------------------------------------------------------------------

    def start(self) -> link.Ready:
        """Start the node and wait until it serves. Raises StartupError with the node's own words when it cannot.

        Called once, while the engine starts.
        """
        ready = self._launch()
        self._threads = [
            threading.Thread(target=self._watch, name="kvmesh-link-read", daemon=True),
            threading.Thread(target=self._write, name="kvmesh-link-write", daemon=True),
        ]
        for thread in self._threads:
            thread.start()
        return ready

    def close(self) -> None:
        """End the node and wait until it is dead. Safe to call twice."""
        self._closing.set()
        self._outgoing.put(None)
        self._child.kill(gentle=True)
        for thread in self._threads:
            while thread.is_alive():
                thread.join(0.05)
                self._child.kill(gentle=False)  # the reading thread may just have been starting another one
        with self._lock:
            self._state = DOWN
        self.changes += 1
        self._jobs.fail_all(MissReason.DRAINING)
        if self._child.connection is not None:
            self._child.connection.close()
        segments, self._segments = self._segments, ()
        for segment in segments:
            os.close(segment.fd)

    @property
    def pid(self) -> int | None:
        return self._child.pid

    @property
    def ready(self) -> link.Ready | None:
        """The node's addresses; None while there is no node."""
        return self._ready if self._state.alive else None

    @property
    def state(self) -> NodeState:
        return self._state

    def _launch(self) -> link.Ready:
        """Have a node process that serves; see `NodeProcess.launch`."""
        first = self._child.launch(msgspec.structs.replace(self._start, tokenizer=self.tokenizer))
        self._start = msgspec.structs.replace(self._start, peer_port=first.peer_port)
        with self._lock:
            self._ready = first
            self._state = NodeState(True, False, False, 0, self._start.sharing)
            self.changes += 1
            # The node read the ledger before it was ready; what changed since then is told again.
            self._tell_missed_slots()
            while self._untold:
                self._outgoing.put((self._life, self._untold.popleft()))
        return first

    def _command(self, link_fd: int) -> list[str]:
        return [sys.executable, "-m", "kvmesh.node", "--link-fd", str(link_fd), "--log-level", self._log_level]

    # -- scheduler thread ----------------------------------------------------------------------------------------------

    def is_visible(self, key: bytes) -> bool:
        """Whether some other instance is known to hold the chunk."""
        if key in self._visible:
            return True
        state = self._state
        return state.asks and state.sharing is Sharing.ON and self._asked.is_held(key)

    def is_known(self, key: bytes) -> bool:
        """Whether it is known if some other instance holds the chunk: always, unless the node asks."""
        return not self._state.asks or key in self._visible or self._asked.is_known(key)

    def ask(self, keys: Sequence[bytes]) -> None:
        """Have the node find out who holds these, as far as it is not known; `is_known` tells when it is."""
        wanted = self._asked.to_ask(keys[:MAX_ASKED_KEYS])
        with self._lock:
            if wanted and self._state.alive and self._outgoing.qsize() < MAX_OUTGOING:
                self._outgoing.put((self._life, link.Ask(wanted)))

    def visible_count(self) -> int:
        return len(self._visible) + len(self._asked)

    def fastest(self) -> Source | None:
        """The fastest peer that holds chunks, without a number of chunks; its rate is None while one of them has not
        been measured, and nobody knows which. None when no peer holds any.
        """
        return self._fastest

    def publish(self, slots: list[int], *, fetched: bool) -> None:
        """Tell the node that the ledger has new records."""
        self._tell_slots(slots, link.Publish(slots, fetched))

    def retract(self, slots: list[int]) -> None:
        """Tell the node that slots were taken back; their generations must have moved already."""
        self._tell_slots(slots, link.Retract(slots))

    def fetch(
        self,
        job_id: int,
        request_id: str,
        keys: list[bytes],
        slots: list[int],
        timeout_s: float,
        saved: Saved | None = None,
    ) -> None:
        """Hand a job to the node. It comes back through `take_finished`, whatever happens.

        `saved` is what computing the chunks would take: the node refuses those that do not pay. None refuses nothing.
        """
        prefill = None if saved is None else link.SavedPrefill(*saved)
        self._jobs.add(job_id, len(keys), timeout_s)
        with self._lock:
            alive = self._state.alive
            if alive:
                self._outgoing.put((self._life, link.Fetch(job_id, request_id, keys, slots, timeout_s, prefill)))
        if not alive:
            self._jobs.fail(job_id, MissReason.NODE_DOWN)

    def answer(self, message: link.Operated | link.KeysMade) -> None:
        """Tell the node how something that it has asked for goes. Any thread; lost when the node is."""
        with self._lock:
            if self._state.alive and self._outgoing.qsize() < MAX_OUTGOING:
                self._outgoing.put((self._life, message))

    def record(self, record: link.RequestRecord) -> None:
        """Tell what became of a request. Left out, and counted, when much is waiting for the node already; kept for the
        next node while there is none.
        """
        record = msgspec.structs.replace(record, lost_before=self.lost_records)
        with self._lock:
            if not self._state.alive:
                self._keep(record)
            elif self._outgoing.qsize() < MAX_WAITING_RECORDS:
                self._outgoing.put((self._life, record))
            else:
                self.lost_records += 1

    def _keep(self, record: link.RequestRecord) -> None:
        if len(self._untold) == MAX_UNTOLD_RECORDS:
            self.lost_records += 1
        self._untold.append(record)

    def take_finished(self) -> list[FinishedJob]:
        """Jobs that ended since the last call."""
        return self._jobs.take_finished()

    def has_jobs(self) -> bool:
        """Whether a job is out or its end was not taken yet."""
        return bool(self._jobs)

    def drain(self) -> None:
        """Block until no job is out. For the rare moments when the engine throws its pool away; bounded by the job
        deadlines.
        """
        with self._lock:
            if self._state.alive and not self._jobs.wait(0):  # those of a dead node are about to fail by themselves
                self._outgoing.put((self._life, link.GiveUp()))
        while not self._jobs.wait(WAKE_S):
            pass

    # -- reading thread ------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Read the link; when it ends, make sure that the process is dead, fail its jobs and start a new one."""
        delay_s = FIRST_RESTART_DELAY_S
        while not self._closing.is_set():
            up_s = time.monotonic()
            self._read_until_closed()
            if self._closing.is_set():
                return
            self._lost()
            log.warning(
                "node process ended pid=%s status=%s; lookups are misses until it is back",
                self._child.pid,
                self._child.exit_status,
            )
            if time.monotonic() - up_s > LONGEST_RESTART_DELAY_S:
                delay_s = FIRST_RESTART_DELAY_S
            while not self._closing.is_set():
                if self._closing.wait(delay_s):
                    return
                delay_s = min(delay_s * 2, LONGEST_RESTART_DELAY_S)
                try:
                    self._launch()
                except Exception as error:  # without this thread nobody would ever start a node again
                    if self._closing.is_set():
                        return
                    log.error("node could not be started again: %s; next try in %.1f s", error, delay_s)
                    # Somebody may have its port by now: where any free one will do, the next try takes another.
                    self._start = msgspec.structs.replace(self._start, peer_port=0)
                    continue
                self.restarts += 1
                self.changes += 1
                break

    def _read_until_closed(self) -> None:
        connection = self._child.connection
        assert connection is not None
        buffer = FrameBuffer(link.MAX_FRAME_BYTES)
        poller = select.poll()
        poller.register(connection, select.POLLIN)
        while not self._closing.is_set():
            if not self._wait(poller):
                self._kill_if_late()
                continue
            try:
                data = connection.recv(1 << 18)
            except OSError:
                return
            if not data:
                return
            try:
                for frame in buffer.feed(data):
                    self._on_message(link.to_engine_decoder.decode(frame))
            except Exception as error:  # whatever came: this thread has to see to the node's end
                log.error("node sent a malformed message: %r; ending it", error)
                return
            self._kill_if_late()

    def _on_message(self, message: link.ToEngine) -> None:
        match message:
            case link.Visible():
                if message.reset:
                    self._visible.clear()
                self._visible.difference_update(message.vanished)
                self._visible.update(message.appeared)
                self.changes += 1
            case link.Answered():
                self._asked.answered(message.held, message.missing)
                self.changes += 1
            case link.FetchDone():
                self._done(message)
            case link.Directory():
                state = NodeState(
                    True, message.connected, message.ever_connected, message.peers, message.sharing, message.asks
                )
                with self._lock:
                    self._state = state
                    self._start = msgspec.structs.replace(self._start, sharing=message.sharing)
                self.changes += 1
            case link.Operate() | link.MakeKeys():
                self.on_request(message)
            case link.Rates():
                self._fastest = _fastest(message)
            case link.Ready() | link.Failed():
                log.error("node sent %s out of turn; ignored", type(message).__name__)

    def _refuse(self, message: link.Operate | link.MakeKeys) -> None:
        text = "this engine cannot do that"
        if isinstance(message, link.Operate):
            self.answer(link.Operated(message.operation_id, Report(state=RunState.FAILED, text=text)))
        else:
            self.answer(link.KeysMade(message.number, [], text))

    def _done(self, message: link.FetchDone) -> None:
        if not self._jobs.done(message):
            log.error("node reported an unknown or misshapen job id=%d; ignored", message.job_id)

    def _wait(self, poller: select.poll) -> bool:
        """Whether the node has said something. When it is we who were stopped meanwhile (a paused container, a machine
        that gave us no processor), the node is not late for it.
        """
        patience_s, since_s = self._patience_s(), time.monotonic()
        is_readable = bool(poller.poll(patience_s * 1000))
        now_s = time.monotonic()
        stopped_s = now_s - since_s - patience_s
        if stopped_s > STOPPED_S:
            self._jobs.postpone(stopped_s)
            if self._sending_since_s is not None:
                self._sending_since_s = now_s
        return is_readable

    def _patience_s(self) -> float:
        """How long to wait for the node's next word: until the first job is late, but not for ever."""
        first_s = self._jobs.first_late_s()
        if first_s is None:
            return WAKE_S
        return min(WAKE_S, max(0.001, first_s - time.monotonic()))

    def _kill_if_late(self) -> None:
        late = self._jobs.late()
        if late:
            log.error("node did not finish jobs in time jobs=%s pid=%s; killing it", late[:8], self._child.pid)
            self._child.kill(gentle=False)
            return
        since_s = self._sending_since_s
        if since_s is not None and time.monotonic() - since_s > DEAF_S:
            log.error("node does not read its link pid=%s; killing it", self._child.pid)
            self._child.kill(gentle=False)

    def _lost(self) -> None:
        """The link ended: make sure that nobody can write into the pool, then let go of everything that was out."""
        with self._lock:
            self._state = DOWN
            self._life += 1
        self._visible.clear()
        self._asked.clear()
        self._fastest = None
        self.changes += 1
        self._child.kill(gentle=False)
        self._jobs.fail_all(MissReason.NODE_DOWN)

    # -- writing thread ------------------------------------------------------------------------------------------------

    def _write(self) -> None:
        while (entry := self._outgoing.get()) is not None:
            self._write_one(*entry)
            if self._missed_slots and self._outgoing.qsize() < MAX_OUTGOING // 2:
                with self._lock:
                    if self._state.alive:
                        self._tell_missed_slots()

    def _write_one(self, life: int, message: link.Message) -> None:
        with self._lock:
            connection = self._child.connection if life == self._life else None
        if connection is None:
            return
        try:
            frame = pack_frame(link.encode(message))
        except Exception:  # without this thread nobody would ever tell a node anything again
            log.exception("node cannot be told kind=%s", type(message).__name__)
            return
        self._sending_since_s = time.monotonic()
        with (
            self._child.sending,
            contextlib.suppress(OSError),
        ):  # the reading thread sees the same end
            connection.sendall(frame)
        self._sending_since_s = None

    def _tell_slots(self, slots: list[int], message: link.Message) -> None:
        with self._lock:
            is_bounded = self._outgoing.qsize() < MAX_OUTGOING and len(slots) <= MAX_SLOTS_PER_MESSAGE
            if self._state.alive and is_bounded:
                self._outgoing.put((self._life, message))
                return
            self._missed_slots.update(slots)
            if self._state.alive and self._outgoing.empty():
                self._tell_missed_slots()

    def _tell_missed_slots(self) -> None:
        """Have the node look at these slots again, whatever has become of them. The caller holds the lock."""
        missed = sorted(self._missed_slots)
        self._missed_slots.clear()
        for start in range(0, len(missed), MAX_SLOTS_PER_MESSAGE):
            part = missed[start : start + MAX_SLOTS_PER_MESSAGE]
            self._outgoing.put((self._life, link.Retract(part)))
            self._outgoing.put((self._life, link.Publish(part, fetched=False)))


def _fastest(rates: link.Rates) -> Source | None:
    if rates.unmeasured:
        return Source("", 0, None)
    if not rates.peers:
        return None
    best = min(rates.peers, key=lambda peer: peer.byte_s * (1 + peer.pulls))
    return Source(best.instance_id, 0, Rate(best.fixed_s, best.byte_s), best.pulls)
