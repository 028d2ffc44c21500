"""Routers and fake engines as processes."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import httpx
import yaml

from kvmesh.bench.cluster import HOST, Process, free_ports, tail

FAKE_ENGINE = Path(__file__).with_name("fake_engine.py")


class FakeEngine(Process):
    """`fake_engine.py`."""

    def __init__(self, folder: Path, name: str, *models: str, port: int = 0) -> None:
        self.port = port or free_ports(1)[0]
        command = [sys.executable, str(FAKE_ENGINE), str(self.port), name, *models]
        super().__init__(name, command, folder / f"{name}-{self.port}.log")

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def control(self, what: str) -> None:
        httpx.post(f"{self.url}/control/{what}", timeout=10).raise_for_status()

    def wait(self, what: str, number: int = 1) -> dict[str, int]:
        """Wait until something has happened so often; returns all counts."""
        counts: dict[str, int] = httpx.get(f"{self.url}/wait/{what}/{number}", timeout=20).raise_for_status().json()
        return counts

    def start_and_wait(self) -> FakeEngine:
        self.start()
        until(lambda: answers(f"{self.url}/health"), self)
        return self


class RouterProcess(Process):
    """`kvmesh router` with these settings."""

    def __init__(self, folder: Path, **settings: object) -> None:
        (self.port,) = free_ports(1)
        path = folder / f"router-{self.port}.yaml"
        values = {"host": HOST, "port": self.port, "health_interval_s": 0.3, "health_failures": 1, **settings}
        path.write_text(yaml.safe_dump(values))
        command = [sys.executable, "-m", "kvmesh.cli", "router", "--config", str(path)]
        super().__init__("router", command, folder / f"router-{self.port}.log")

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def backends(self) -> list[dict[str, object]]:
        listed: list[dict[str, object]] = httpx.get(f"{self.url}/kvmesh/backends", timeout=10).json()["backends"]
        return listed

    def healthy(self) -> set[str]:
        """Names (or addresses) of the backends that may get requests."""
        return {str(one["name"] or one["address"]) for one in self.backends() if one["healthy"]}

    def start_and_wait(self, healthy: int) -> RouterProcess:
        self.start()
        until(lambda: answers(f"{self.url}/healthz") and len(self.healthy()) == healthy, self)
        return self

    def metric(self, name: str, **labels: str) -> float:
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        text = httpx.get(f"{self.url}/metrics", timeout=10).text
        total = 0.0
        for line in text.splitlines():
            sample, _, value = line.rpartition(" ")
            if sample.partition("{")[0] == f"kvmesh_router_{name}" and all(part in sample for part in wanted):
                total += float(value)
        return total


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2).status_code == httpx.codes.OK
    except httpx.HTTPError:
        return False


def until(condition: Callable[[], bool], *processes: Process, timeout_s: float = 30.0) -> None:
    """Poll for what no event tells of. Fails with the processes' logs."""
    end_s = time.monotonic() + timeout_s
    while not condition():
        dead = [process.name for process in processes if not process.is_running()]
        if dead or time.monotonic() > end_s:
            logs = "\n".join(f"--- {process.name}\n{tail(process.log())}" for process in processes)
            raise AssertionError(f"not in time; ended: {dead}\n{logs}")
        time.sleep(0.02)


def ask(url: str, path: str = "/v1/completions", **body: object) -> httpx.Response:
    """A request as an OpenAI client sends it."""
    return httpx.post(f"{url}{path}", json={"model": "model", "prompt": "x", **body}, timeout=30)


def events(answer: httpx.Response) -> Iterator[Mapping[str, object]]:
    """Decoded events of a stream, without the last one of a good end."""
    for line in answer.iter_lines():
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


def engine_of(answer: httpx.Response) -> str:
    """Which engine answered."""
    return answer.headers["x-engine"]
