"""Discovery of pods against an API server that speaks real HTTP."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from kvmesh.bench.cluster import HOST, Process, free_ports
from support.routers import FakeEngine, RouterProcess, answers, ask, engine_of, until

pytestmark = pytest.mark.process

TOKEN = "token-of-the-service-account"


class Kubernetes(Process):
    """`fake_kubernetes.py`."""

    def __init__(self, folder: Path) -> None:
        (self.port,) = free_ports(1)
        script = Path(__file__).parents[1] / "support" / "fake_kubernetes.py"
        super().__init__("kubernetes", [sys.executable, str(script), str(self.port), TOKEN], folder / "kubernetes.log")

    def control(self, **what: object) -> dict[str, int]:
        counts: dict[str, int] = httpx.post(f"http://{HOST}:{self.port}/control", json=what).raise_for_status().json()
        return counts


def pod(engine: FakeEngine, **changed: object) -> dict[str, object]:
    """A ready pod whose container port `http` is the engine's."""
    deleted = {"deletionTimestamp": "2026-01-01T00:00:00Z"} if changed.get("deleting") else {}
    return {
        "metadata": {"name": engine.name, "labels": {"app": "vllm"}, **deleted},
        "spec": {"containers": [{"name": "vllm", "ports": [{"name": "http", "containerPort": engine.port}]}]},
        "status": {
            "phase": "Running",
            "podIP": HOST,
            "conditions": [{"type": "Ready", "status": "True" if changed.get("ready", True) else "False"}],
            "containerStatuses": [{"name": "vllm", "restartCount": changed.get("restarts", 0)}],
        },
    }


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[tuple[Kubernetes, list[FakeEngine], RouterProcess]]:
    """An API server with one pod, three engines, and a router that is told of neither."""
    with contextlib.ExitStack() as stack:
        kubernetes = Kubernetes(tmp_path)
        engines = [FakeEngine(tmp_path, f"vllm-{number}") for number in range(3)]
        for process in (kubernetes, *engines):
            stack.callback(process.stop)
            process.start()
        until(lambda: answers(f"http://{HOST}:{kubernetes.port}/healthz"), kubernetes)
        for engine in engines:
            until(lambda engine=engine: answers(f"{engine.url}/health"), engine)
        kubernetes.control(pods={"uid-0": pod(engines[0])})
        credentials = tmp_path / "credentials"
        credentials.mkdir()
        (credentials / "token").write_text(TOKEN + "\n")
        (credentials / "namespace").write_text("space")
        router = RouterProcess(
            tmp_path,
            kubernetes_api=f"http://{HOST}:{kubernetes.port}",
            kubernetes_selector="app=vllm",
            kubernetes_port="http",
            kubernetes_credentials=str(credentials),
            health_interval_s=60.0,
        )
        stack.callback(router.stop)
        yield kubernetes, engines, router.start_and_wait(healthy=1)


def test_pods_come_and_go(cluster: tuple[Kubernetes, list[FakeEngine], RouterProcess]) -> None:
    """Followed by the watch through drops, expired versions and an absent server; identity is the pod, not its address.

    Health checks are a minute apart, so that nothing but the watch can be the reason.
    """
    kubernetes, engines, router = cluster
    kubernetes.control(pods={f"uid-{number}": pod(engine) for number, engine in enumerate(engines)})
    until(lambda: router.healthy() == {"vllm-0", "vllm-1", "vllm-2"}, router)
    assert {engine_of(ask(router.url)) for _ in range(6)} == {"vllm-0", "vllm-1", "vllm-2"}

    kubernetes.control(pods={"uid-1": pod(engines[1], ready=False), "uid-2": pod(engines[2], deleting=True)})
    until(lambda: router.healthy() == {"vllm-0"}, router)
    kubernetes.control(pods={"uid-1": pod(engines[1]), "uid-2": None})
    until(lambda: router.healthy() == {"vllm-0", "vllm-1"}, router)

    # The same address, another pod; then the same pod with a container that has started anew.
    before = {one["id"]: one for one in router.backends()}
    assert set(before) == {"uid-0/0", "uid-1/0"}
    kubernetes.control(pods={"uid-1": None, "uid-9": pod(engines[1])})
    until(lambda: {one["id"] for one in router.backends()} == {"uid-0/0", "uid-9/0"}, router)
    assert next(one for one in router.backends() if one["id"] == "uid-9/0")["assigned_requests"] == 0
    kubernetes.control(pods={"uid-9": pod(engines[1], restarts=1)})
    until(lambda: {one["id"] for one in router.backends()} == {"uid-0/0", "uid-9/1"}, router)

    kubernetes.control(drop=True)
    kubernetes.control(pods={"uid-2": pod(engines[2])})
    until(lambda: "vllm-2" in router.healthy(), router)
    lists = kubernetes.control(bookmark=True)["lists"]
    kubernetes.control(expire=True)
    kubernetes.control(pods={"uid-0": None})
    until(lambda: router.healthy() == {"vllm-1", "vllm-2"}, router)
    assert kubernetes.control()["lists"] > lists

    kubernetes.control(away=True)
    until(lambda: router.metric("discovery_connected") == 0, router)
    assert {engine_of(ask(router.url)) for _ in range(4)} == {"vllm-1", "vllm-2"}
    kubernetes.control(pods={"uid-2": None})
    until(lambda: router.healthy() == {"vllm-1"} and router.metric("discovery_connected") == 1, router)
    assert "service account" not in router.log()
