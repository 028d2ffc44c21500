"""Operations over HTTP, on a real controller and real nodes; the engines are stand-ins whose pools obey."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from kvmesh.bench.cluster import Controller
from kvmesh.bench.stand_in import StandInEngine, make_key
from kvmesh.bench.stand_in_pool import OperatedStandIn
from kvmesh.wire.auth import ClusterKey
from process.controller_nodes import wait_for
from support.keys import environment_key
from support.redis_servers import needs_redis, running_redis
from support.stand_ins import CHUNK_BYTES, make_config, running_controller

pytestmark = [pytest.mark.process, pytest.mark.timeout(120)]

KEYS = [make_key(f"operation-{index}") for index in range(12)]
HEX = [key.hex() for key in KEYS]
CHUNK_TOKENS = 256
PATIENCE_S = 20.0
"""Nobody is given up for having had no processor for some seconds."""


class Cluster:
    """One controller and some instances."""

    def __init__(self, controller: Controller, stack: contextlib.ExitStack, redis_url: str = "") -> None:
        """With a Redis, that is the directory, and the controller only shows it."""
        self.controller = controller
        self._redis_url = redis_url
        self._stack = stack
        self.pools: dict[str, OperatedStandIn] = {}
        key = environment_key()
        token = None if key is None else ClusterKey(key.get_secret_value()).http_token()
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self.http = stack.enter_context(
            httpx.Client(base_url=controller.url + "/api/v1", headers=headers, timeout=30, trust_env=False)
        )

    def add(self, name: str, slots: int = 64) -> OperatedStandIn:
        directory = {"lookup_url": self._redis_url} if self._redis_url else {}
        config = make_config(
            None if directory else self.controller,
            name,
            heartbeat_interval_s=0.2,
            instance_timeout_s=PATIENCE_S,
            **directory,
        )
        engine = StandInEngine(config, slots=slots, chunk_bytes=CHUNK_BYTES)
        self._stack.callback(engine.close)
        pool = OperatedStandIn(engine)
        engine.start()
        self.pools[name] = self._stack.enter_context(pool.running())
        wait_for(lambda: self.instance(name))
        return pool

    def put(self, name: str, keys: list[bytes]) -> None:
        """Publish, and wait until the directory knows, and the others do."""
        with self.pools[name].lock:
            self.pools[name].engine.put(keys)
        self.wait_held(name, keys)
        others = [pool.engine.node for other, pool in self.pools.items() if other != name]
        wait_for(lambda: all(node.is_visible(key) for node in others for key in keys))

    def wait_held(self, name: str, keys: list[bytes]) -> None:
        """Wait until the directory knows that this one holds them."""
        wait_for(lambda: all(name in self.holders(key) for key in keys))

    def held(self, name: str) -> set[bytes]:
        with self.pools[name].lock:
            return set(self.pools[name].engine.keys())

    def instance(self, name: str) -> dict | None:
        answer = self.http.get(f"/instances/{name}")
        return answer.json() if answer.status_code == 200 else None

    def holders(self, key: bytes) -> list[str]:
        formats = self.http.post("/lookup", json={"keys": [key.hex()]}).json()["formats"]
        return [name for found in formats for name in found["chunks"][0]["holders"]]

    def operate(self, **body: object) -> SimpleNamespace:
        """Start an operation and wait for its end."""
        answer = self.http.post("/operations", json=body)
        assert answer.status_code == 202, answer.text
        started = answer.json()
        assert answer.headers["location"] == started["url"]
        ended = self.http.get(f"/operations/{started['id']}", params={"wait_s": 20}).json()
        assert ended["finished_age_s"] is not None, ended
        return SimpleNamespace(**ended)


@pytest.fixture(scope="module")
def controller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Controller]:
    arguments = ["--heartbeat-interval", "0.2", "--instance-timeout", str(PATIENCE_S)]
    with running_controller(tmp_path_factory.mktemp("operations"), arguments=arguments) as running:
        yield running


@contextlib.contextmanager
def empty_cluster(controller: Controller, redis_url: str = "") -> Iterator[Cluster]:
    """No instances at first; those that the test adds leave at its end."""
    with contextlib.ExitStack() as stack:
        yield Cluster(controller, stack, redis_url)
    wait_for(lambda: not controller.instances(), 2 * PATIENCE_S)


@pytest.fixture
def controlled(controller: Controller) -> Iterator[Cluster]:
    with empty_cluster(controller) as made:
        yield made


@pytest.fixture
def impatient(tmp_path: Path) -> Iterator[Cluster]:
    """Whose controller soon gives up an instance that has fallen silent."""
    arguments = ["--heartbeat-interval", "0.2", "--instance-timeout", "2"]
    with running_controller(tmp_path, arguments=arguments) as controller, empty_cluster(controller) as made:
        yield made


@pytest.fixture
def redis_cluster(tmp_path: Path) -> Iterator[Cluster]:
    """Asked and operated over the peer ports: the controller has no other connection to its instances."""
    with running_redis(tmp_path / "redis") as redis:
        arguments = ["--heartbeat-interval", "0.2", "--instance-timeout", str(PATIENCE_S), "--lookup-url", redis.url]
        with (
            running_controller(tmp_path, arguments=arguments) as controller,
            empty_cluster(controller, redis.url) as made,
        ):
            yield made


@pytest.fixture(params=["controller", pytest.param("redis", marks=needs_redis)])
def cluster(request: pytest.FixtureRequest) -> Cluster:
    """With either directory."""
    made: Cluster = request.getfixturevalue("controlled" if request.param == "controller" else "redis_cluster")
    return made


def test_the_life_of_a_cluster(cluster: Cluster) -> None:
    """Warm a newcomer, pin, move, clear and drain: what each says is what the pools then hold."""
    cluster.add("a"), cluster.add("b")
    cluster.put("a", KEYS[:8])

    warmed = cluster.operate(kind="warm", instance="b", hottest=4)
    assert (warmed.state, warmed.chunks_done, warmed.bytes_done) == ("done", 4, 4 * CHUNK_BYTES)
    assert warmed.instances[0]["outcomes"] == {"fetched": 4}
    assert cluster.held("b") == set(KEYS[4:8])
    assert warmed.summary == "warm b: 4 of 4 chunks"
    again = cluster.operate(kind="warm", instance="b", keys=[*HEX[4:6], HEX[11]])
    assert (again.state, again.instances[0]["outcomes"]) == ("partly", {"present": 2, "not_published": 1})

    cluster.wait_held("b", KEYS[4:6])
    pinned = cluster.operate(kind="pin", keys=HEX[4:6], seconds=60)
    assert {part["instance_id"]: part["state"] for part in pinned.instances} == {"a": "done", "b": "done"}
    wait_for(lambda: cluster.instance("b")["pinned_chunks"] == 2)
    with cluster.pools["b"].lock:
        cluster.pools["b"].engine.put([make_key(f"pressure-{index}") for index in range(64)])
    assert cluster.held("b") >= set(KEYS[4:6])
    assert cluster.operate(kind="unpin", instance="b").instances[0]["outcomes"] == {"unpinned": 2}
    assert cluster.operate(kind="pin", instance="b", keys=HEX[4:5], seconds=4).state == "done"
    wait_for(lambda: cluster.instance("b")["pinned_chunks"] == 1)
    wait_for(lambda: cluster.instance("b")["pinned_chunks"] == 0)

    cluster.add("c")
    moved = cluster.operate(**{"kind": "move", "from": "a", "to": "c", "keys": HEX[:3]})
    assert [(part["action"], part["state"]) for part in moved.instances] == [("warm", "done"), ("clear", "done")]
    assert (cluster.held("a"), cluster.held("c")) == (set(KEYS[3:8]), set(KEYS[:3]))

    drained = cluster.operate(kind="drain", instance="a")
    assert drained.state == "done", drained
    assert cluster.instance("a") is None
    gone = cluster.http.get("/instances").json()["departed"][0]
    assert (gone["instance_id"], gone["reason"]) == ("a", "left")
    assert set(KEYS[:8]) <= cluster.held("b") | cluster.held("c"), "nothing is lost"
    assert all(set(cluster.holders(key)) & {"b", "c"} for key in KEYS[:8])
    with cluster.pools["a"].lock:
        assert cluster.pools["a"].engine.get(KEYS[:3]).fetched == 0, "it does not fetch any more"

    cleared = cluster.operate(kind="clear")
    assert cleared.state == "done"
    assert not cluster.held("b") | cluster.held("c")
    wait_for(lambda: not any(cluster.holders(key) for key in KEYS))
    listed = cluster.http.get("/operations", params={"state": "done"}).json()["operations"]
    assert [found["kind"] for found in listed[:7]] == ["clear", "drain", "move", "pin", "unpin", "pin", "warm"]


def test_drained_and_back(cluster: Cluster) -> None:
    """Without leaving, an instance can take part again; what it still holds is published anew."""
    cluster.add("a"), cluster.add("b")
    cluster.put("a", KEYS[:4])
    cluster.put("b", KEYS[8:9])
    alone = cluster.operate(kind="drain", instance="a", leave=False, hand_over=2)
    assert alone.state == "done"
    assert len(cluster.held("b") & set(KEYS[:4])) == 2
    wait_for(lambda: cluster.instance("a")["chunks"] == 0)

    def refused() -> str | None:
        """Why a warm is; not at first, where the controller knows from Redis what the node said a moment before."""
        answer = cluster.http.post("/operations", json={"kind": "warm", "instance": "a", "keys": HEX[:1]})
        return answer.json()["error"]["code"] if answer.status_code == 409 else None

    assert wait_for(refused) == "draining"
    assert cluster.instance("a")["sharing"] == "drained"
    life = cluster.instance("a")["incarnation"]
    with cluster.pools["a"].lock:
        cluster.pools["a"].engine.put(KEYS[9:10])
        cluster.pools["a"].engine.node._child.kill(gentle=False)  # its successor is told what it had been told
    wait_for(lambda: cluster.pools["a"].engine.node.restarts)
    wait_for(lambda: (cluster.instance("a") or {}).get("incarnation", life) != life)
    wait_for(lambda: cluster.instance("a")["sharing"] == "drained")
    assert cluster.instance("a")["chunks"] == 0
    assert cluster.operate(kind="resume", instance="a").state == "done"
    wait_for(lambda: cluster.instance("a")["chunks"] == 5)
    with cluster.pools["a"].lock:
        assert cluster.pools["a"].engine.get_all(KEYS[8:9])


def test_what_cannot_be_done_says_why(impatient: Cluster) -> None:
    """Nobody to hand over to, an engine that takes no step, a node that stops, and what nobody holds."""
    cluster = impatient
    pool = cluster.add("a")
    cluster.put("a", KEYS[:3])
    lonely = cluster.operate(kind="drain", instance="a")
    assert (lonely.state, lonely.error["code"]) == ("failed", "no_receiver")
    assert "hand_over 0" in lonely.error["hint"]
    wait_for(lambda: cluster.instance("a")["sharing"] == "on")
    assert cluster.operate(kind="pin", keys=HEX[5:6], seconds=1).error["code"] == "not_held"

    with pool.lock:  # as an engine in a long step
        stuck = cluster.operate(kind="clear", instance="a", timeout_s=1)
        assert stuck.state == "failed"
        assert "did not finish in time" in stuck.instances[0]["error"]["message"]
        assert not any(cluster.holders(key) for key in KEYS[:3]), "but nobody else is sent there any more"

    pid = pool.engine.node.pid
    assert pid is not None
    started = cluster.http.post("/operations", json={"kind": "unpin", "instance": "a", "timeout_s": 30}).json()
    assert cluster.http.get(f"/operations/{started['id']}?wait_s=20").json()["state"] == "done"
    os.kill(pid, 19)
    try:
        lost = cluster.operate(kind="unpin", instance="a", timeout_s=30)
    finally:
        os.kill(pid, 18)
    assert (lost.state, lost.instances[0]["error"]["code"]) == ("failed", "lost")


def test_prompts_and_single_chunks(cluster: Cluster) -> None:
    """Tokens are keyed by an engine; a chunk's holders are asked what they really hold."""
    pool = cluster.add("a")
    tokens = list(range(2 * CHUNK_TOKENS + 10))
    keys = pool._make_keys(tokens, None)
    cluster.put("a", keys[:1])
    [found] = cluster.http.post("/lookup", json={"tokens": tokens}).json()["formats"]
    assert found["tokens"] == len(tokens)
    assert found["longest_prefix"] == {"chunks": 1, "tokens": CHUNK_TOKENS, "by_instance": {"a": 1}}
    [salted] = cluster.http.post("/lookup", json={"tokens": tokens, "cache_salt": "x"}).json()["formats"]
    assert salted["longest_prefix"]["chunks"] == 0
    no_text = cluster.http.post("/lookup", json={"text": "Hello"})
    assert (no_text.status_code, no_text.json()["error"]["code"]) == (503, "no_tokenizer")
    [described] = cluster.http.get(f"/chunks/{keys[0].hex()}").json()["formats"]
    [holder] = described["holders"]
    assert (holder["instance_id"], holder["held"], len(holder["checksum"])) == ("a", True, 32)
    assert cluster.http.get(f"/chunks/{HEX[0]}").json()["error"]["code"] == "unknown_chunk"
