"""The router between real clients and real HTTP servers: streaming, failures, limits."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from support.routers import FakeEngine, RouterProcess, ask, engine_of, events, until

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("router")


@pytest.fixture(scope="module")
def fleet(folder: Path) -> Iterator[list[FakeEngine]]:
    """Two engines that outlive the tests."""
    with contextlib.ExitStack() as stack:
        engines = [FakeEngine(folder, "one", "model", "left"), FakeEngine(folder, "two", "model", "right")]
        for engine in engines:
            stack.callback(engine.stop)
            engine.start()
        for engine in engines:
            until(lambda engine=engine: httpx_ok(f"{engine.url}/health"), engine)
        yield engines


@pytest.fixture(scope="module")
def router(folder: Path, fleet: list[FakeEngine]) -> Iterator[RouterProcess]:
    process = RouterProcess(
        folder,
        backends=[f"{engine.name}={engine.url}" for engine in fleet],
        max_body_bytes=2_000_000,
        body_timeout_s=0.5,
        max_requests=4,
    )
    try:
        yield process.start_and_wait(healthy=2)
    finally:
        process.stop()


@pytest.fixture
def spawn(tmp_path: Path) -> Iterator[Callable[[str], FakeEngine]]:
    """Engines that a test may kill."""
    with contextlib.ExitStack() as stack:

        def make(name: str, port: int = 0) -> FakeEngine:
            engine = FakeEngine(tmp_path, name, port=port)
            stack.callback(engine.stop)
            return engine.start_and_wait()

        yield make


@pytest.fixture
def route(tmp_path: Path) -> Iterator[Callable[..., RouterProcess]]:
    """Routers of one test."""
    with contextlib.ExitStack() as stack:

        def make(*engines: FakeEngine, **settings: object) -> RouterProcess:
            backends = [f"{engine.name}={engine.url}" for engine in engines]
            process = RouterProcess(tmp_path, backends=backends, **settings)
            stack.callback(process.stop)
            return process.start_and_wait(healthy=len(engines))

        yield make


def httpx_ok(url: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(url, timeout=2).status_code == 200
    return False


def test_turns_paths_headers_and_ids(router: RouterProcess) -> None:
    """Any path goes through with its query, key and body; hop-by-hop headers do not; ids are kept or made."""
    answers = [
        httpx.request(
            method,
            f"{router.url}/v1/embeddings/x%20y?a=1&b=%2F",
            content=b"abc" if method == "POST" else None,
            headers={
                "Authorization": "Bearer secret",
                "X-Request-Id": "my-id",
                "Connection": "x-private",
                "X-Private": "1",
                "X-Forwarded-For": "10.0.0.9",
            },
        )
        for method in ("POST", "PUT", "DELETE", "POST")
    ]
    assert [engine_of(answer) for answer in answers] == ["one", "two", "one", "two"]
    told = answers[0].json()
    assert told["target"] == "/v1/embeddings/x%20y?a=1&b=%2F"
    assert told["length"] == 3
    assert answers[1].json()["method"] == "PUT"
    headers = {name.lower(): value for name, value in told["headers"].items()}
    assert headers["authorization"] == "Bearer secret"
    assert headers["x-request-id"] == answers[0].headers["x-request-id"] == "my-id"
    assert "x-private" not in headers
    assert headers["x-forwarded-for"] == "10.0.0.9, 127.0.0.1"
    assert headers["host"] != f"127.0.0.1:{router.port}"
    made = ask(router.url, plain=True).headers["x-request-id"]
    assert re.fullmatch("[0-9a-f]{32}", made)
    assert httpx.head(f"{router.url}/anything").status_code == 200


def test_a_stream_is_not_buffered(router: RouterProcess, fleet: list[FakeEngine]) -> None:
    """The first event is here while the engine holds the second one back."""
    for engine in fleet:
        engine.control("hold")
    request = {"model": "model", "prompt": "x", "stream": True, "hold_after": 1}
    with httpx.stream("POST", f"{router.url}/v1/completions", json=request, timeout=20) as answer:
        assert answer.headers["content-type"] == "text/event-stream"
        stream = events(answer)
        assert next(stream)["number"] == 0
        for engine in fleet:
            engine.control("release")
        assert [event["number"] for event in stream] == [1, 2]


def test_a_client_that_goes_away_ends_its_request(router: RouterProcess, fleet: list[FakeEngine]) -> None:
    """The engine notices, and the request counts no longer."""
    for engine in fleet:
        engine.control("hold")
    request = {"model": "left", "prompt": "x", "hold_after": 1}
    with httpx.stream("POST", f"{router.url}/v1/completions", json=request, timeout=20) as answer:
        assert engine_of(answer) == "one"
        assert next(events(answer))["number"] == 0
    assert fleet[0].wait("disconnects")["disconnects"] == 1
    until(lambda: router.metric("inflight_requests") == 0, router)
    assert router.metric("client_disconnects_total") >= 1
    for engine in fleet:
        engine.control("release")


def test_requests_go_where_their_model_is(router: RouterProcess, fleet: list[FakeEngine]) -> None:
    """`/v1/models` lists all; a request for one goes to who serves it; for an unknown one to anybody."""
    listed = httpx.get(f"{router.url}/v1/models").json()
    assert [card["id"] for card in listed["data"]] == ["model", "left", "right"]
    assert {engine_of(ask(router.url, model="right", plain=True)) for _ in range(4)} == {"two"}
    assert ask(router.url, model="nobody's", plain=True).status_code == 200
    for engine in fleet:
        engine.control("key/secret")
    try:
        refused = httpx.get(f"{router.url}/v1/models")
        assert (refused.status_code, refused.json()["error"]["message"]) == (401, "wrong key")
        allowed = httpx.get(f"{router.url}/v1/models", headers={"Authorization": "Bearer secret"})
        assert len(allowed.json()["data"]) == 3
    finally:
        for engine in fleet:
            engine.control("key/")


def test_bodies_are_limited(router: RouterProcess) -> None:
    """Too long, with and without a length that says so, and too slow: clear errors in OpenAI's form."""
    for content in (b"x" * 3_000_000, iter([b"x" * 1_500_000] * 2)):
        with contextlib.suppress(httpx.WriteError):  # the router may close before everything is sent
            answer = httpx.post(f"{router.url}/v1/completions", content=content)
            assert answer.status_code == 413
            assert answer.json()["error"]["code"] == "body_too_long"
    with socket.create_connection(("127.0.0.1", router.port), timeout=10) as slow:
        slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nabc")
        answer = slow.recv(65536)
        assert b" 408 " in answer
        assert b"body_timeout" in answer
    until(lambda: router.metric("buffered_bytes") == 0, router)


def test_requests_are_limited(router: RouterProcess, fleet: list[FakeEngine]) -> None:
    """Beyond max_requests an answer says so at once, and the others go on."""
    for engine in fleet:
        engine.control("hold")
    held = fleet[0].wait("requests", 0).get("holding", 0)
    results: list[httpx.Response] = []
    threads = [
        threading.Thread(target=lambda: results.append(ask(router.url, model="left", hold_after=0))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    fleet[0].wait("holding", held + 4)
    refused = ask(router.url)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "too_many_requests")
    assert refused.headers["retry-after"] == "1"
    assert httpx.get(f"{router.url}/healthz").json()["inflight_requests"] == 4
    for engine in fleet:
        engine.control("release")
    for thread in threads:
        thread.join()
    assert [result.status_code for result in results] == [200] * 4


def test_malformed_requests_and_upgrades(router: RouterProcess) -> None:
    """What is no HTTP gets 400, what is no plain HTTP gets 501; the router lives."""
    with socket.create_connection(("127.0.0.1", router.port), timeout=10) as broken:
        broken.sendall(b"NONSENSE\r\n\r\n")
        assert b" 400 " in broken.recv(65536)
    upgrade = httpx.get(f"{router.url}/v1/realtime", headers={"Connection": "Upgrade", "Upgrade": "websocket"})
    assert (upgrade.status_code, upgrade.json()["error"]["code"]) == (501, "not_supported")
    ask_broken = httpx.post(f"{router.url}/v1/completions", content=b"{", headers={"Content-Type": "application/json"})
    assert ask_broken.status_code == 200, "the engine decides what it makes of a body"
    assert httpx.get(f"{router.url}/healthz").json()["status"] == "ok"


def test_an_engine_killed_in_the_middle_of_streams(
    spawn: Callable[[str], FakeEngine], route: Callable[..., RouterProcess]
) -> None:
    """Its stream ends with an error event, its plain answer breaks off, others go on; later requests do not notice."""
    victim, other = spawn("victim"), spawn("other")
    router = route(victim, other)
    for engine in (victim, other):
        engine.control("hold")
    body = {"model": "model", "prompt": "x", "hold_after": 1}
    with contextlib.ExitStack() as stack:
        streams = {}
        for _ in range(2):
            answer = stack.enter_context(
                httpx.stream("POST", f"{router.url}/v1/chat/completions", json=body, timeout=20)
            )
            streams[engine_of(answer)] = events(answer)
            next(streams[engine_of(answer)])
        plain = stack.enter_context(
            httpx.stream("POST", f"{router.url}/v1/completions", json={**body, "content_type": "audio/wav"}, timeout=20)
        )
        assert engine_of(plain) == "victim"
        victim.kill_group()
        ended = list(streams["victim"])
        assert len(ended) == 1
        error = ended[0]["error"]
        assert (error["type"], error["code"]) == ("server_error", "backend_failed")
        assert "victim" in error["message"]
        with pytest.raises(httpx.RemoteProtocolError):
            plain.read()
        other.control("release")
        assert [event["number"] for event in streams["other"]] == [1, 2]
    assert {engine_of(ask(router.url)) for _ in range(6)} == {"other"}
    assert router.metric("broken_streams_total") == 2
    again = spawn("victim", victim.port)
    until(lambda: router.healthy() == {"victim", "other"}, router)
    assert {engine_of(ask(router.url)) for _ in range(4)} == {"victim", "other"}
    assert again.is_running()


def test_failures_before_the_first_byte_are_retried_where_that_is_safe(
    spawn: Callable[[str], FakeEngine], route: Callable[..., RouterProcess]
) -> None:
    """An engine that dies before or after the head of its answer, one that is away, one that says 503."""
    engines = [spawn(name) for name in ("first", "second", "third")]
    router = route(*engines, health_interval_s=60.0)
    for number, fault in enumerate(({"die": True}, {"die_after": 0}), start=1):
        answer = ask(router.url, **fault)
        assert answer.status_code == 502
        assert answer.json()["error"]["code"] in {"backend_failed", "backend_unreachable"}
        # Sockets close a moment before a process has ended.
        until(lambda engines=engines: sum(not engine.is_running() for engine in engines) >= 2, router)
        dead = [engine for engine in engines if not engine.is_running()]
        assert len(dead) == 2, "a request of which two engines have died is not given to a third one"
        assert router.metric("retries_total") == number
        assert ask(router.url, plain=True).status_code == 200
        engines = [spawn(engine.name, engine.port) if engine in dead else engine for engine in engines]
        until(lambda: len(router.healthy()) == 3, router)
    engines[0].kill_group()
    assert {engine_of(ask(router.url)) for _ in range(6)} == {"second", "third"}
    engines[1].kill_group()
    refused = ask(router.url, status=503, plain=True)
    assert refused.status_code == 503
    assert refused.json()["engine"] == "third", "the engine's own answer, when nobody else is there"


def test_what_changes_something_is_not_sent_twice(
    spawn: Callable[[str], FakeEngine], route: Callable[..., RouterProcess]
) -> None:
    """An upload whose engine dies is answered with 502; the other engine never sees it."""
    first, second = spawn("first"), spawn("second")
    router = route(first, second)
    answer = ask(router.url, "/v1/files", die=True)
    assert answer.status_code == 502
    # Sockets close a moment before a process has ended.
    until(lambda: first.is_running() != second.is_running(), router)
    survivor = first if first.is_running() else second
    assert survivor.wait("requests", 0).get("requests", 0) == 0
    first.kill_group()
    second.kill_group()
    away = ask(router.url, "/v1/files")
    assert away.status_code in {502, 503}
    until(lambda: router.healthy() == set(), router)
    nobody = ask(router.url)
    assert (nobody.status_code, nobody.json()["error"]["code"]) == (503, "no_backend")
    assert httpx.get(f"{router.url}/readyz").status_code == 503
    assert httpx.get(f"{router.url}/healthz").status_code == 200


def test_sick_slow_and_full_engines(spawn: Callable[[str], FakeEngine], route: Callable[..., RouterProcess]) -> None:
    """A failed health check takes an engine out until one goes well; a late first byte is 504; a full one is passed."""
    first, second = spawn("first"), spawn("second")
    router = route(first, second, first_byte_timeout_s=0.5, max_requests_per_backend=1)
    first.control("sick")
    until(lambda: router.healthy() == {"second"}, router)
    second.control("hold")
    late = ask(router.url, hold_after=0)
    assert (late.status_code, late.json()["error"]["code"]) == (504, "backend_timeout")
    second.wait("disconnects")
    first.control("well")
    until(lambda: router.healthy() == {"first", "second"}, router)
    with contextlib.ExitStack() as stack:
        taken = {}
        for engine in (first, second):
            engine.control("hold")
        for _ in range(2):
            answer = stack.enter_context(
                httpx.stream("POST", f"{router.url}/v1/completions", json={"hold_after": 1}, timeout=20)
            )
            taken[engine_of(answer)] = events(answer)
            next(taken[engine_of(answer)])
        assert set(taken) == {"first", "second"}
        full = ask(router.url)
        assert (full.status_code, full.json()["error"]["code"]) == (503, "no_backend")
        assert "busy" in full.json()["error"]["message"]


def test_it_ends_in_good_order(spawn: Callable[[str], FakeEngine], route: Callable[..., RouterProcess]) -> None:
    """SIGTERM: not ready any more, streams under way end well, then the process ends."""
    engine = spawn("only")
    router = route(engine)
    engine.control("hold")
    with httpx.stream("POST", f"{router.url}/v1/completions", json={"hold_after": 1}, timeout=20) as answer:
        stream = events(answer)
        next(stream)
        router.signal(signal.SIGTERM)
        until(lambda: httpx.get(f"{router.url}/readyz", timeout=5).status_code == 503, router)
        engine.control("release")
        assert [event["number"] for event in stream] == [1, 2]
    assert router.popen is not None
    assert router.popen.wait(timeout=20) == 0


@pytest.mark.parametrize("policy", ["leastload", "session", "prefix"])
def test_policies(policy: str, folder: Path, fleet: list[FakeEngine]) -> None:
    """Each policy serves, and keeps together what it is for."""
    router = RouterProcess(folder, policy=policy, backends=[f"{engine.name}={engine.url}" for engine in fleet])
    try:
        router.start_and_wait(healthy=2)
        beginning = json.dumps(["once upon a time"] * 200)
        took = {
            engine_of(
                httpx.post(
                    f"{router.url}/v1/completions",
                    json={"model": "model", "prompt": beginning + str(number), "plain": True},
                    headers={"X-Session-Id": "s1"},
                )
            )
            for number in range(6)
        }
        if policy != "leastload":
            assert len(took) == 1
            reason = "session" if policy == "session" else "prefix"
            assert router.metric("choices_total", policy=policy, reason=reason) >= 5
    finally:
        router.stop()


def test_a_client_that_stops_reading(spawn: Callable[[str], FakeEngine], route: Callable[..., RouterProcess]) -> None:
    """Its request ends, at the engine too, although the engine has more to say and the connection is open."""
    engine = spawn("only")
    router = route(engine, idle_timeout_s=0.3)
    body = json.dumps({"events": 20_000, "pad": 100_000}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    with socket.create_connection(("127.0.0.1", router.port), timeout=10) as lazy:
        lazy.sendall(head % len(body) + body)
        assert engine.wait("disconnects")["disconnects"] == 1
    assert "client has stopped reading" in router.log()
