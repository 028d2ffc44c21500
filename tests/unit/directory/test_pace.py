"""Changes are told at once when little comes, and in batches when much does."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from kvmesh.directory import pace as pace_module
from kvmesh.directory.pace import BATCH_S, Pace


class Clock:
    """Time that only sleeping moves."""

    def __init__(self) -> None:
        self.now_s = 50.0
        self.slept_s: list[float] = []

    def monotonic(self) -> float:
        return self.now_s

    async def sleep(self, seconds: float) -> None:
        self.slept_s.append(seconds)
        self.now_s += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(pace_module, "time", clock)
    monkeypatch.setattr(pace_module, "asyncio", SimpleNamespace(sleep=clock.sleep))
    return clock


async def test_the_first_change_and_one_after_a_while_wait_for_nobody(clock: Clock) -> None:
    pace = Pace()
    await pace.turn()
    clock.now_s += BATCH_S
    await pace.turn()
    assert not clock.slept_s


async def test_what_comes_right_after_a_batch_waits_for_the_next(clock: Clock) -> None:
    pace = Pace()
    await pace.turn()
    clock.now_s += BATCH_S / 4
    await pace.turn()
    assert clock.slept_s == [pytest.approx(BATCH_S * 3 / 4)]
    await pace.turn()
    assert clock.slept_s[1:] == [pytest.approx(BATCH_S)]
