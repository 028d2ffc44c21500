"""What is common to all pages: the bar on top, the look, and building blocks without a life of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from nicegui import ui
from nicegui.events import GenericEventArguments

from kvmesh.controller.ui.live import Moment
from kvmesh.controller.ui.panel import Panel, Value
from kvmesh.controller.ui.units import duration

STYLE = Path(__file__).parent / "assets" / "style.css"
PAGES = (
    ("/", "Overview"),
    ("/instances", "Instances"),
    ("/traffic", "Traffic"),
    ("/compatibility", "Compatibility"),
    ("/explain", "Explain"),
    ("/operations", "Operations"),
)


class TopBar(Panel, component="assets/kvmesh_topbar.js"):
    """Name, pages, health, theme."""

    def update_moment(self, moment: Moment, path: str, badge: tuple[str, str]) -> None:
        """Show this moment. `badge` is how things are, in a word or two, and its tone."""
        health = moment.health
        counts = {
            "/instances": (len(moment.suspects) + len(moment.corrupt), "warn"),
            "/compatibility": (len(moment.split_models), "bad"),
        }
        pages: list[Value] = []
        for address, title in PAGES:
            number, tone = counts.get(address, (0, ""))
            pages.append({"path": address, "title": title, "count": number, "tone": tone})
        # In minutes, so that it is not sent every second.
        about = f"kvmesh {health.version}, up for {duration(max(60, health.uptime_s // 60 * 60))}"
        self.show(pages=pages, path=path, health=badge[0], tone=badge[1], about=about)


@contextmanager
def frame(on_visible: Callable[[bool], None]) -> Iterator[TopBar]:
    """A page's body: what is built inside stands below the bar."""
    top = TopBar()

    def visible(event: GenericEventArguments) -> None:
        on_visible(event.args is not False)

    top.on("visible", visible)
    with ui.element("div").classes("km-main").props("id=km-main tabindex=-1"):
        yield top


@contextmanager
def card(title: str, note: str = "", *, more: tuple[str, str] | None = None, level: str = "h2") -> Iterator[ui.element]:
    """A titled box. `more` is the text and address of a link in its corner."""
    with ui.element("section").classes("km-card") as made:
        with ui.element("div").classes("km-head"):
            text(title, level)
            if note:
                text(note, "span", "km-muted")
            if more:
                ui.link(*more).classes(replace="km-more")
        yield made


def text(words: str, tag: str = "p", classes: str = "") -> ui.element:
    """Plain words in an HTML element."""
    made = ui.element(tag)
    made._text = words  # noqa: SLF001 - what ui.label does, which is always a div
    return made.classes(classes) if classes else made


@contextmanager
def columns(*, wide_left: bool = False) -> Iterator[None]:
    """Boxes side by side, where there is room."""
    with ui.element("div").classes("km-two km-wide-left" if wide_left else "km-two"):
        yield
