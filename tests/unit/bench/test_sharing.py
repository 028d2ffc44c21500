"""`kvmesh check-sharing` tells sharing from not sharing by the second engine's own counters."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
from typer.testing import CliRunner

from kvmesh.bench import sharing
from kvmesh.cli.app import app
from kvmesh.errors import StartupError


class Engine(http.server.ThreadingHTTPServer):
    """Answers as vLLM with KVMeshConnector does; pulls `pulls` chunks for each prompt."""

    def __init__(self, *, pulls: int = 0, status: int = 200) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.pulls, self.status = pulls, status
        self.fetched = self.missed = 0
        self.prompts: list[str] = []
        self.keys: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Engine

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        engine = self.server
        engine.prompts.append(body["prompt"])
        engine.keys.append(self.headers["Authorization"])
        engine.fetched += engine.pulls
        engine.missed += not engine.pulls
        self._answer(json.dumps({"usage": {"prompt_tokens": body["truncate_prompt_tokens"]}}))

    def do_GET(self) -> None:
        engine = self.server
        self._answer(
            "# HELP kvmesh_fetched_chunks_total Chunks.\n"
            f'kvmesh_fetched_chunks_total{{engine="0"}} {engine.fetched}.0\n'
            f'kvmesh_lookup_chunks_total{{engine="0",reason="",result="hit"}} {engine.fetched}.0\n'
            f'kvmesh_lookup_chunks_total{{engine="0",reason="no_peers",result="miss"}} {engine.missed}.0\n'
        )

    def _answer(self, text: str) -> None:
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())


@contextmanager
def running(*engines: Engine) -> Iterator[list[str]]:
    with ExitStack() as stack:
        for engine in engines:
            stack.callback(engine.server_close)
            stack.callback(engine.shutdown)
            threading.Thread(target=engine.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield [engine.url for engine in engines]


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "RETRY_S", 0.01)


def check(urls: list[str], *, timeout_s: float = 5.0) -> sharing.SharingResult:
    return sharing.check_sharing(urls, model="m", prompt_tokens=64, timeout_s=timeout_s, api_key="key")


def test_a_hit_is_what_the_second_engine_pulled() -> None:
    first, second = Engine(), Engine(pulls=3)
    with running(first, second) as urls:
        result = check(urls)
    assert (result.pulled_chunks, result.prompt_tokens) == (3, 64)
    assert first.prompts == second.prompts
    assert first.keys == ["Bearer key"]


def test_every_try_has_a_prompt_of_its_own() -> None:
    """Otherwise the second try would find in the second engine's own pool what the first has left there."""
    first, second = Engine(), Engine()
    with running(first, second) as urls:
        result = check(urls, timeout_s=1.5)
    assert result.pulled_chunks == 0
    assert result.misses == {"no_peers": 1}
    assert len(set(first.prompts)) == len(first.prompts) > 1


def test_one_engine_is_not_enough() -> None:
    with pytest.raises(StartupError, match="at least two engines"):
        check(["http://127.0.0.1:1"])


def test_an_engine_that_does_not_answer_is_named() -> None:
    with running(Engine(status=503), Engine()) as urls, pytest.raises(StartupError, match="503"):
        check(urls)


def test_a_name_stands_for_all_its_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a headless service does; each address once."""
    found = [(None, None, None, "", (address, 8000)) for address in ("10.0.0.1", "10.0.0.2", "10.0.0.1", "fd00::1")]
    monkeypatch.setattr(sharing.socket, "getaddrinfo", lambda *_, **__: found)
    wanted = ["http://10.0.0.1:8000", "http://10.0.0.2:8000", "http://[fd00::1]:8000"]
    assert sharing.engines_of(["http://engines:8000"]) == wanted


@pytest.mark.parametrize("service", ["engines:8000", "redis://engines", "http://"])
def test_what_is_no_url_is_refused(service: str) -> None:
    with pytest.raises(StartupError, match="a URL such as"):
        sharing.engines_of([service])


def test_the_command_says_it_in_words_and_by_its_exit_status() -> None:
    runner = CliRunner()
    with running(Engine(), Engine(pulls=2)) as urls:
        services = [part for url in urls for part in ("--service", url)]
        good = runner.invoke(app, ["check-sharing", "--model", "m", *services])
        as_json = runner.invoke(app, ["check-sharing", "--model", "m", "--json", *services])
    with running(Engine(), Engine()) as urls:
        services = [part for url in urls for part in ("--service", url)]
        bad = runner.invoke(app, ["check-sharing", "--model", "m", "--timeout", "1", *services])
    assert (good.exit_code, bad.exit_code) == (0, 1)
    assert "shared: the second one pulled 2 chunks" in good.output
    assert "no_peers (1)" in bad.output
    assert json.loads(as_json.output)["shared"] is True
