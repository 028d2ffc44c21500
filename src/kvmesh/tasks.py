"""Several coroutines as one: what `asyncio.TaskGroup` does from Python 3.11 on."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine


async def run_all(*works: Coroutine[None, None, None]) -> None:
    """Run all of `works`; when one of them raises, or this is cancelled, end the others. Returns when all have ended.

    `asyncio.gather` does not wait for them when it is cancelled: what they still do at their end (a node says good-bye
    to its directory) is then cut off by the end of the loop. Each is cancelled once, so that it can finish that.
    """
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled():
            task.result()
