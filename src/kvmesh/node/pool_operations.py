"""Carries out commands on a pool, a little at a time, on the thread that owns it: a state machine without I/O.

    any thread              submit(id, command, timeout)
    the owner, every step   step(now) -> reports that are news; has_work() says whether to go on stepping
    the owner, on a reset   forget(): the pool has been thrown away, and all pins with it

What "the pool" is, is behind `OperatedPool`: vLLM's (`kvmesh.vllm.operated_pool`) or a stand-in's. A step takes at most
STEP_BUDGET_S, so that an engine with requests is not held up by an operator.

Chunks that are being written or read are left alone until they are idle: a clear waits for them, and says after its
deadline how many it could not get. Pins hold chunks the way a transfer does, so that eviction passes them by without
looking at them; together they never hold more than a share of the pool.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from enum import Enum
from typing import NamedTuple, Protocol

from kvmesh.core.reasons import MissReason
from kvmesh.wire.operations import (
    AnyCommand,
    ClearChunks,
    ListHot,
    PinChunks,
    Report,
    RunState,
    UnpinChunks,
    WarmChunks,
)

STEP_BUDGET_S = 0.004
MAX_WAITING = 64
"""Commands that may be here; more are refused."""
MAX_IN_FLIGHT = 256
"""Chunks that one warm fetches at a time, and at most an eighth of the pool."""
REPORT_INTERVAL_S = 0.1
_BUDGET_CHUNKS = 64
"""The clock is looked at once per so many chunks."""


class SlotState(Enum):
    """What the pool says of a key."""

    ABSENT = "absent"
    WRITING = "writing"
    """A slot is reserved and its bytes are on their way."""
    BUSY = "busy"
    """Complete, and read by a transfer right now (or pinned)."""
    READY = "ready"


class OperatedPool(Protocol):
    """A pool, as its owner's thread sees it. No method waits."""

    slots: int
    chunk_bytes: int

    def keys(self) -> list[bytes]:
        """All keys with a slot."""

    def hottest(self, limit: int) -> list[bytes]:
        """Complete chunks, most recently used first."""

    def state(self, key: bytes) -> SlotState: ...

    def release(self, keys: list[bytes]) -> None:
        """Retract and free; all are READY."""

    def hold(self, key: bytes) -> None:
        """Keep a READY or BUSY chunk from being evicted."""

    def let_go(self, key: bytes) -> None:
        """Undo one `hold`."""

    def begin_warm(self, operation_id: str) -> None: ...

    def pull(self, operation_id: str, key: bytes) -> MissReason | None:
        """Reserve a slot and have the chunk fetched, as for a request; None when that is under way."""

    def pulled(self, operation_id: str, key: bytes) -> MissReason | None:
        """Why a chunk that was pulled and is absent now did not come."""

    def end_warm(self, operation_id: str) -> None: ...


class News(NamedTuple):
    """A report to be passed on."""

    operation_id: str
    report: Report


class _Submitted(NamedTuple):
    operation_id: str
    command: AnyCommand
    give_up_s: float


class _Run:
    """A command that is being carried out."""

    def __init__(self, operation_id: str, keys: Iterable[bytes], give_up_s: float) -> None:
        self.operation_id = operation_id
        self.todo = deque(dict.fromkeys(keys))
        self.total = len(self.todo)
        self.done = 0
        self.outcomes: Counter[str] = Counter()
        self.give_up_s = give_up_s
        self.reported_s = float("-inf")

    def settle(self, outcome: str, *, good: bool) -> None:
        """One chunk has come to its end."""
        self.outcomes[outcome] += 1
        self.done += good


class _Clear(_Run):
    pass


class _Pin(_Run):
    def __init__(self, operation_id: str, keys: Iterable[bytes], give_up_s: float, seconds: float) -> None:
        super().__init__(operation_id, keys, give_up_s)
        self.seconds = seconds


class _Unpin(_Run):
    pass


class _Warm(_Run):
    def __init__(self, operation_id: str, keys: Iterable[bytes], give_up_s: float) -> None:
        super().__init__(operation_id, keys, give_up_s)
        self.in_flight: dict[bytes, None] = {}
        self.fetched = 0


class PoolOperations:
    """The commands of one pool. `submit` may be called from any thread, everything else belongs to the owner's."""

    def __init__(
        self, pool: OperatedPool, *, pin_max_share: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`pin_max_share`: of the slots, that pins may hold together. `clock`: seconds that do not go back."""
        self._pool = pool
        self._clock = clock
        self._pin_limit = int(pool.slots * pin_max_share)
        self._lock = threading.Lock()
        self._submitted: deque[_Submitted] = deque()
        self._runs: list[_Run] = []
        self._pins: dict[bytes, float] = {}
        """Until when, by key."""
        self._next_expiry_s = float("inf")

    @property
    def pinned_chunks(self) -> int:
        return len(self._pins)

    def submit(self, operation_id: str, command: AnyCommand, give_up_s: float) -> bool:
        """Take a command, to be carried out by `step` before the clock says `give_up_s`. False when there are too many.
        Any thread.
        """
        with self._lock:
            if len(self._submitted) + len(self._runs) >= MAX_WAITING:
                return False
            self._submitted.append(_Submitted(operation_id, command, give_up_s))
        return True

    def has_work(self) -> bool:
        """Whether `step` has something to do now. Pins that wait for their end are no work: they matter only when
        something is to be evicted, and `expire_pins` is called before that.
        """
        return bool(self._submitted or self._runs)

    def step(self, now_s: float) -> list[News]:
        """Go on for a moment. Returns what the submitters should know."""
        until_s = now_s + STEP_BUDGET_S
        self.expire_pins(now_s)
        news = self._start(now_s)
        for run in list(self._runs):
            self._advance(run, until_s)
            news += self._report(run, now_s)
        return news

    def expire_pins(self, now_s: float) -> None:
        """Let go of chunks whose time is up."""
        if now_s < self._next_expiry_s:
            return
        for key in [key for key, until_s in self._pins.items() if until_s <= now_s]:
            self._unpin(key)
        self._next_expiry_s = min(self._pins.values(), default=float("inf"))

    def forget(self) -> None:
        """The pool is being thrown away: its chunks, with their pins, are gone without our doing."""
        self._pins.clear()
        self._next_expiry_s = float("inf")

    def abandon(self) -> list[str]:
        """Let everything be as it is, after an error that nobody foresaw. Returns whose commands end by that.

        Chunks that were pinned stay where they are until the pool is reset: their references cannot be trusted.
        """
        with self._lock:
            ended = [entry.operation_id for entry in self._submitted] + [run.operation_id for run in self._runs]
            self._submitted.clear()
            self._runs.clear()
        self.forget()
        return ended

    # -- commands ------------------------------------------------------------------------------------------------------

    def _start(self, now_s: float) -> list[News]:
        with self._lock:
            submitted, self._submitted = list(self._submitted), deque()
        news = []
        for operation_id, command, give_up_s in submitted:
            if now_s >= give_up_s:
                text = "the engine took no step before the operation's time was up"
                report = Report(state=RunState.FAILED, text=text, pinned_chunks=len(self._pins))
                news.append(News(operation_id, report))
            elif isinstance(command, ListHot):
                keys = self._pool.hottest(command.limit)
                number, pinned = len(keys), len(self._pins)
                report = Report(
                    state=RunState.DONE, chunks_done=number, chunks_total=number, keys=keys, pinned_chunks=pinned
                )
                news.append(News(operation_id, report))
            else:
                self._runs.append(self._make_run(operation_id, command, give_up_s))
        return news

    def _make_run(self, operation_id: str, command: AnyCommand, give_up_s: float) -> _Run:
        match command:
            case ClearChunks():
                return _Clear(operation_id, self._pool.keys() if command.keys is None else command.keys, give_up_s)
            case PinChunks():
                return _Pin(operation_id, command.keys, give_up_s, command.seconds)
            case UnpinChunks():
                return _Unpin(operation_id, list(self._pins) if command.keys is None else command.keys, give_up_s)
            case WarmChunks():
                self._pool.begin_warm(operation_id)
                return _Warm(operation_id, command.keys, give_up_s)
        raise AssertionError(f"{type(command).__name__} is not carried out in steps")

    def _advance(self, run: _Run, until_s: float) -> None:
        match run:
            case _Clear():
                self._clear(run, until_s)
            case _Pin():
                self._pin(run, until_s)
            case _Unpin():
                self._unpin_some(run, until_s)
            case _Warm():
                self._warm(run, until_s)

    def _clear(self, run: _Clear, until_s: float) -> None:
        """Free what is idle; come back for the rest. What was pinned is let go of first: whoever clears means it."""
        again: list[bytes] = []
        while run.todo and self._clock() < until_s:
            free: list[bytes] = []
            for key in _some(run.todo):
                if key in self._pins:
                    self._unpin(key)
                state = self._pool.state(key)
                if state is SlotState.READY:
                    free.append(key)
                elif state is SlotState.ABSENT:
                    run.settle("absent", good=True)
                else:
                    again.append(key)
            self._pool.release(free)
            for _ in free:
                run.settle("cleared", good=True)
        run.todo.extend(again)

    def _pin(self, run: _Pin, until_s: float) -> None:
        expires_s = self._clock() + run.seconds
        again: list[bytes] = []
        while run.todo and self._clock() < until_s:
            for key in _some(run.todo):
                state = self._pool.state(key)
                if state is SlotState.WRITING:
                    again.append(key)
                elif state is SlotState.ABSENT:
                    run.settle("absent", good=False)
                elif key not in self._pins and len(self._pins) >= self._pin_limit:
                    run.settle("over_limit", good=False)
                else:
                    if key not in self._pins:
                        self._pool.hold(key)
                    self._pins[key] = expires_s
                    run.settle("pinned", good=True)
        run.todo.extend(again)
        self._next_expiry_s = min(self._next_expiry_s, expires_s)

    def _unpin_some(self, run: _Unpin, until_s: float) -> None:
        while run.todo and self._clock() < until_s:
            for key in _some(run.todo):
                if key in self._pins:
                    self._unpin(key)
                    run.settle("unpinned", good=True)
                else:
                    run.settle("absent", good=True)

    def _unpin(self, key: bytes) -> None:
        del self._pins[key]
        self._pool.let_go(key)

    def _warm(self, run: _Warm, until_s: float) -> None:
        self._settle_pulled(run)
        window = max(1, min(MAX_IN_FLIGHT, self._pool.slots // 8))
        while run.todo and len(run.in_flight) < window and self._clock() < until_s:
            key = run.todo.popleft()
            state = self._pool.state(key)
            if state in (SlotState.READY, SlotState.BUSY):
                run.settle("present", good=True)
            elif run.fetched + len(run.in_flight) >= self._pool.slots - len(self._pins):
                run.settle("over_capacity", good=False)  # more would push out what has just been fetched
            elif state is SlotState.WRITING:
                run.in_flight[key] = None  # a request's doing; it is here soon
            else:
                reason = self._pool.pull(run.operation_id, key)
                if reason is None:
                    run.in_flight[key] = None
                else:
                    run.settle(reason.value, good=False)

    def _settle_pulled(self, run: _Warm) -> None:
        for key in list(run.in_flight):
            state = self._pool.state(key)
            if state is SlotState.WRITING:
                continue
            del run.in_flight[key]
            if state is SlotState.ABSENT:
                reason = self._pool.pulled(run.operation_id, key)
                run.settle("lost" if reason is None else reason.value, good=False)
            else:
                run.fetched += 1
                run.settle("fetched", good=True)

    # -- reports -------------------------------------------------------------------------------------------------------

    def _report(self, run: _Run, now_s: float) -> list[News]:
        in_flight = run.in_flight if isinstance(run, _Warm) else {}
        ended = not run.todo and not in_flight
        if not ended and now_s >= run.give_up_s:
            for _ in range(len(run.todo) + len(in_flight)):
                run.settle("busy" if isinstance(run, _Clear) else "not_in_time", good=False)
            ended = True
        if not ended:
            if now_s - run.reported_s < REPORT_INTERVAL_S:
                return []
            run.reported_s = now_s
            return [News(run.operation_id, self._make_report(run, RunState.RUNNING))]
        self._runs.remove(run)
        if isinstance(run, _Warm):
            self._pool.end_warm(run.operation_id)
        state = RunState.DONE if run.done == run.total else RunState.PARTLY if run.done else RunState.FAILED
        return [News(run.operation_id, self._make_report(run, state))]

    def _make_report(self, run: _Run, state: RunState) -> Report:
        return Report(
            state=state,
            chunks_done=run.done,
            chunks_total=run.total,
            bytes_done=run.done * self._pool.chunk_bytes,
            outcomes=dict(run.outcomes),
            pinned_chunks=len(self._pins),
        )


def _some(todo: deque[bytes]) -> list[bytes]:
    return [todo.popleft() for _ in range(min(_BUDGET_CHUNKS, len(todo)))]
