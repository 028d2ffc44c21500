"""All directories of one node as one client: several controllers, Redis, or the peers themselves."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

from kvmesh.directory.base import DirectoryClient
from kvmesh.directory.merge import Merge, Source
from kvmesh.tasks import run_all
from kvmesh.wire.directory import FetchReport, Member

log = logging.getLogger("kvmesh.directory")

SWEEP_S = 1.0

Maker = Callable[[Source], DirectoryClient]


class DirectoryGroup:
    """Publishes to all of its directories and follows all of them. Lives on the node's event loop."""

    def __init__(
        self, merge: Merge, makers: Sequence[Maker], *, fallback: Maker | None = None, fallback_after_s: float = 30.0
    ) -> None:
        """
        Args:
            merge: makes one view of what they say.
            makers: each makes the client of one directory.
            fallback: makes what is used beside them while none of them has answered for long.
            fallback_after_s: how long that is.
        """
        self._merge = merge
        self._sources = [merge.source() for _ in makers]
        self._clients = [make(source) for make, source in zip(makers, self._sources, strict=True)]
        self._make_fallback = fallback
        self._fallback_after_s = fallback_after_s
        self._fallback: DirectoryClient | None = None
        self._member: Member | None = None
        self._has_left = False

    @property
    def problem(self) -> str:
        """What is wrong with any of them, in words; empty when all is well."""
        problems = [client.problem for client in self._clients]
        if self._fallback is not None:
            problems.append(f"following peers directly meanwhile {self._fallback.problem}".strip())
        return "; ".join(problem for problem in problems if problem)

    async def run(self, member: Member) -> None:
        """Join all as `member` and serve until cancelled; then leave."""
        self._member = member
        await run_all(self._watch(), *(client.run(member) for client in self._clients))

    def changes_pending(self) -> None:
        """The outbox has something new."""
        for client in self._clients:
            client.changes_pending()

    def follow_inventories(self, wanted: bool) -> None:
        """Whether to hear what others hold."""
        for client in self._clients:
            client.follow_inventories(wanted)

    async def ask(self, keys: Sequence[bytes]) -> dict[bytes, list[tuple[str, str]]] | None:
        """Ask all that are connected at once; the first that answers is believed."""
        asked = {
            asyncio.ensure_future(client.ask(keys))
            for client, source in zip(self._clients, self._sources, strict=True)
            if source.connected
        }
        try:
            while asked:
                done, asked = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
                for one in done:
                    if one.exception() is None and (found := one.result()) is not None:
                        return found
        finally:
            for one in asked:
                one.cancel()
        return None

    def leave(self) -> None:
        """Be a member of none of them any more, and stay away for good."""
        self._has_left = True
        for client in (*self._clients, *([] if self._fallback is None else [self._fallback])):
            client.leave()

    def report(self, report: FetchReport) -> None:
        """Tell of a finished fetch; may be lost."""
        for client in self._clients:
            client.report(report)

    async def _watch(self) -> None:
        """Let go of members that nobody names any more; start and end the fallback."""
        running: asyncio.Task[None] | None = None
        source: Source | None = None
        gone_since_s = time.monotonic()
        try:
            while True:
                await asyncio.sleep(SWEEP_S)
                now_s = time.monotonic()
                self._merge.sweep(now_s)
                if any(one.connected for one in self._sources):
                    gone_since_s = now_s
                if self._make_fallback is None or self._member is None:
                    continue
                is_needed = now_s - gone_since_s > self._fallback_after_s and not self._has_left
                if is_needed and running is None:
                    log.warning(
                        "no directory for %.0f s; following peers directly until one is back", self._fallback_after_s
                    )
                    source = self._merge.source()
                    self._fallback = self._make_fallback(source)
                    running = asyncio.create_task(self._fallback.run(self._member))
                elif running is not None and source is not None and not is_needed:
                    log.info("directory is back; no longer following peers directly")
                    await _end(running)
                    self._merge.drop(source)
                    running = source = self._fallback = None
        finally:
            if running is not None:
                await _end(running)


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait((task,))
