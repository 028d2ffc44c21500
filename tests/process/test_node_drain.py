"""A node that leaves its cluster by itself, without a controller: real nodes, engines whose pools obey."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from pydantic import SecretStr
from typer.testing import CliRunner

from kvmesh.bench.cluster import free_ports
from kvmesh.bench.stand_in import StandInEngine, make_key
from kvmesh.bench.stand_in_pool import OperatedStandIn
from kvmesh.cli.app import app
from kvmesh.config import KVMeshConfig
from process.controller_nodes import wait_for
from support.keys import KEY_TEXT
from support.redis_servers import needs_redis, running_redis
from support.stand_ins import CHUNK_BYTES, make_config

pytestmark = [pytest.mark.process, pytest.mark.timeout(120)]

KEYS = [make_key(f"drain-{number}") for number in range(12)]
NAMES = ("leaver", "left", "right")
QUICK = {"heartbeat_interval_s": 0.3, "admin_port": 0, "cluster_key": SecretStr(KEY_TEXT)}


@contextlib.contextmanager
def configs(directory: str, folder: Path) -> Iterator[list[KVMeshConfig]]:
    """Of three nodes that know each other."""
    ports = free_ports(len(NAMES))
    if directory == "static":
        peers = tuple(f"tcp://localhost:{port}" for port in ports)
        yield [
            make_config(None, name, peer_port=port, static_peers=peers, **QUICK)
            for name, port in zip(NAMES, ports, strict=True)
        ]
        return
    with running_redis(folder) as server:
        place = {"lookup_url": server.url, "index_mode": directory.removeprefix("redis-")}
        yield [
            make_config(None, name, peer_port=port, **place, **QUICK) for name, port in zip(NAMES, ports, strict=True)
        ]


@pytest.fixture(params=["static", pytest.param("redis-query", marks=needs_redis)])
def pools(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[list[OperatedStandIn]]:
    """Three engines that have each other as peers."""
    with contextlib.ExitStack() as stack:
        made = []
        for config in stack.enter_context(configs(request.param, tmp_path)):
            engine = StandInEngine(config, slots=64, chunk_bytes=CHUNK_BYTES)
            stack.callback(engine.close)
            pool = OperatedStandIn(engine)
            engine.start()
            made.append(stack.enter_context(pool.running()))
        for pool in made:
            wait_for(lambda pool=pool: peers_of(pool.engine) == len(NAMES) - 1)
        yield made


def admin_of(engine: StandInEngine) -> str:
    assert engine.node.ready is not None
    return f"http://127.0.0.1:{engine.node.ready.admin_port}"


def peers_of(engine: StandInEngine) -> int:
    """-1 while it does not listen yet."""
    try:
        return int(httpx.get(f"{admin_of(engine)}/healthz", trust_env=False, timeout=10).json()["peers"])
    except httpx.ConnectError:
        return -1


def held(pool: OperatedStandIn) -> set[bytes]:
    with pool.lock:
        return set(pool.engine.keys())


def test_others_take_over_and_it_leaves(pools: list[OperatedStandIn]) -> None:
    """What only the leaver holds is at the others afterwards, by the command that a pod's preStop hook runs; then it is
    no member any more. The last one has nobody to hand over to, and stays.
    """
    leaver, left, right = pools
    for pool, keys in ((leaver, KEYS), (left, KEYS[:2])):
        with pool.lock:
            pool.engine.put(keys)
    wait_for(lambda: int(published(leaver.engine)) == len(KEYS) and int(published(left.engine)) == 2)
    assert leaver.engine.wait_visible(KEYS[:2], 20)
    run = CliRunner()
    environment = {"KVMESH_CLUSTER_KEY": KEY_TEXT}
    command = ["ops", "drain", "leaver", "--yes", "--json", "--within", "30s", "--node"]
    answer = run.invoke(app, [*command, admin_of(leaver.engine)], env=environment)
    assert answer.exit_code == 0, answer.output
    drained = json.loads(answer.stdout)
    assert (drained["handed_over"], drained["lost"], drained["sharing"]) == (len(KEYS) - 2, 0, "left")
    assert held(left) | held(right) >= set(KEYS), "nothing is lost"
    assert not (held(left) & held(right)), "and nothing is fetched twice"
    for pool in (left, right):
        wait_for(lambda pool=pool: peers_of(pool.engine) == 1)

    wrong = run.invoke(app, [*command, admin_of(left.engine)], env=environment)
    assert wrong.exit_code != 0, "it is another node's port"
    url = f"{admin_of(left.engine)}/api/v1/drain"
    assert httpx.post(url, json={}, trust_env=False, timeout=30).status_code == httpx.codes.UNAUTHORIZED
    command[2] = "right"
    assert run.invoke(app, [*command, admin_of(right.engine)], env=environment).exit_code == 0
    wait_for(lambda: peers_of(left.engine) == 0)
    assert held(left) >= set(KEYS)
    command[2] = "left"
    alone = run.invoke(app, [*command, admin_of(left.engine)], env=environment)
    assert alone.exit_code != 0
    assert "nobody to hand over to" in str(alone.exception) + alone.output
    assert int(published(left.engine)) == len(held(left)), "it goes on as before"


def published(engine: StandInEngine) -> float:
    text = httpx.get(f"{admin_of(engine)}/metrics", trust_env=False, timeout=10).text
    [line] = [line for line in text.splitlines() if line.startswith("kvmesh_node_published_chunks ")]
    return float(line.split()[1])


def test_without_a_key_only_this_machine_may_ask() -> None:
    """Neither a page in a browser nor a name that somebody else's DNS has pointed here."""
    config = make_config(None, "open", admin_port=0, cluster_key=None)
    engine = StandInEngine(config, slots=4, chunk_bytes=CHUNK_BYTES)
    with contextlib.closing(engine):
        engine.start()
        wait_for(lambda: peers_of(engine) == 0)
        url = f"{admin_of(engine)}/api/v1/drain"
        for headers in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}):
            refused = httpx.post(url, json={"hand_over": 0}, headers=headers, trust_env=False, timeout=30)
            assert refused.status_code == httpx.codes.FORBIDDEN
        assert (
            httpx.post(url, json={"hand_over": "x"}, trust_env=False, timeout=30).status_code
            == httpx.codes.UNPROCESSABLE_ENTITY
        )
        drained = httpx.post(url, json={"hand_over": 0, "leave": False}, trust_env=False, timeout=30)
        assert drained.json()["sharing"] == "drained"
