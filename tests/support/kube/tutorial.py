"""The second tutorial's release, installed by a real Helm, its pods running as processes."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx

from kvmesh.bench.cluster import metric
from kvmesh.models import TINY, TinyShape
from support.helm import CHART, SEED, TOOLS, Helm, Result
from support.kube.cluster import Cluster, running_cluster
from support.kube.images import hub_cache, kvmesh_image, redis_image, vllm_image
from support.kube.network import unavailable
from support.kube.pods import Pod

MODEL = "mistralai/Mistral-7B-Instruct-v0.2"
SENTENCE = "Explain the significance of KV cache in language models."
READY_TIMEOUT_S = 800
SMALLER = [
    f"servingEngineSpec.modelSpec[{index}].{setting}"
    for index in (0, 1)
    for setting in (
        "replicaCount=1",
        "lmcacheConfig.cpuOffloadingBufferSize=1",
        "vllmConfig.extraArgs={--enforce-eager}",
    )
]
"""What differs from the tutorial's values: the machine is smaller, and has no compiler."""


def missing() -> str | None:
    """Why the release cannot run here; None when it can."""
    if (reason := unavailable()) is not None:
        return reason
    if shutil.which("redis-server") is None:
        return "redis-server not found"
    return None if (TOOLS / "bin" / "helm4").exists() else "no Helm: make chart-tools fetches it"


class Stack:
    """An installed release."""

    def __init__(self, helm: Helm, cluster: Cluster) -> None:
        self.helm = helm
        self.cluster = cluster

    def act(self, *arguments: object) -> Result:
        """Run Helm, which must succeed."""
        result = self.helm.run(*arguments, kubeconfig=self.cluster.api.kubeconfig())
        assert result.code == 0, f"{result.out}{result.err}{self.cluster.logs()}"
        return result

    @property
    def engines(self) -> list[Pod]:
        return sorted(self.cluster.of("engine"), key=lambda pod: pod.name)

    def ask(self, prompt: str) -> str:
        """The tutorial's curl; returns the text."""
        body = {"model": MODEL, "prompt": prompt, "max_tokens": 10, "temperature": 0}
        url = f"{self.cluster.service_url('vllm-router-service')}/v1/completions"
        answer = httpx.post(url, json=body, timeout=300)
        assert answer.status_code == httpx.codes.OK, f"{answer.text}\n{self.cluster.logs()}"
        return str(answer.json()["choices"][0]["text"])

    @staticmethod
    def pulled(pod: Pod) -> int:
        """Chunks that this engine has fetched from peers, by vLLM's own /metrics."""
        return int(metric(f"http://{pod.address}:8000", "kvmesh_fetched_chunks_total"))


@contextlib.contextmanager
def running_tutorial(
    folder: Path, *, sets: Sequence[str] = (), shape: TinyShape = TINY, helm: str = "helm4"
) -> Iterator[Stack]:
    """Install the tutorial's values file, wait until all pods are ready, and take everything away at the end."""
    cluster_folder, home = folder / "cluster", folder / "helm"
    cluster_folder.mkdir()
    home.mkdir()
    images = {
        "kvmesh/kvmesh": kvmesh_image(cluster_folder / "image"),
        "lmcache/vllm-openai": vllm_image(cluster_folder / "engine-image"),
        "redis": redis_image(),
    }
    claims = {"storage": hub_cache(cluster_folder / "weights", MODEL, shape)}
    with running_cluster(cluster_folder, images, claims) as cluster:
        stack = Stack(Helm(TOOLS / "bin" / helm, home), cluster)
        changes = [part for one in (*SMALLER, *sets) for part in ("--set", one)]
        stack.act("install", "vllm", CHART, "-f", SEED, *changes)
        cluster.wait_ready(READY_TIMEOUT_S)
        yield stack
