"""The engine's book of fetch jobs that are out at its node: each comes back exactly once, whatever happens."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import NamedTuple

import msgspec

from kvmesh.core.reasons import MissReason
from kvmesh.wire import link

GRACE_S = 2.0
"""How long past its deadline a job may be out before the node is killed."""


class FinishedJob(NamedTuple):
    """One fetch job's end. Nothing writes into its slots any more."""

    job_id: int
    reasons: list[MissReason | None]
    fetched_bytes: int
    seconds: float
    holders: list[str]
    gate: link.GateReport | None = None
    """What the node's gate said; None when it had nothing to decide."""


class _Job(NamedTuple):
    chunks: int
    started_s: float
    give_up_s: float


class FetchJobs:
    """Jobs by id. Safe to use from any thread; `take_finished` by one."""

    def __init__(self) -> None:
        self._out: dict[int, _Job] = {}
        self._changed = threading.Condition()
        """Guards `_out`; held for a few assignments at a time."""
        self._finished: deque[FinishedJob] = deque()

    def add(self, job_id: int, chunks: int, timeout_s: float) -> None:
        """A job goes out."""
        now_s = time.monotonic()
        with self._changed:
            self._out[job_id] = _Job(chunks, now_s, now_s + timeout_s + GRACE_S)

    def done(self, message: link.FetchDone) -> bool:
        """The node has finished one; False when it is none that is out."""
        with self._changed:
            job = self._out.get(message.job_id)
            if job is None or job.chunks != len(message.reasons):
                return False
            self._end(message.job_id, FinishedJob(*msgspec.structs.astuple(message)))
        return True

    def fail(self, job_id: int, reason: MissReason) -> None:
        """End a job, if it is out, without anything."""
        with self._changed:
            job = self._out.get(job_id)
            if job is not None:
                seconds = time.monotonic() - job.started_s
                self._end(job_id, FinishedJob(job_id, [reason] * job.chunks, 0, seconds, []))

    def fail_all(self, reason: MissReason) -> None:
        """End everything that is out without anything."""
        with self._changed:
            for job_id in list(self._out):
                self.fail(job_id, reason)

    def take_finished(self) -> list[FinishedJob]:
        """Jobs that ended since the last call."""
        finished = []
        while self._finished:
            finished.append(self._finished.popleft())
        return finished

    def __bool__(self) -> bool:
        """Whether a job is out or its end was not taken yet."""
        return bool(self._out or self._finished)

    # -- waiting -------------------------------------------------------------------------------------------------------

    def wait(self, longest_s: float) -> bool:
        """Block until no job is out; False when so many seconds have passed."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._out, longest_s)

    def first_late_s(self) -> float | None:
        """time.monotonic() at which the first job will be late; None when none is out."""
        with self._changed:
            return min((job.give_up_s for job in self._out.values()), default=None)

    def late(self) -> list[int]:
        """Those that the node should have finished long ago."""
        now_s = time.monotonic()
        with self._changed:
            return [job_id for job_id, job in self._out.items() if now_s > job.give_up_s]

    def postpone(self, seconds: float) -> None:
        """So long this process did not run: nobody is late for that, nor for not having been heard yet."""
        soonest_s = time.monotonic() + GRACE_S
        with self._changed:
            for job_id, job in self._out.items():
                self._out[job_id] = job._replace(give_up_s=max(job.give_up_s + seconds, soonest_s))

    def _end(self, job_id: int, finished: FinishedJob) -> None:
        self._finished.append(finished)
        del self._out[job_id]
        self._changed.notify_all()
