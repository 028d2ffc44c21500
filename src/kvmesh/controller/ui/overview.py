"""The first page, and how pages get onto the controller's HTTP server."""

from __future__ import annotations

from fastapi import FastAPI
from nicegui import ui

from kvmesh.controller.api import ENDPOINTS, Context
from kvmesh.controller.paths import KnownPaths
from kvmesh.controller.ui.fetches import Fetches
from kvmesh.controller.ui.frame import frame
from kvmesh.controller.ui.instances import Instances
from kvmesh.controller.ui.live import REFRESH_S, Live
from kvmesh.controller.ui.tiles import Tiles
from kvmesh.controller.ui.warnings import Warnings

_ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"><rect width="32" height="32" rx="7" fill="#16324f"/>'
    '<g stroke="#8fd3ff" stroke-width="2"><path d="M9 9L23 23M23 9L9 23M9 9H23V23H9Z" fill="none"/></g>'
    '<g fill="#fff"><circle cx="9" cy="9" r="3.2"/><circle cx="23" cy="9" r="3.2"/><circle cx="9" cy="23" r="3.2"/>'
    '<circle cx="23" cy="23" r="3.2"/></g></svg>'
)


def mount(app: FastAPI, context: Context) -> None:
    """Put the pages under everything that `app` does not answer itself. Once per process: NiceGUI has one state."""
    live = Live(context)

    @ui.page("/")
    def overview() -> None:
        with frame() as top:
            sections = (top, Warnings(), Tiles(), Instances(), Fetches())

        def update() -> None:
            moment = live.moment()
            for section in sections:
                section.update(moment)

        update()
        ui.timer(REFRESH_S, update, immediate=False)  # runs only while this page is open

    ui.run_with(
        app,
        title="kvmesh",
        favicon=_ICON,
        dark=None,  # as the browser says
        binding_refresh_interval=None,  # nothing is bound: sections are updated by hand
        reconnect_timeout=10.0,
        show_welcome_message=False,
    )
    app.add_middleware(KnownPaths, endpoints=ENDPOINTS)
