"""Several coroutines as one: what `asyncio.TaskGroup` does from Python 3.11 on."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine

AGAIN_S = 5.0
"""Before Python 3.12, `asyncio.wait_for` may lose a cancellation: so long later there is another one."""


async def run_all(*works: Coroutine[None, None, None]) -> None:
    """Run all of `works`; when one of them raises, or this is cancelled, end the others. Returns when all have ended.

    `asyncio.gather` does not wait for them when it is cancelled: what they still do at their end (a node says good-bye
    to its directory) is then cut off by the end of the loop. Each has AGAIN_S for that.
    """
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        running = set(tasks)
        while running:
            for task in running:
                task.cancel()
            _, running = await asyncio.wait(running, timeout=AGAIN_S)
        errors = [task.exception() for task in tasks if not task.cancelled()]
    for error in errors:
        if error is not None:
            raise error
