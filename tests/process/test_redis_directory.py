"""A real Redis as the directory: every replica is right, whatever becomes of the server or of the others."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import httpx
import pytest

from kvmesh.bench.cluster import free_ports
from kvmesh.bench.stand_in import make_key, stand_in_format
from kvmesh.config import KVMeshConfig
from kvmesh.config.redis_url import parse_redis_target
from kvmesh.directory.redis_client import RedisClient
from kvmesh.wire.auth import ClusterKey
from process.controller_nodes import ControllerProcess, running_controller
from support.keys import KEY_TEXT, OTHER_KEY_TEXT, Authority, needs_openssl
from support.light_nodes import LightNode, eventually, joined
from support.redis_servers import (
    RedisServer,
    needs_redis,
    running_redis,
    running_redis_cluster,
    running_sentinel,
)
from support.stand_ins import make_config, running_engine

pytestmark = [pytest.mark.process, needs_redis]

KEYS = [make_key(f"redis-{number}") for number in range(3000)]
TIMEOUT_S = 1.0


def client_of(
    url: str, *, cluster_name: str = "test", key: str = "", timeout_s: float = TIMEOUT_S
) -> Callable[[LightNode], RedisClient]:
    def make(node: LightNode) -> RedisClient:
        return RedisClient(
            parse_redis_target(url),
            cluster_name=cluster_name,
            heartbeat_interval_s=0.2,
            instance_timeout_s=timeout_s,
            lookup_timeout_s=0.5,
            listener=node,
            outbox=node.outbox,
            cluster_key=ClusterKey(key) if key else None,
        )

    return make


@contextlib.asynccontextmanager
async def pair_of(
    url: str, *, cluster_name: str = "test", key: str = "", timeout_s: float = TIMEOUT_S
) -> AsyncIterator[tuple[LightNode, LightNode]]:
    """Two nodes that know each other."""
    make = client_of(url, cluster_name=cluster_name, key=key, timeout_s=timeout_s)
    async with (
        joined(LightNode("left", peer_port=1), make) as left,
        joined(LightNode("right", peer_port=2), make) as right,
    ):
        await eventually(lambda: left.sees(right) and right.sees(left) and left.connected and right.connected)
        yield left, right


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with running_redis(tmp_path_factory.mktemp("redis")) as running:
        yield running


@pytest.fixture
def redis(server: RedisServer) -> RedisServer:
    server.command("FLUSHALL")
    return server


async def test_replicas_follow_every_change(redis: RedisServer) -> None:
    """Inventories of before, additions, evictions and thousands at once reach the others; who leaves is forgotten at
    once and leaves nothing behind.
    """
    early = LightNode("early", peer_port=3)
    early.put(KEYS[:1500])
    async with joined(early, client_of(redis.url)), pair_of(redis.url) as (left, right):
        await eventually(lambda: left.sees(early) and right.sees(early))
        left.put(KEYS[:10])
        right.put(KEYS[5:15])
        await eventually(lambda: early.sees(left) and early.sees(right) and right.sees(left) and left.sees(right))
        assert early.replica.holders(KEYS[7]) == ("left", "right")
        left.drop(KEYS[:10])
        await eventually(lambda: right.sees(left) and early.sees(left))
        assert early.replica.holders(KEYS[7]) == ("right",), "one instance's eviction leaves the other's entry"
        left.put(KEYS)
        await eventually(lambda: right.sees(left) and early.sees(left))
        assert early.snapshots == 2, "changes come as changes"
        early.replica.check_integrity()
    assert not [key for key in redis.all_keys() if b":keys:" in key]
    for key in redis.all_keys():
        assert redis.command("PTTL", key) != -1, f"{key!r} would stay for ever"


async def test_a_dead_instance_is_forgotten_and_its_successor_welcome(redis: RedisServer) -> None:
    """Whose heartbeats stop is taken for dead; its id at the same address is free at once for its next life."""
    async with joined(LightNode("watcher", peer_port=9), client_of(redis.url)) as watcher:
        doomed = LightNode("doomed", peer_port=5)
        doomed.put(KEYS[:20])
        client = client_of(redis.url)(doomed)
        doomed.client = client
        running = asyncio.create_task(client.run(doomed.member))
        await eventually(lambda: watcher.sees(doomed))
        client._publisher._entered = False  # type: ignore[union-attr]  # so that it cannot say good-bye
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
        successor = LightNode("doomed", peer_port=5)
        successor.put(KEYS[20:30])
        async with joined(successor, client_of(redis.url)):
            await eventually(lambda: watcher.sees(successor))
            assert watcher.replica.holders(KEYS[0]) == ()
            impostor = LightNode("doomed", peer_port=6)
            async with joined(impostor, client_of(redis.url)):
                await eventually(lambda: impostor.client is not None and "is taken" in impostor.client.problem)
                assert watcher.sees(successor)
            successor.client._publisher._entered = False  # type: ignore[union-attr]
            successor.client._link._single.connection_pool.reset()  # type: ignore[union-attr]
        await eventually(lambda: ("doomed", "timeout") in watcher.downs)
        assert watcher.replica.holders(KEYS[20]) == ()


async def test_formats_never_meet_and_other_keys_do_no_harm(redis: RedisServer) -> None:
    """Another format is named once, with an example; other clusters and other programs' keys change nothing."""
    redis.command("SET", "kvmesh", "something else")
    redis.command("SET", "kvmesh:test:1:formats", "of another program")
    async with pair_of(redis.url) as (left, right), pair_of(redis.url, cluster_name="other") as (far, _):
        left.put(KEYS[:5])
        far.put(KEYS[5:10])
        await eventually(lambda: right.sees(left))
        await eventually(lambda: left.client is not None and "another program" in left.client.problem)
        redis.command("DEL", "kvmesh:test:1:formats")
        other = LightNode("other", stand_in_format(4096, kv_dtype="half"), peer_port=4)
        async with joined(other, client_of(redis.url)):
            await eventually(lambda: left.strangers and other.strangers)
            assert left.strangers[0].instance_id == "other"
            await eventually(lambda: not (left.client and left.client.problem))
        assert set(left.replica.members()) == {"right"}
        assert redis.command("GET", "kvmesh") == b"something else"


async def test_rubbish_in_redis_costs_only_itself(redis: RedisServer) -> None:
    """Whatever somebody writes under our names: nobody falls over, and sharing goes on."""
    async with pair_of(redis.url) as (left, right):
        names = [key for key in redis.all_keys() if key.endswith((b":who", b":log"))]
        assert names
        for name in names:
            for fields in (
                ("d", b"\x00\xff"),
                ("t", "u", "d", b"\x01"),
                ("t", "d", "i", "left", "n", "zz"),
                ("t", "?"),
            ):
                redis.command("XADD", name, "*", *fields)
            prefix = name.rpartition(b":")[0]
            redis.command("HSET", prefix + b":state", "x", "nonsense", b"\xff\xfe", "0123456789abcdef 1 1 1 a:1")
            redis.command("HSET", prefix + b":members", b"\xff\xfe", "nonsense")
        left.put(KEYS[:100])
        await eventually(lambda: right.sees(left) and right.connected)


async def test_a_cluster_key_keeps_strangers_out(redis: RedisServer) -> None:
    """Who has another cluster key, or none, is not believed, and both sides' logs say why."""
    async with pair_of(redis.url, key=KEY_TEXT) as (left, right):
        left.put(KEYS[:10])
        async with (
            joined(LightNode("stranger", peer_port=7), client_of(redis.url, key=OTHER_KEY_TEXT)) as stranger,
            joined(LightNode("keyless", peer_port=8), client_of(redis.url)) as keyless,
        ):
            await eventually(lambda: right.sees(left) and stranger.connected and keyless.connected)
            stranger.put(KEYS[20:25])
            left.put(KEYS[10:20])
            await eventually(lambda: right.sees(left))
            assert set(right.replica.members()) == {"left"}
            assert not stranger.replica.members()
            assert not keyless.replica.members()


async def test_redis_killed_and_restarted_empty(tmp_path: Path) -> None:
    """Without Redis everything known stays usable; an empty one is filled again by its users, at no cost to who knows
    everything already.
    """
    with running_redis(tmp_path) as redis:
        # Nobody is given up for being slow to come back.
        async with pair_of(redis.url, timeout_s=30) as (left, right):
            left.put(KEYS[:1000])
            await eventually(lambda: right.sees(left))
            before = right.snapshots
            redis.stop()
            await eventually(lambda: not right.connected)
            assert right.client is not None
            assert "cannot be reached" in right.client.problem
            assert right.sees(left), "what was known stays usable"
            left.put(KEYS[1000:1010])
            left.drop(KEYS[:5])
            redis.start()
            await eventually(lambda: right.connected and right.sees(left) and left.sees(right))
            assert not right.client.problem
            assert right.snapshots == before, "nobody reads again what it has"
            assert not right.downs


async def test_redis_that_stops_answering(tmp_path: Path) -> None:
    """A frozen Redis is noticed; when it goes on, so does everything, also when it takes everybody for dead."""
    with running_redis(tmp_path) as redis:
        async with pair_of(redis.url) as (left, right):
            redis.freeze()
            await eventually(lambda: not right.connected)
            assert right.client is not None
            assert right.client.problem
            left.put(KEYS[:10])
            await asyncio.sleep(1.5 * TIMEOUT_S)
            redis.thaw()
            await eventually(lambda: right.connected and right.sees(left) and left.sees(right))


async def test_full_memory(tmp_path: Path) -> None:
    """A full Redis takes no new chunks and says so; heartbeats and evictions go on, and room heals it."""
    with running_redis(tmp_path) as redis:
        async with pair_of(redis.url) as (left, right):
            left.put(KEYS[:1000])
            await eventually(lambda: right.sees(left))
            redis.command("CONFIG", "SET", "maxmemory", "1mb")
            left.put(KEYS[1000:2000])
            await eventually(lambda: left.client is not None and "no memory" in left.client.problem)
            left.drop(KEYS[:500])
            await eventually(lambda: KEYS[0] not in right.replica)
            await asyncio.sleep(1.5 * TIMEOUT_S)
            await eventually(lambda: right.connected)
            assert not right.downs, "a full Redis is not everybody's death"
            assert KEYS[700] in right.replica
            redis.command("CONFIG", "SET", "maxmemory", "0")
            await eventually(lambda: right.sees(left))
            await eventually(lambda: not (left.client and left.client.problem))


async def test_wrong_password(tmp_path: Path) -> None:
    """The reason is named, and the right password, set later on the server, mends it."""
    with running_redis(tmp_path, password="right") as redis:
        wrong = f"redis://:wrong@127.0.0.1:{redis.port}"
        async with joined(LightNode("left"), client_of(wrong)) as left:
            await eventually(lambda: left.client is not None and "password" in left.client.problem)
            assert "wrong" not in str(left.client and left.client.problem).replace("WRONGPASS", "")
            assert not left.connected
            redis.command("CONFIG", "SET", "requirepass", "wrong")
            await eventually(lambda: left.connected)


async def test_lost_keys_come_back(redis: RedisServer) -> None:
    """Sets evicted by a Redis that is used as a cache, streams cut short, state deleted: all of it heals."""
    async with pair_of(redis.url) as (left, right):
        left.put(KEYS[:50])
        await eventually(lambda: right.sees(left))
        for key in redis.all_keys():
            if b":keys:" in key:
                redis.command("DEL", key)
        late = LightNode("late", peer_port=3)
        async with joined(late, client_of(redis.url)):
            await eventually(lambda: late.sees(left))
            for key in redis.all_keys():
                if key.endswith((b":log", b":who", b":state")):
                    redis.command("DEL", key)
            left.put(KEYS[50:60])
            await eventually(lambda: late.sees(left) and right.sees(left) and left.sees(late))


@pytest.mark.timeout(120)
async def test_a_cluster_that_fails_over(tmp_path: Path) -> None:
    """Three masters: keys spread over them; the death of one is survived by its replica, and nothing is wrong after."""
    with running_redis_cluster(tmp_path, masters=3, replicas=1) as servers:
        url = f"redis+cluster://127.0.0.1:{servers[0].port},127.0.0.1:{servers[1].port}"
        plain = f"127.0.0.1:{servers[2].port}"
        async with contextlib.AsyncExitStack() as stack:
            nodes = [
                await stack.enter_async_context(
                    joined(LightNode(f"node-{number}", peer_port=number + 1), client_of(url if number else plain))
                )
                for number in range(6)
            ]

            def all_know_all() -> bool:
                return all(one.sees(other) for one in nodes for other in nodes if one is not other)

            for number, node in enumerate(nodes):
                node.put(KEYS[number * 10 : number * 10 + 20])
            await eventually(all_know_all, timeout_s=30)
            servers[1].stop(signal.SIGKILL)
            for number, node in enumerate(nodes):
                node.drop(KEYS[number * 10 : number * 10 + 5])
                node.put(KEYS[100 + number * 10 : 110 + number * 10])
            await eventually(lambda: all_know_all() and all(node.connected for node in nodes), timeout_s=60)
            for node in nodes:
                node.replica.check_integrity()


@pytest.mark.timeout(120)
def test_nodes_share_over_redis(redis: RedisServer) -> None:
    """Whole node processes with the second seed's keys: chunks move, the admin page tells of the directory."""

    def config(name: str) -> KVMeshConfig:
        return make_config(None, name, lookup_url=f"127.0.0.1:{redis.port}", cluster_name="nodes", admin_port=0)

    keys = KEYS[:32]
    with running_engine(config("one")) as one, running_engine(config("two")) as two:
        assert one.wait_peers(1)
        assert two.wait_peers(1)
        one.put(keys)
        assert two.wait_visible(keys)
        got = two.get(keys)
        assert (got.fetched, got.wrong, got.misses) == (32, 0, {})
        assert one.node.ready is not None
        health = httpx.get(f"http://127.0.0.1:{one.node.ready.admin_port}/healthz", trust_env=False).json()
        assert (health["directory_connected"], health["directory_problem"], health["peers"]) == (True, "", 1)


@needs_openssl
async def test_tls_password_and_sentinels(tmp_path: Path) -> None:
    """An encrypted Redis with a password, found by asking Sentinels; another CA's certificate is refused, with the
    reason.
    """
    (tmp_path / "tls").mkdir()
    files = Authority(tmp_path / "tls").issue("redis")
    other = Authority(tmp_path / "tls", "other-ca")
    [port] = free_ports(1)
    tls = ("--tls-port", str(port), "--tls-cert-file", files.cert_file, "--tls-key-file", files.key_file)
    secret = tmp_path / "password"
    secret.write_text("open sesame\n")
    with running_redis(tmp_path / "redis", *tls, "--tls-auth-clients", "no", password="open sesame") as redis:
        query = f"password_file={secret}&ca_file="
        url = f"rediss://127.0.0.1:{port}?{query}"
        async with pair_of(url + files.ca_file) as (left, right):
            left.put(KEYS[:10])
            await eventually(lambda: right.sees(left))
        async with joined(LightNode("refused"), client_of(url + other.ca_file)) as refused:
            await eventually(lambda: refused.client is not None and "CERTIFICATE" in refused.client.problem.upper())
        with running_sentinel(tmp_path / "sentinel", redis) as sentinel:
            found = f"redis+sentinel://:open%20sesame@127.0.0.1:{sentinel.port}/mymaster"
            async with pair_of(found) as (left, right):
                left.put(KEYS[:10])
                await eventually(lambda: right.sees(left))


@pytest.mark.timeout(120)
async def test_controllers_show_what_is_in_redis(tmp_path: Path) -> None:
    """Two at once, without writing anything; they keep what they know while Redis is away, and say so."""
    with running_redis(tmp_path / "redis") as redis:
        redis.command("ACL", "SETUSER", "page", "on", ">look", "~kvmesh:test:*", "+@read", "+@connection", "+info")
        flags = ("--lookup-url", f"redis://page:look@127.0.0.1:{redis.port}", "--cluster-name", "test")
        loop = asyncio.get_running_loop()
        async with pair_of(redis.url) as (left, right):
            left.put(KEYS[:100])
            with running_watcher(*flags) as one, running_watcher(*flags) as two:

                def chunks(controller: ControllerProcess) -> dict[str, int]:
                    answer = controller.get("/api/v1/instances")
                    return {str(row["instance_id"]): int(row["chunks"]) for row in answer["instances"]}  # type: ignore[call-overload, index]

                def show(*expected: tuple[str, int]) -> bool:
                    return chunks(one) == chunks(two) == dict(expected)

                async def shown(*expected: tuple[str, int]) -> None:
                    while not await loop.run_in_executor(None, show, *expected):
                        await asyncio.sleep(0.05)

                await asyncio.wait_for(shown(("left", 100), ("right", 0)), 30)
                right.put(KEYS[50:60])
                await asyncio.wait_for(shown(("left", 100), ("right", 10)), 30)
                redis.freeze()
                await asyncio.sleep(2 * TIMEOUT_S)
                await asyncio.wait_for(shown(("left", 100), ("right", 10)), 30)
                redis.thaw()
                left.drop(KEYS[:90])
                await asyncio.wait_for(shown(("left", 10), ("right", 10)), 30)
                health = await loop.run_in_executor(None, one.get, "/healthz")
                assert health["status"] == "ok"  # type: ignore[call-overload, index]


@contextlib.contextmanager
def running_watcher(*flags: str) -> Iterator[ControllerProcess]:
    with running_controller("--heartbeat-interval", "0.2", "--instance-timeout", "1", *flags) as controller:
        yield controller
