"""Nodes with a real controller: fetching, healing after every kind of death, and never a wrong byte."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from kvmesh.bench.cluster import Controller, wait_healthy
from kvmesh.bench.stand_in import StandInEngine, kv_content, make_key, stand_in_format
from kvmesh.core.format import with_int8
from kvmesh.core.reasons import MissReason
from kvmesh.errors import StartupError
from process.controller_nodes import wait_for
from support.stand_ins import CHUNK_BYTES, make_config, running_controller, running_engine

pytestmark = [pytest.mark.process, pytest.mark.timeout(120)]

KEYS = [make_key(f"chunk-{number}") for number in range(32)]


@pytest.fixture(scope="module")
def controller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Controller]:
    with running_controller(tmp_path_factory.mktemp("controller")) as running:
        yield running


@pytest.fixture
def pair(controller: Controller) -> Iterator[tuple[StandInEngine, StandInEngine]]:
    """Two engines that know each other, with names of their own per test."""
    names = [f"{name}-{os.urandom(4).hex()}" for name in ("left", "right")]
    with (
        running_engine(make_config(controller, names[0])) as left,
        running_engine(make_config(controller, names[1])) as right,
    ):
        assert left.wait_peers(1)
        assert right.wait_peers(1)
        yield left, right


def test_chunks_travel_and_spread(pair: tuple[StandInEngine, StandInEngine]) -> None:
    """What one has stored the other fetches, byte for byte, and then publishes in turn."""
    left, right = pair
    left.put(KEYS)
    assert right.wait_visible(KEYS)
    got = right.get(KEYS)
    assert (got.fetched, got.wrong, got.misses) == (len(KEYS), 0, {})
    left.forget(KEYS)
    assert left.wait_visible(KEYS), "fetched chunks are published by the fetcher"
    back = left.get(KEYS)
    assert (back.fetched, back.wrong) == (len(KEYS), 0)


def test_chunks_travel_as_int8(controller: Controller) -> None:
    """A third engine gets from the second one the very bytes that the second one has got, under the same checksum."""
    plain = stand_in_format(CHUNK_BYTES, kv_dtype="bfloat16", model_name=f"coded-{os.urandom(4).hex()}")
    kv_format = with_int8(plain, 64)
    with contextlib.ExitStack() as stack:
        first, second, third = (
            stack.enter_context(
                running_engine(
                    make_config(controller, f"{name}-{os.urandom(4).hex()}", wire_codec="int8"), kv_format=kv_format
                )
            )
            for name in ("first", "second", "third")
        )
        first._stored = kv_content
        first.put(KEYS)
        assert second.wait_visible(KEYS)
        assert second.get(KEYS).fetched == len(KEYS)
        first.forget(KEYS)
        assert third.wait_visible(KEYS)
        assert first.wait_visible(KEYS)
        # It may hear later than the first one that the second one holds them, too.
        wait_for(lambda: (got := third.get(KEYS)).local + got.fetched == len(KEYS))
        for key in KEYS:
            held, passed_on = (bytes(engine.pool.row(engine._slots[key])) for engine in (second, third))
            assert held == passed_on
            assert held != kv_content(key, CHUNK_BYTES)


def test_evicted_chunks_are_misses(pair: tuple[StandInEngine, StandInEngine]) -> None:
    """A chunk that vanishes between lookup and fetch is a miss with a reason."""
    left, right = pair
    left.put(KEYS)
    assert right.wait_visible(KEYS)
    left.ledger.retract_all()  # as an eviction, but the directory has not heard of it
    got = right.get(KEYS)
    assert got.fetched == 0
    assert set(got.misses) <= {MissReason.EVICTED, MissReason.TRUNCATED, MissReason.STALE}


def test_no_wrong_byte_while_the_holder_evicts(controller: Controller) -> None:
    """A holder whose pool is a tenth of its working set keeps evicting while a peer reads: thousands of evictions, no
    wrong byte.
    """
    keys = [make_key(f"churn-{number}") for number in range(320)]
    with (
        running_engine(make_config(controller, "churn-holder"), slots=32) as holder,
        running_engine(make_config(controller, "churn-reader"), slots=32) as reader,
    ):
        assert reader.wait_peers(1)
        stop = threading.Event()
        batches = len(keys) // 8
        written = 0

        def churn() -> None:
            nonlocal written
            while not stop.is_set():
                batch = keys[written * 8 : written * 8 + 8]
                holder.put(batch)
                written = (written + 1) % batches
                reader.wait_visible(batch[-1:], timeout_s=0.02)  # else all would be gone before anybody knew of them

        writer = threading.Thread(target=churn)
        writer.start()
        fetched = wrong = rounds = 0
        misses: dict[MissReason, int] = {}
        try:
            while holder.evictions < 5000 or fetched < 200:  # bounded by the test's time limit
                rounds += 1
                start = (written - rounds % 5) % batches * 8  # just written, or about to be evicted
                got = reader.get(keys[start : start + 8])
                fetched += got.fetched
                wrong += got.wrong
                for reason, count in got.misses.items():
                    misses[reason] = misses.get(reason, 0) + count
        finally:
            stop.set()
            writer.join()
        assert wrong == 0
        assert holder.evictions >= 5000
        assert fetched >= 200
        allowed = {MissReason.NOT_PUBLISHED, MissReason.EVICTED, MissReason.STALE, MissReason.TRUNCATED}
        assert set(misses) <= allowed | {MissReason.RECENTLY_FAILED}
        holder.ledger.check_integrity()


def test_killed_peer_node_is_a_miss_and_heals(pair: tuple[StandInEngine, StandInEngine]) -> None:
    """Kill -9 of the holder's node: the next fetch is a quick miss; the engine starts a new node, which publishes the
    pool again.
    """
    left, right = pair
    left.put(KEYS)
    assert right.wait_visible(KEYS)
    assert left.node.pid is not None
    os.kill(left.node.pid, signal.SIGKILL)
    got = right.get(KEYS, timeout_s=3)
    assert got.wrong == 0
    assert got.seconds < 3 + 2
    assert left.wait_node(restarts=1)
    assert right.get_all(KEYS), "the new node is found and serves the old pool"


def test_killed_own_node_fails_its_jobs_and_heals(pair: tuple[StandInEngine, StandInEngine]) -> None:
    """Kill -9 of the own node while fetches run: its jobs end as misses, nothing wrong stays, sharing comes back."""
    left, right = pair
    left.put(KEYS)
    assert right.wait_visible(KEYS)
    pid = right.node.pid
    assert pid is not None
    killer = threading.Timer(0.01, os.kill, (pid, signal.SIGKILL))
    killer.start()
    for _ in range(50):
        got = right.get(KEYS, timeout_s=5)
        assert got.wrong == 0
        right.forget([key for key in KEYS if right.holds(key)])
    killer.join()
    assert right.wait_node(restarts=1)
    assert right.wait_visible(KEYS)
    got = right.get(KEYS)
    assert (got.fetched, got.wrong) == (len(KEYS), 0)


def test_stopped_own_node_is_killed_at_the_deadline(pair: tuple[StandInEngine, StandInEngine]) -> None:
    """A node that is stopped (SIGSTOP) holds its engine up for the deadline and a little grace, not longer; then it is
    replaced.
    """
    left, right = pair
    left.put(KEYS)
    assert right.wait_visible(KEYS)
    assert right.node.pid is not None
    os.kill(right.node.pid, signal.SIGSTOP)
    got = right.get(KEYS, timeout_s=0.5)
    assert got.misses == {MissReason.NODE_DOWN: len(KEYS)}
    assert right.wait_node(restarts=1)
    assert right.wait_visible(KEYS)
    assert right.get(KEYS).fetched == len(KEYS)


def test_stopped_peer_stalls_and_late_bytes_go_nowhere(pair: tuple[StandInEngine, StandInEngine]) -> None:
    """A stopped peer costs the stall time; when it goes on, what it still sends does not reach slots that were given
    back.
    """
    left, right = pair
    left.put(KEYS)
    assert right.wait_visible(KEYS)
    assert left.node.pid is not None
    os.kill(left.node.pid, signal.SIGSTOP)
    got = right.get(KEYS, timeout_s=4)
    assert got.fetched == 0
    assert set(got.misses) & {MissReason.PEER_STALLED, MissReason.DEADLINE, MissReason.PEER_UNREACHABLE}
    mine = [make_key(f"mine-{number}") for number in range(32)]
    right.put(mine)  # the same slots, with other contents
    os.kill(left.node.pid, signal.SIGCONT)
    other = [make_key(f"other-{number}") for number in range(8)]
    left.put(other)
    assert right.wait_visible(other), "the peer is back"
    assert not any(right.is_wrong(key) for key in mine)


def test_controller_death_stops_nothing(tmp_path: Path) -> None:
    """With the controller dead, known chunks are still fetched; its successor learns everything again."""
    with (
        running_controller(tmp_path) as controller,
        running_engine(make_config(controller, "left", heartbeat_interval_s=0.3)) as left,
        running_engine(make_config(controller, "right", heartbeat_interval_s=0.3)) as right,
    ):
        left.put(KEYS)
        assert right.wait_visible(KEYS)
        controller.kill_group()
        assert right.get(KEYS[:16]).fetched == 16
        new = [make_key(f"new-{number}") for number in range(8)]
        left.put(new)
        controller.start()
        wait_healthy(controller, timeout_s=60)
        assert right.wait_visible(new, timeout_s=20)
        got = right.get(KEYS + new)
        assert (got.local, got.fetched, got.wrong) == (16, 24, 0)
        listed = {one["instance_id"] for one in controller.instances()}
        assert listed == {"left", "right"}


def test_dead_engine_takes_its_node_along(controller: Controller, tmp_path: Path) -> None:
    """Kill -9 of an engine: its node ends by itself, leaves the directory, and its port is free for the next life."""
    code = (
        "import sys, time\n"
        "from kvmesh.bench.stand_in import StandInEngine, make_key\n"
        "from kvmesh.config import KVMeshConfig\n"
        "engine = StandInEngine(KVMeshConfig.from_wire(bytes.fromhex(sys.argv[1])), slots=8, chunk_bytes=65536)\n"
        "engine.start()\n"
        "engine.put([make_key('doomed')])\n"
        "print(engine.node.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    with running_engine(make_config(controller, "survivor")) as survivor:
        config = make_config(controller, "doomed")
        engine = subprocess.Popen(
            [sys.executable, "-c", code, config.to_wire().hex()], stdout=subprocess.PIPE, text=True
        )
        assert engine.stdout is not None
        node = psutil.Process(int(engine.stdout.readline()))
        assert survivor.wait_visible([make_key("doomed")])
        engine.kill()
        engine.wait()
        engine.stdout.close()
        node.wait(timeout=10)
        assert survivor.wait_peers(0)
        got = survivor.get([make_key("doomed")])
        assert got.misses == {MissReason.NOT_PUBLISHED: 1}


def test_a_different_format_is_refused_by_name(controller: Controller, capfd: pytest.CaptureFixture[str]) -> None:
    """Same model name, other weights: no peer, the field in both nodes' logs and in the API."""
    odd = stand_in_format(CHUNK_BYTES, model_weights="other")
    with (
        running_engine(make_config(controller, "plain")) as plain,
        running_engine(make_config(controller, "odd"), kv_format=odd) as strange,
    ):
        plain.put(KEYS[:4])
        strange.put(KEYS[4:8])

        def incompatible() -> dict[str, list[str]]:
            answer = httpx.get(f"{controller.url}/api/v1/instances").json()
            return {
                one["instance_id"]: [field["field"] for other in one["incompatible_with"] for field in other["fields"]]
                for one in answer["instances"]
            }

        assert plain.wait_peers(0)
        while incompatible() != {"plain": ["model_weights"], "odd": ["model_weights"]}:
            pass
        assert not plain.wait_visible(KEYS[4:8], timeout_s=0.5)
        assert not strange.wait_visible(KEYS[:4], timeout_s=0.5)
    lines = [line for line in capfd.readouterr().err.splitlines() if "formats differ in model_weights" in line]
    assert any("instance=odd" in line for line in lines)
    assert any("instance=plain" in line for line in lines)


def test_a_busy_port_stops_the_start(controller: Controller) -> None:
    """A taken peer port is one clear message at start that names the port."""
    with running_engine(make_config(controller, "first")) as first:
        assert first.node.ready is not None
        port = first.node.ready.peer_port
        engine = StandInEngine(make_config(controller, "second", peer_port=port), slots=8, chunk_bytes=CHUNK_BYTES)
        with pytest.raises(StartupError, match=str(port)):
            engine.start()
        engine.close()
