"""The web page in a real browser, over a real controller and real nodes."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import Page, expect

from browser.conftest import NARROW, WIDE, reading
from kvmesh.bench.stand_in import make_key

pytestmark = pytest.mark.browser

PAGES = {
    "/": "needs attention",
    "/instances": "Instances",
    "/instance?id=prod-1": "prod-1",
    "/traffic": "Who fetches from whom",
    "/compatibility": "What cannot be shared",
    "/explain": "Why was my request computed",
    "/operations": "Operations",
}


def dark(page: Page) -> bool:
    """Whether the page is dark, by what is painted."""
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    red, green, blue = map(int, re.findall(r"\d+", colour)[:3])
    return red + green + blue < 300


class TestLook:
    @pytest.mark.parametrize(("width", "scheme"), [(WIDE, "light"), (NARROW, "dark")])
    def test_every_page(self, browser, cluster, width, scheme):
        """Each has its heading, fits the width without scrolling sideways, and follows the system's theme."""
        with reading(browser, cluster, width=width, scheme=scheme) as page:
            for path, heading in PAGES.items():
                page.goto(path)
                expect(page.locator("h1")).to_contain_text(heading)
                too_wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
                assert too_wide <= 0, path
                assert dark(page) == (scheme == "dark"), path

    def test_theme_is_switched_and_kept(self, browser, cluster):
        """Auto, light, dark; the choice is there again after loading."""
        with reading(browser, cluster) as page:
            page.goto("/instances")
            switch = page.get_by_role("button", name=re.compile("^Theme: auto"))
            switch.click()
            page.get_by_role("button", name=re.compile("^Theme: light")).click()
            expect(page.get_by_role("button", name=re.compile("^Theme: dark"))).to_be_visible()
            assert dark(page)
            page.reload()
            expect(page.get_by_role("button", name=re.compile("^Theme: dark"))).to_be_visible()
            assert dark(page)

    def test_by_keyboard(self, browser, cluster):
        """From the first tab stop over the pages to a table's heading, which sorts."""
        with reading(browser, cluster) as page:
            page.goto("/instances")
            expect(page.locator("tbody tr")).to_have_count(3)
            page.keyboard.press("Tab")
            expect(page.locator(":focus")).to_have_text("Skip to content")
            heading = page.locator("thead button", has_text="Instance")
            heading.focus()
            page.keyboard.press("Enter")
            expect(page.locator("thead th").first).to_have_attribute("aria-sort", "descending")
            expect(page.locator("tbody tr td:first-child").first).to_have_text("prod-2")


class TestContent:
    def test_overview(self, browser, cluster):
        """What is wrong with its field, what was saved, who fetched from whom, and the hit rates."""
        with reading(browser, cluster) as page:
            page.goto("/")
            expect(page.get_by_role("list", name="Needs attention")).to_contain_text("kv_dtype is")
            expect(page.locator(".km-figure").first).to_contain_text("kB")
            expect(page.locator(".km-graph")).to_contain_text("prod-1")
            expect(page.locator(".km-chart")).to_contain_text("could have been found")
            expect(page.locator(".km-pill")).to_have_text("1 notice")

    def test_corrupt_chunks_are_shown(self, browser, cluster):
        """The fact stands on the instance's page, also when there are none."""
        with reading(browser, cluster) as page:
            page.goto("/instance?id=prod-1")
            expect(page.locator("tr", has_text="Corrupt chunks")).to_contain_text("none reported")

    def test_traffic(self, browser, cluster):
        """A fetch is told with who fetched from whom."""
        with reading(browser, cluster) as page:
            page.goto("/traffic")
            expect(page.locator("tbody tr", has_text="prod-2 ← prod-1").first).to_be_visible()

    def test_explain(self, browser, cluster):
        """From the list of requests to one of them: what came from where, and why not the rest."""
        with reading(browser, cluster) as page:
            page.goto("/explain")
            page.get_by_role("link", name="cmpl-abc-0-1f2e3d4c").click()
            expect(page.locator(".km-summary")).to_contain_text("8 fetched from peers")
            expect(page.locator(".km-cause").first).to_contain_text("not_published")
            page.get_by_label("Request id").fill("nobody-knows-it")
            page.get_by_label("Request id").press("Enter")
            expect(page.locator("#km-main")).to_contain_text("No instance remembers a request of this name")


class TestLife:
    def test_news_come_without_reloading(self, browser, cluster):
        """A fetch shows up in the open page; the page's other parts are the very same elements as before."""
        publisher, fetcher = cluster.engines[:2]
        with reading(browser, cluster) as page:
            page.goto("/traffic")
            row = page.locator("tr", has_text="prod-2 ← prod-1").first
            expect(row).to_be_visible()
            before = page.locator("td[data-label=Fetches]").first.inner_text()
            page.evaluate("document.querySelector('tbody tr').kept = true")
            keys = [make_key(f"live-{number}") for number in range(4)]
            publisher.put(keys)
            assert fetcher.wait_visible(keys)
            assert fetcher.get(keys).fetched == len(keys)
            expect(page.locator("td[data-label=Fetches]").first).not_to_have_text(before)
            assert page.evaluate("document.querySelector('tbody tr').kept") is True

    def test_an_operation_is_confirmed_and_carried_out(self, browser, cluster):
        """The form, the question, the answer, and how it went. Nothing is done without the answer."""
        with reading(browser, cluster) as page:
            page.goto("/operations")
            page.get_by_label("What", exact=True).click()
            page.get_by_role("option", name="Clear").click()
            page.get_by_role("combobox", name="Instance").click()
            page.get_by_role("option", name="odd-one").click()
            page.get_by_role("button", name="Review").click()
            dialog = page.get_by_role("alertdialog")
            expect(dialog).to_contain_text("Clear everything on odd-one")
            dialog.get_by_role("button", name="Keep as it is").click()
            expect(dialog).not_to_be_visible()
            expect(page.locator("#km-main")).to_contain_text("Nothing has been asked for")
            page.get_by_role("button", name="Review").click()
            page.get_by_role("alertdialog").get_by_role("button", name="Clear").click()
            row = page.locator("tbody tr", has_text="clear odd-one")
            expect(row.locator("td[data-label=State]")).to_have_text("done")
