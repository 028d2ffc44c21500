"""Several coroutines as one."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from kvmesh import tasks
from kvmesh.tasks import run_all


async def _for_ever() -> None:
    await asyncio.Event().wait()


class Goodbye:
    """Runs until it is cancelled, and then has something to finish."""

    def __init__(self) -> None:
        self.said = False

    async def run(self) -> None:
        try:
            await _for_ever()
        finally:
            await asyncio.sleep(0.02)
            self.said = True


async def test_whoever_cancels_it_waits_for_what_all_do_at_their_end() -> None:
    """Also where it stands within another one."""
    goodbyes = [Goodbye(), Goodbye()]
    work = asyncio.ensure_future(run_all(_for_ever(), goodbyes[0].run(), run_all(_for_ever(), goodbyes[1].run())))
    await asyncio.sleep(0.2)
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    assert [one.said for one in goodbyes] == [True, True]


async def test_one_that_loses_its_cancellation_is_cancelled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "AGAIN_S", 0.02)

    async def lose() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await _for_ever()
        await _for_ever()

    work = asyncio.ensure_future(run_all(lose(), _for_ever()))
    await asyncio.sleep(0.2)
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(work, 10)


async def test_one_that_fails_ends_the_others() -> None:
    async def fail() -> None:
        await asyncio.sleep(0.01)
        raise OSError("broken")

    goodbye = Goodbye()
    with pytest.raises(OSError, match="broken"):
        await run_all(goodbye.run(), fail())
    assert goodbye.said


async def test_it_ends_when_all_have_ended() -> None:
    done: list[int] = []

    async def work(number: int) -> None:
        await asyncio.sleep(0.01 * number)
        done.append(number)

    await run_all(work(1), work(2))
    assert done == [1, 2]
