from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

from kvmesh.core.reasons import MissReason
from kvmesh.node import fetch_jobs
from kvmesh.node.fetch_jobs import GRACE_S, FetchJobs
from kvmesh.wire import link


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now_s=1000.0)
    monkeypatch.setattr(fetch_jobs, "time", SimpleNamespace(monotonic=lambda: clock.now_s))
    return clock


def test_each_job_comes_back_once(clock):
    """Whatever is said of it, and however often."""
    jobs = FetchJobs()
    jobs.add(1, chunks=2, timeout_s=5.0)
    jobs.add(2, chunks=1, timeout_s=5.0)
    clock.now_s += 3
    assert not jobs.done(link.FetchDone(1, [None], 0, 0.1, [])), "of two chunks"
    assert not jobs.done(link.FetchDone(3, [None], 0, 0.1, [])), "not out"
    assert jobs.done(link.FetchDone(1, [None, MissReason.STALE], 4096, 0.1, ["b"]))
    assert not jobs.done(link.FetchDone(1, [None, None], 8192, 0.1, ["b"]))
    jobs.fail_all(MissReason.NODE_DOWN)
    jobs.fail(2, MissReason.DRAINING)
    assert jobs
    first, second = jobs.take_finished()
    assert (first.job_id, first.reasons, first.holders) == (1, [None, MissReason.STALE], ["b"])
    assert (second.job_id, second.reasons, second.seconds) == (2, [MissReason.NODE_DOWN], 3.0)
    assert not jobs
    assert jobs.take_finished() == []


def test_a_job_is_late_after_its_deadline_and_a_grace(clock):
    jobs = FetchJobs()
    assert jobs.first_late_s() is None
    jobs.add(1, chunks=1, timeout_s=5.0)
    jobs.add(2, chunks=1, timeout_s=50.0)
    assert jobs.first_late_s() == clock.now_s + 5 + GRACE_S
    clock.now_s += 5 + GRACE_S + 0.1
    assert jobs.late() == [1]


def test_nobody_is_late_for_the_time_in_which_we_were_stopped(clock):
    jobs = FetchJobs()
    jobs.add(1, chunks=1, timeout_s=5.0)
    clock.now_s += 2 + 100
    jobs.postpone(100.0)
    assert jobs.first_late_s() == clock.now_s + 3 + GRACE_S
    clock.now_s += 3 + GRACE_S + 50
    jobs.postpone(50.0)
    assert jobs.late() == []
    clock.now_s += GRACE_S + 0.1
    jobs.postpone(0.0)
    assert jobs.late() == [], "what has come meanwhile is heard first"
    assert jobs.first_late_s() == clock.now_s + GRACE_S


def test_waiting_ends_with_the_last_job():
    jobs = FetchJobs()
    assert jobs.wait(0)
    jobs.add(1, chunks=1, timeout_s=5.0)
    assert not jobs.wait(0.01)
    threading.Timer(0.02, jobs.fail_all, (MissReason.DRAINING,)).start()
    assert jobs.wait(30)
