"""When changes are told: at once when little comes, in batches when much does."""

from __future__ import annotations

import asyncio
import math
import time

BATCH_S = 0.002
"""Changes that come within so long after a batch travel in the next one."""


class Pace:
    """Keeps `BATCH_S` between one batch and the next. One task's own."""

    def __init__(self) -> None:
        self._last_s = -math.inf

    async def turn(self) -> None:
        """Return when the next batch may be made: at once if the last one was made a while ago."""
        wait_s = self._last_s + BATCH_S - time.monotonic()
        if wait_s > 0:
            await asyncio.sleep(wait_s)
        self._last_s = time.monotonic()
