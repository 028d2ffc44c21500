"""The life of the chart's pods, with a program that stands for vLLM: rollout under load, and what the router sees.

Redis, the router and everything around the engines are real; `tests/e2e/test_kubernetes.py` has the real engines.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.helm import CHART, SEED, TOOLS, Helm
from support.kube import engine
from support.kube.cluster import running_cluster
from support.kube.images import VENV, kvmesh_image, redis_image, vllm_image
from support.kube.network import PodNetwork, ip, unavailable
from support.kube.tutorial import Stack, missing

pytestmark = [pytest.mark.process, pytest.mark.timeout(180)]

FAST = ("--set", "servingEngineSpec.drain.forgetSeconds=2", "--set", "routerSpec.extraArgs={--health-interval,0.5}")
READY_S = 60


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    """The tutorial's values, with four engines."""
    if (reason := missing()) is not None:
        pytest.skip(reason)
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "vllm").write_text(f"#!{VENV}/bin/python\n" + Path(engine.__file__).read_text())
    (programs / "vllm").chmod(0o755)
    images = {
        "kvmesh/kvmesh": kvmesh_image(tmp_path / "image"),
        "lmcache/vllm-openai": vllm_image(tmp_path / "engine-image", programs=programs),
        "redis": redis_image(),
    }
    (tmp_path / "cluster").mkdir()
    with running_cluster(tmp_path / "cluster", images) as cluster:
        stack = Stack(Helm(TOOLS / "bin" / "helm4", tmp_path), cluster)
        stack.act("install", "vllm", CHART, "-f", SEED, *FAST)
        cluster.wait_ready(READY_S)
        yield stack


def test_life_of_the_pods(stack: Stack) -> None:
    """The router takes all engines in turn; a rollout under load fails no request and never has a pod too many; then
    an engine that is scaled away gets nothing any more.
    """
    cluster = stack.cluster
    assert len(stack.engines) == 4
    cluster.wait("all engines at the router", lambda: len({stack.ask("x") for _ in range(4)}) == 4, READY_S)
    assert Counter(stack.ask("x") for _ in range(8)) == {pod.name: 2 for pod in stack.engines}

    before = {pod.name for pod in stack.engines}
    with asking(stack) as answers:
        stack.act("upgrade", "vllm", CHART, "-f", SEED, *FAST, "--set", "kvmeshSpec.chunkTokens=512")
        cluster.wait("rollout", lambda: not before & set(cluster.pods), READY_S)
        cluster.wait_ready(READY_S)
        now = {pod.name for pod in stack.engines}
        cluster.wait("answers of all new engines", lambda: now <= answers.by, READY_S)
    assert answers.failures == []
    assert cluster.most_pods["vllm-mistral-1-deployment-vllm"] == 2
    gone = [pod for pod in cluster.gone if pod.name in before]
    assert len(gone) == 4
    for pod in gone:
        assert pod.events[-4:] == ["preStop begins", "preStop ended with 0", "SIGTERM", "ended by itself"]

    scaled = ("--set", "kvmeshSpec.chunkTokens=512", "--set", "servingEngineSpec.modelSpec[1].replicaCount=0")
    stack.act("upgrade", "vllm", CHART, "-f", SEED, *FAST, *scaled)
    cluster.wait("two engines", lambda: len(stack.engines) == 2, READY_S)
    assert {stack.ask("x") for _ in range(6)} == {pod.name for pod in stack.engines}


class Answers:
    """What came back while something else happened."""

    def __init__(self) -> None:
        self.by: set[str] = set()
        self.failures: list[str] = []


@contextlib.contextmanager
def asking(stack: Stack) -> Iterator[Answers]:
    """Two clients that ask all the time."""
    answers, stopping = Answers(), threading.Event()

    def ask() -> None:
        try:
            while not stopping.is_set():
                answers.by.add(stack.ask("x"))
        except Exception as error:
            answers.failures.append(f"{type(error).__name__}: {str(error)[:300]}")

    clients = [threading.Thread(target=ask, daemon=True) for _ in range(2)]
    for client in clients:
        client.start()
    try:
        yield answers
    finally:
        stopping.set()
        for client in clients:
            client.join()


def test_a_pod_that_comes_changes_no_way_to_a_service() -> None:
    """The bridge keeps its link address, which every pod remembers for the services behind it."""
    if (reason := unavailable()) is not None:
        pytest.skip(reason)
    with PodNetwork() as network:
        link = Path(f"/sys/class/net/{network.bridge}/address")
        before = link.read_text()
        space, _ = network.add_pod()
        (port,) = Path(f"/sys/class/net/{network.bridge}/brif").iterdir()
        ip("link", "set", port.name, "address", "00:00:00:00:00:02")  # lower than any that is drawn
        assert link.read_text() == before
        network.remove(space)
        assert link.read_text() == before
