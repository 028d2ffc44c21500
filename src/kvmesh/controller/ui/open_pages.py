"""The pages that are open: brought up to date together, limited in number, and forgotten when they are left.

NiceGUI keeps a page from its request until its browser has been gone for RECONNECT_S, and for a minute when no browser
ever connects to it, as with `curl` and crawlers. So pages that nobody has connected to are limited, the oldest of them
going first, and all pages together are limited too.

Everything runs on the controller's loop. Nothing runs while no page is open.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from nicegui import Client

from kvmesh.controller.ui.live import REFRESH_S, Live, Moment

logger = logging.getLogger(__name__)

MAX_PAGES = 200
"""Open or waiting to be connected again. Beyond it a request gets a 503."""
MAX_UNCONNECTED = 24
"""Requested, and no browser has connected yet: it takes a browser a second or two."""
RECONNECT_S = 5.0
"""A browser that has lost its connection may take its page up again for so long; later it loads it anew."""

Update = Callable[[Moment], None]


class OpenPages:
    """All pages of this process."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._updates: dict[str, Update] = {}
        """By client id: connected and not hidden."""
        self._task: asyncio.Task[None] | None = None

    def may_open(self) -> bool:
        """Whether one more page may be made. Makes room by forgetting pages that no browser has connected to."""
        unconnected = [client for client in Client.instances.values() if is_unconnected(client)]
        unconnected.sort(key=lambda client: client.created)
        for client in unconnected[: max(0, len(unconnected) - MAX_UNCONNECTED + 1)]:
            client.delete()
        return len(Client.instances) < MAX_PAGES

    def open(self, client: Client, update: Update) -> None:
        """A page has been built: show it the present, and bring it up to date from when it is connected."""
        update(self._live.moment())
        client.on_connect(lambda: self.resume(client, update))
        client.on_disconnect(lambda: self.pause(client))
        client.on_delete(lambda: self.pause(client))

    def resume(self, client: Client, update: Update) -> None:
        """The page is seen (again)."""
        self._updates[client.id] = update
        self._update(client.id)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run(), name="pages")

    def pause(self, client: Client) -> None:
        """The page is hidden or gone: it costs nothing now."""
        if not client.has_socket_connection or client.is_deleted:
            self._updates.pop(client.id, None)

    def hide(self, client: Client) -> None:
        """The page is in a tab that nobody looks at."""
        self._updates.pop(client.id, None)

    def statistics(self) -> tuple[int, int]:
        """Pages that are brought up to date, and pages that are kept."""
        return len(self._updates), len(Client.instances)

    async def _run(self) -> None:
        while self._updates:
            started_s = time.monotonic()
            for client_id in list(self._updates):
                self._update(client_id)
                await asyncio.sleep(0)  # members wait no longer than for one page
            # However many pages there are, they get no more than a quarter of the controller's time.
            await asyncio.sleep(max(REFRESH_S, 3 * (time.monotonic() - started_s)))
        self._live.forget()

    def _update(self, client_id: str) -> None:
        """One page that cannot be updated does not keep the others from it."""
        update, client = self._updates.get(client_id), Client.instances.get(client_id)
        if update is None or client is None:
            self._updates.pop(client_id, None)
            return
        try:
            with client:
                update(self._live.moment())
        except Exception:
            logger.exception("event=page_failed page=%s", client.page.path)
            self._updates.pop(client_id, None)


def is_unconnected(client: Client) -> bool:
    """No browser has ever connected to it."""
    return client.tab_id is None and client.environ is None
