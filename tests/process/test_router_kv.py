"""Policy `kv` with a real controller and real nodes, whose engines are stand-ins: what is held where decides."""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path

import pytest

from kvmesh.bench.stand_in import stand_in_format
from kvmesh.core.block_hashes import HashRule, chunk_keys
from support.routers import FakeEngine, RouterProcess, ask, engine_of, until
from support.stand_ins import CHUNK_BYTES, make_config, running_controller, running_engine

pytestmark = pytest.mark.process

RULE = HashRule(block_tokens=16, chunk_tokens=64)


def test_requests_follow_the_chunks(tmp_path: Path) -> None:
    """Token ids and text find their holder; a controller that hangs or is gone costs nothing but the knowledge."""
    kv_format = stand_in_format(CHUNK_BYTES, chunk_tokens=RULE.chunk_tokens)
    names = ("one", "two")
    with contextlib.ExitStack() as stack:
        controller = stack.enter_context(running_controller(tmp_path))
        engines = [FakeEngine(tmp_path, name) for name in names]
        nodes = []
        for name, engine in zip(names, engines, strict=True):
            config = make_config(controller, name, heartbeat_interval_s=0.2)
            nodes.append(stack.enter_context(running_engine(config, kv_format=kv_format)))
            stack.callback(engine.stop)
            engine.start_and_wait()
        tokens = [number % 1000 for number in range(640)]
        text = " ".join(f"w{number % 90}" for number in range(640))  # a word is a token, as the fake engine counts
        text_tokens = [int.from_bytes(word.encode()[:3], "big") for word in text.split()]
        nodes[0].put(chunk_keys(text_tokens, RULE))
        nodes[1].put(chunk_keys(tokens, RULE))
        router = RouterProcess(
            tmp_path,
            policy="kv",
            backends=[f"{engine.name}={engine.url}" for engine in engines],
            controller_url=controller.url,
            kv_timeout_s=5.0,
            kv_fetch_cost=1.0,
        )
        stack.callback(router.stop)
        router.start_and_wait(healthy=2)
        until(lambda: router.metric("directory_connected") == 1, router)
        until(lambda: sum(int(str(one["chunks"])) for one in controller.instances()) == 20, controller)

        assert {engine_of(ask(router.url, prompt=[*tokens, number], plain=True)) for number in range(3)} == {"two"}
        assert {engine_of(ask(router.url, prompt=f"{text} more", plain=True)) for _ in range(3)} == {"one"}
        assert router.metric("choices_total", reason="held") == 6
        counts = [engine.wait("requests", 0).get("tokenize", 0) for engine in engines]
        assert sum(counts) == 1, "a prompt that was seen is not tokenized again"
        ask(router.url, prompt="short", plain=True)
        ask(router.url, prompt=tokens, cache_salt="another tenant", plain=True)
        assert router.metric("choices_total", reason="short") == 1
        assert router.metric("choices_total", reason="nothing_held") == 1

        controller.signal(signal.SIGSTOP)
        until(lambda: router.metric("directory_connected") == 0, router)
        assert ask(router.url, prompt=tokens, plain=True).status_code == 200
        assert router.metric("choices_total", reason="no_directory") == 1
        controller.signal(signal.SIGCONT)
        until(lambda: router.metric("directory_connected") == 1, router)
