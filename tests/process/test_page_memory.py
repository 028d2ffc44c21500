"""Pages that are opened and left cost a controller no memory that grows with their number."""

from __future__ import annotations

import psutil
import pytest

from process.controller_nodes import running_controller

pytestmark = pytest.mark.process

PAGES = ("/", "/instances", "/traffic", "/compatibility", "/explain", "/operations", "/instance?id=nobody")
OPENED = 500
WARM_UP = 150
LIMIT_BYTES = 15_000_000
"""For all that come after the first ones: each would take 260 kB if it were kept."""


@pytest.mark.timeout(120)
def test_opened_and_left_pages_are_forgotten():
    """500 pages by a reader without a browser, as a crawler opens them; and paths that do not exist are small 404s."""
    with running_controller() as controller:
        process = psutil.Process(controller.process.pid)
        for number in range(WARM_UP):
            assert controller.http.get(PAGES[number % len(PAGES)]).status_code == 200
        before = process.memory_full_info().uss
        for number in range(WARM_UP, OPENED):
            assert controller.http.get(PAGES[number % len(PAGES)]).status_code == 200
        for number in range(100):
            answer = controller.http.get(f"/{number}.php")
            assert answer.status_code == 404
            assert len(answer.content) < 3000
        assert process.memory_full_info().uss - before < LIMIT_BYTES
        kept = next(
            line
            for line in controller.http.get("/metrics").text.splitlines()
            if line.startswith("kvmesh_controller_pages_kept ")
        )
        assert float(kept.split()[-1]) < 50
