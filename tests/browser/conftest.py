"""A real browser, and a real cluster to look at. Without a Chromium these tests fail: scripts/browser sees to one."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, expect, sync_playwright

from kvmesh.bench.browser import CHROMIUM_FLAGS, find_chromium
from kvmesh.bench.cluster import Controller
from kvmesh.bench.stand_in import StandInEngine, make_key, stand_in_format
from kvmesh.bench.stand_in_pool import OperatedStandIn
from support.stand_ins import CHUNK_BYTES, make_config, running_controller

WIDE, NARROW = 1280, 420
PATIENCE_MS = 20_000
"""On a busy machine."""
NETWORK_CHANGED = "ERR_NETWORK_CHANGED"
"""Chromium says so when this machine gets a network interface, as some benchmarks give it one; the page reconnects."""
expect.set_options(timeout=PATIENCE_MS)
OPERATED = "odd-one"
"""Does what operators want."""
MODEL = "Llama-3.1-8B-Instruct"


@dataclasses.dataclass
class Cluster:
    """Two that share, one of the same model that cannot, and requests that found what the other had."""

    controller: Controller
    engines: list[StandInEngine]


@pytest.fixture(scope="session")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    with contextlib.ExitStack() as stack:
        controller = stack.enter_context(running_controller(tmp_path_factory.mktemp("browser")))
        engines = []
        for name, dtype in (("prod-1", "bytes"), ("prod-2", "bytes"), ("odd-one", "fp8")):
            kv_format = stand_in_format(CHUNK_BYTES, model_name=MODEL, kv_dtype=dtype)
            config = make_config(controller, name)
            engine = StandInEngine(config, slots=64, chunk_bytes=CHUNK_BYTES, kv_format=kv_format)
            stack.callback(engine.close)
            if name == OPERATED:
                operated = OperatedStandIn(engine)
            engine.start()
            engines.append(engine)
        stack.enter_context(operated.running())
        keys = [make_key(f"prompt-{number}") for number in range(8)]
        engines[0].put(keys)
        assert engines[1].wait_visible(keys)
        assert engines[1].get([*keys, make_key("never")], request_id="cmpl-abc-0-1f2e3d4c").fetched == len(keys)
        yield Cluster(controller, engines)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    chromium = find_chromium()
    assert chromium is not None, "no Chromium here: scripts/browser sees to one"
    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=chromium, args=list(CHROMIUM_FLAGS))
        yield made
        made.close()


@contextlib.contextmanager
def reading(browser: Browser, cluster: Cluster, *, width: int = WIDE, scheme: str = "light") -> Iterator[Page]:
    """A page of a reader of their own, who sees no error in the console and loads nothing from elsewhere."""
    complaints: list[str] = []
    context: BrowserContext = browser.new_context(
        base_url=cluster.controller.url,
        viewport={"width": width, "height": 900},
        color_scheme=scheme,  # type: ignore[arg-type]
        reduced_motion="reduce",
    )
    context.set_default_timeout(PATIENCE_MS)
    try:
        page = context.new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda line: _note_error(line, complaints))
        page.on("request", lambda asked: _note_foreign(asked.url, cluster, complaints))
        yield page
    finally:
        context.close()
    assert not complaints


def _note_error(line: ConsoleMessage, complaints: list[str]) -> None:
    if line.type == "error" and NETWORK_CHANGED not in line.text:
        complaints.append(line.text)


def _note_foreign(url: str, cluster: Cluster, complaints: list[str]) -> None:
    if not url.startswith((cluster.controller.url, "data:", "blob:")):
        complaints.append(f"asks somebody else: {url}")
