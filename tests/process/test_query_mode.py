"""Nodes that ask the directory for each request instead of holding a replica."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvmesh.bench.stand_in import StandInEngine, make_key
from kvmesh.config import KVMeshConfig
from process.controller_nodes import wait_for
from support.redis_servers import needs_redis, running_redis
from support.stand_ins import make_config, running_controller, running_engine

pytestmark = [pytest.mark.process, pytest.mark.timeout(180)]

KEYS = [make_key(f"query-{number}") for number in range(64)]
Make = Callable[..., KVMeshConfig]


DIRECTORIES = ["controller", pytest.param("redis", marks=needs_redis)]


@contextlib.contextmanager
def directory(kind: str, folder: Path, timeout_s: float) -> Iterator[Make]:
    """Configurations for one directory, of either kind."""
    quick = {"heartbeat_interval_s": 0.3, "instance_timeout_s": timeout_s}
    if kind == "redis":
        with running_redis(folder) as redis:
            yield lambda name, **changed: make_config(None, name, lookup_url=redis.url, **(quick | changed))
    else:
        arguments = ("--heartbeat-interval", "0.3", "--instance-timeout", str(timeout_s))
        with running_controller(folder, arguments=arguments) as controller:
            yield lambda name, **changed: make_config(controller, name, **(quick | changed))


@pytest.fixture(params=DIRECTORIES)
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Make]:
    with directory(request.param, tmp_path, 2.0) as made:
        yield made


@pytest.fixture(params=DIRECTORIES)
def patient(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Make]:
    """Nobody counts as dead for falling silent."""
    with directory(request.param, tmp_path, 60.0) as made:
        yield made


def misses_soon(engine: StandInEngine, key: bytes) -> None:
    """Wait until the engine is told that nobody holds the key."""

    def is_missing() -> bool:
        engine.node.ask([key])
        return engine.node.is_known(key) and not engine.node.is_visible(key)

    wait_for(is_missing, 30)


def test_a_node_that_ends_with_its_engine_says_so(patient: Make) -> None:
    """Nobody has to wait until it counts as dead. A few, since it is to do so whatever it is about when it ends."""
    with running_engine(patient("stays", index_mode="query")) as stays:
        for number in range(4):
            with running_engine(patient(f"ends-{number}")) as ends:
                assert stays.wait_peers(1)
                if number % 2:  # the others may not have told all yet
                    assert ends.wait_peers(1)
                    ends.put(KEYS[:4])
                    assert stays.wait_visible(KEYS[:4], 20)
            assert stays.wait_peers(0, 20)


def test_asking_finds_what_a_replica_would(make: Make) -> None:
    """One that asks fetches from one that follows, and the other way round; evictions and deaths are noticed; who
    follows too much begins to ask.
    """
    with (
        running_engine(make("asks", index_mode="query")) as asks,
        running_engine(make("follows", index_mode="replica")) as follows,
    ):
        assert asks.wait_peers(1)
        assert follows.wait_peers(1)
        assert asks.node.state.asks
        assert not follows.node.state.asks
        follows.put(KEYS[:32])
        assert asks.wait_visible(KEYS[:32], 20)
        got = asks.get(KEYS[:40])
        assert (got.fetched, got.wrong, sum(got.misses.values())) == (32, 0, 8)
        assert follows.wait_visible(KEYS[:32]), "who asks publishes as everybody does"
        with running_engine(make("grows", index_mode="auto", replica_max_chunks=16)) as grows:
            wait_for(lambda: grows.node.state.asks and grows.node.state.directory_connected)
            assert grows.get_all(KEYS[:32])
        for engine in (asks, follows):
            engine.forget(KEYS[:4])
        follows.put(KEYS[40:44])
        with running_engine(make("late", index_mode="query")) as late:
            wait_for(lambda: late.node.state.asks and late.node.state.directory_connected)
            assert late.wait_visible(KEYS[4:32], 20)
            misses_soon(late, KEYS[0])
            assert late.wait_visible(KEYS[40:44], 20)
            assert follows.node.pid is not None
            os.kill(follows.node.pid, signal.SIGKILL)
            assert follows.wait_node(restarts=1)
            assert late.get_all(KEYS[40:44]), "the successor's chunks are found"
