"""How the pages get onto the controller's HTTP server."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import nicegui
from fastapi import FastAPI, Query
from nicegui import Client, ui

from kvmesh.controller.api import ENDPOINTS, Context
from kvmesh.controller.paths import KnownPaths
from kvmesh.controller.ui import compatibility, explain, instance, instances, operations, overview, traffic
from kvmesh.controller.ui.attention import badge, notices_of
from kvmesh.controller.ui.frame import PAGES, STYLE, frame
from kvmesh.controller.ui.live import Live, Moment
from kvmesh.controller.ui.open_pages import RECONNECT_S, OpenPages, Update

_ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"><rect width="32" height="32" rx="7" fill="#10202f"/>'
    '<g stroke="#7cc4ff" stroke-width="2"><path d="M9 9L23 23M23 9L9 23M9 9H23V23H9Z" fill="none"/></g>'
    '<g fill="#fff"><circle cx="9" cy="9" r="3.2"/><circle cx="23" cy="9" r="3.2"/><circle cx="9" cy="23" r="3.2"/>'
    '<circle cx="23" cy="23" r="3.2"/></g></svg>'
)
MAX_ID_CHARACTERS = 256


class Site:
    """All pages over one controller."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.live = Live(context)
        self.pages = OpenPages(self.live)

    def page(self, path: str, build: Callable[[], Update]) -> None:
        """One page: `build` makes its parts and says how to bring them up to date."""
        client = ui.context.client
        title = dict(PAGES).get(path, "Instance")
        ui.page_title(f"{title} · kvmesh")

        def on_visible(visible: bool) -> None:
            if visible:
                self.pages.resume(client, update)
            else:
                self.pages.hide(client)

        with frame(on_visible) as top:
            update_parts = build()

        def update(moment: Moment) -> None:
            top.update_moment(moment, path, badge(list(notices_of(moment))))
            update_parts(moment)

        self.pages.open(client, update)


def mount(app: FastAPI, context: Context) -> None:
    """Put the pages under everything that `app` does not answer itself. Once per process: NiceGUI has one state."""
    site = Site(context)
    context.gauges["pages"] = ("Web pages that are open and seen.", lambda: site.pages.statistics()[0])
    context.gauges["pages_kept"] = (
        "Web pages in memory: open, hidden, or left a moment ago.",
        lambda: site.pages.statistics()[1],
    )
    questions = explain.Questions(context)

    @ui.page("/")
    def overview_page() -> None:
        site.page("/", lambda: overview.build(questions))

    @ui.page("/instances")
    def instances_page() -> None:
        site.page("/instances", instances.build)

    @ui.page("/instance")
    def instance_page(id: Annotated[str, Query(alias="id", max_length=MAX_ID_CHARACTERS)] = "") -> None:  # noqa: A002
        site.page("/instance", lambda: instance.build(id))

    @ui.page("/traffic")
    def traffic_page() -> None:
        site.page("/traffic", traffic.build)

    @ui.page("/compatibility")
    def compatibility_page() -> None:
        site.page("/compatibility", compatibility.build)

    @ui.page("/explain")
    def explain_page(request_id: Annotated[str, Query(alias="request", max_length=MAX_ID_CHARACTERS)] = "") -> None:
        site.page("/explain", lambda: explain.build(questions, request_id.strip()))

    @ui.page("/operations")
    def operations_page(client: Client) -> None:
        site.page("/operations", lambda: operations.build(context, client))

    nicegui.app.config.quasar_config["brand"] = {"primary": "#0b6bcb", "positive": "#14804a", "negative": "#c0271f"}
    ui.add_css(STYLE, shared=True)
    ui.run_with(
        app,
        title="kvmesh",
        favicon=_ICON,
        dark=None,  # as the browser says
        binding_refresh_interval=None,  # nothing is bound: parts are updated by hand
        reconnect_timeout=RECONNECT_S,
        message_history_length=50,
        tailwind=False,  # the look is our own, and a page is there half a second sooner
        show_welcome_message=False,
    )
    app.add_middleware(KnownPaths, endpoints=ENDPOINTS, may_open=site.pages.may_open)
