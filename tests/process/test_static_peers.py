"""Nodes without a directory, with one that is gone for long, and with two: chunks are found all the same."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from pydantic import SecretStr

from kvmesh.bench.cluster import free_ports, wait_healthy
from kvmesh.bench.stand_in import StandInEngine, make_key, stand_in_format
from kvmesh.config import KVMeshConfig
from process.controller_nodes import wait_for
from support.keys import KEY_TEXT, OTHER_KEY_TEXT
from support.stand_ins import CHUNK_BYTES, make_config, running_controller, running_engine

pytestmark = [pytest.mark.process, pytest.mark.timeout(180)]

KEYS = [make_key(f"static-{number}") for number in range(32)]
QUICK = {"heartbeat_interval_s": 0.3, "instance_timeout_s": 1.0}


def static_config(name: str, port: int, *peers: int, **changed: object) -> KVMeshConfig:
    listed = tuple(f"tcp://localhost:{peer}" for peer in peers)
    return make_config(None, name, peer_port=port, static_peers=listed, admin_port=0, **QUICK, **changed)


def problem_of(engine: StandInEngine) -> str:
    assert engine.node.ready is not None
    url = f"http://127.0.0.1:{engine.node.ready.admin_port}/healthz"
    return str(httpx.get(url, trust_env=False, timeout=10).json()["directory_problem"])


@contextlib.contextmanager
def static_pair() -> Iterator[tuple[StandInEngine, StandInEngine]]:
    """Only the second knows of the first, by a list that has itself on it, too."""
    one, two = free_ports(2)
    with (
        running_engine(static_config("one", one, one)) as first,
        running_engine(static_config("two", two, one, two)) as second,
    ):
        assert first.wait_peers(1)
        assert second.wait_peers(1)
        yield first, second


def test_nodes_on_a_list_share_and_heal() -> None:
    """One-sided knowledge is enough: who is followed follows back. A killed node's successor is found again."""
    with static_pair() as (first, second):
        first.put(KEYS)
        assert second.wait_visible(KEYS)
        got = second.get(KEYS)
        assert (got.fetched, got.wrong) == (len(KEYS), 0)
        first.forget(KEYS)
        assert first.get_all(KEYS)
        second.forget(KEYS[:8])
        first.forget(KEYS[:8])
        wait_for(lambda: not any(second.node.is_visible(key) for key in KEYS[:8]))
        assert first.node.pid is not None
        os.kill(first.node.pid, signal.SIGKILL)
        assert first.wait_node(restarts=1)
        first.put(KEYS[:8])
        assert second.get_all(KEYS)
        assert first.wait_peers(1)
    # both nodes have left


def test_reasons_are_named() -> None:
    """A peer that is away, of another format, with another key, or with our id: each is said."""
    here, away, other, keyed, twin = free_ports(5)
    secret = {"cluster_key": SecretStr(KEY_TEXT)}
    with (
        running_engine(static_config("here", here, away, other, keyed, twin, **secret)) as engine,
        running_engine(
            static_config("other", other, here, **secret), kv_format=stand_in_format(CHUNK_BYTES, kv_dtype="half")
        ),
        running_engine(static_config("keyed", keyed, here, cluster_key=SecretStr(OTHER_KEY_TEXT))),
        running_engine(static_config("here", twin, here, **secret)),
    ):
        wait_for(
            lambda: all(
                word in problem_of(engine) for word in ("Connection refused", "kv_dtype", "cluster key", "instance_id")
            )
        )
        assert engine.node.state.peers == 0


def test_peers_follow_each_other_when_the_directory_is_gone_for_long(tmp_path: Path) -> None:
    """Without a word in the configuration: those who know each other go on telling each other."""
    with (
        running_controller(
            tmp_path, arguments=("--heartbeat-interval", "0.3", "--instance-timeout", "1")
        ) as controller,
        running_engine(make_config(controller, "one", admin_port=0, **QUICK)) as first,
        running_engine(make_config(controller, "two", admin_port=0, **QUICK)) as second,
    ):
        assert first.wait_peers(1)
        assert second.wait_peers(1)
        controller.signal(signal.SIGKILL)
        wait_for(lambda: "directly" in problem_of(second) and "directly" in problem_of(first), 30)
        first.put(KEYS)
        assert second.wait_visible(KEYS, 20)
        assert second.get_all(KEYS)
        controller.start()
        wait_for(lambda: not problem_of(second) and not problem_of(first), 30)
        first.forget(KEYS)
        second.forget(KEYS)
        first.put(KEYS[:4])
        assert second.get_all(KEYS[:4])
        wait_for(lambda: not second.node.is_visible(KEYS[9]))


def test_two_controllers_lose_nothing_when_one_is_lost(tmp_path: Path) -> None:
    """Killed, restarted: sharing goes on, nobody is taken for dead, and then the other one's death is survived
    as well.
    """
    flags = ("--heartbeat-interval", "0.3", "--instance-timeout", "1")
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with (
        running_controller(tmp_path / "a", arguments=flags) as left,
        running_controller(tmp_path / "b", arguments=flags) as right,
    ):
        both = {
            "enable_controller": True,
            "controller_pull_url": f"127.0.0.1:{left.pull_port},127.0.0.1:{right.pull_port}",
            "controller_reply_url": [f"127.0.0.1:{left.reply_port}", f"127.0.0.1:{right.reply_port}"],
        }
        with (
            running_engine(make_config(None, "one", admin_port=0, **QUICK, **both)) as first,
            running_engine(make_config(None, "two", admin_port=0, **QUICK, **both)) as second,
        ):
            assert first.wait_peers(1)
            assert second.wait_peers(1)
            first.put(KEYS[:8])
            assert second.get_all(KEYS[:8])
            for number, controller in enumerate((left, right), start=1):
                controller.signal(signal.SIGKILL)
                controller.kill_group()
                part = KEYS[8 * number : 8 * number + 8]
                first.put(part)
                assert second.get_all(part)
                wait_for(lambda: problem_of(first) and problem_of(second))
                assert second.node.state.directory_connected
                controller.start()
                wait_healthy(controller, timeout_s=60)
                wait_for(lambda: not problem_of(first) and not problem_of(second), 30)
                assert second.node.state.peers == 1
            for controller in (left, right):
                wait_for(lambda controller=controller: len(controller.instances()) == 2)
            second.forget(KEYS[:24])
            first.forget(KEYS[:4])
            wait_for(lambda: not second.node.is_visible(KEYS[0]))
            assert second.get_all(KEYS[4:24])
