"""The web page's times in a real browser. Without Playwright's Python package and a Chromium there are none."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass

CHROMIUM_FLAGS = (
    "--no-sandbox",  # it is shown nothing but our own page, and often runs as root
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
TIMEOUT_MS = 60_000
UPDATES = 5


@dataclass(frozen=True)
class PageTimes:
    """In seconds, as a reader sees it."""

    shown_s: float
    """From asking for the overview to its first figures, with a cold cache."""
    complete_s: float
    """To the page of all instances, with a warm cache, first rows in view."""
    update_s: float
    """Mean pause between two updates of the open overview."""
    sort_s: float
    """From a click on a table's heading to the new order."""


def find_chromium() -> str | None:
    """A Chromium of this machine, if it can be driven."""
    try:
        import playwright.sync_api  # noqa: F401, PLC0415 - only where it is installed
    except ModuleNotFoundError:
        return None
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class BrowserError(Exception):
    """The browser did not start, or the page did not come in time."""


def measure_page(url: str, chromium: str, *, pages: int) -> PageTimes:
    """Open the page, and `pages` in all, and measure the first one. Raises BrowserError."""
    from playwright.sync_api import Error  # noqa: PLC0415 - only where it is installed

    try:
        return _measure_page(url, chromium, pages)
    except Error as error:
        raise BrowserError(error.message.splitlines()[0]) from None


def _measure_page(url: str, chromium: str, pages: int) -> PageTimes:
    from playwright.sync_api import sync_playwright  # noqa: PLC0415 - only where it is installed

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=list(CHROMIUM_FLAGS))
        try:
            context = browser.new_context()
            context.set_default_timeout(TIMEOUT_MS)
            page = context.new_page()
            started_s = time.monotonic()
            page.goto(url)
            page.wait_for_selector(".km-value")
            shown_s = time.monotonic() - started_s
            others = [context.new_page() for _ in range(pages - 1)]
            for other in others:
                other.goto(url)
            page.bring_to_front()
            update_s = float(page.evaluate(_UPDATE_JS, UPDATES))
            started_s = time.monotonic()
            page.goto(f"{url.rstrip('/')}/instances")
            page.wait_for_selector("tbody tr")
            complete_s = time.monotonic() - started_s
            started_s = time.monotonic()
            page.click("thead th:first-child button")
            page.wait_for_selector("thead th:first-child[aria-sort=descending]")
            page.wait_for_selector(".km-table:not(.km-busy)")
            sort_s = time.monotonic() - started_s
            return PageTimes(shown_s, complete_s, update_s, sort_s)
        finally:
            browser.close()


_UPDATE_JS = """
(wanted) => new Promise((resolve, reject) => {
  const times = [];
  const socket = window.socket;
  const take = (name) => {
    if (name !== "run_javascript") return;
    times.push(performance.now());
    if (times.length <= wanted) return;
    socket.offAny(take);
    resolve((times.at(-1) - times[0]) / 1000 / wanted);
  };
  socket.onAny(take);
  setTimeout(() => reject(new Error("no updates")), 60000);
})
"""
