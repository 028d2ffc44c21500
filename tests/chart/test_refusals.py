"""Values that cannot work are refused, in words that tell a person what to do; those without effect are named."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.helm import CHART, EXAMPLES, SEED, Helm
from support.kube.api import ApiServer

CONTROLLER = EXAMPLES / "values-controller.yaml"


def one_model(**changed: Any) -> dict[str, Any]:
    model = {"name": "m", "repository": "vllm/vllm-openai", "tag": "v0.32.0", "modelURL": "org/model", **changed}
    return {"servingEngineSpec": {"modelSpec": [model]}}


MISSPELT = {
    "top level": ({"routerspec": {}}, "routerspec"),
    "model": (one_model(replicas=2), "replicas"),
    "lmcacheConfig": (one_model(lmcacheConfig={"enable": True}), "enable"),
    "vllmConfig": (one_model(vllmConfig={"max_model_len": 4096}), "max_model_len"),
    "lookupserverSpec": ({"lookupserverSpec": {"port": 6379}}, "port"),
    "kvmeshSpec": ({"kvmeshSpec": {"chunk_size": 256}}, "chunk_size"),
}
WRONG = {
    "no image": ({"servingEngineSpec": {"modelSpec": [{"name": "m"}]}}, "repository"),
    "a name that Kubernetes does not take": (one_model(name="Mistral_7B"), "name"),
    "memory without a unit that is known": (one_model(requestMemory="40GB"), "requestMemory"),
    "a pool of nothing": (one_model(lmcacheConfig={"cpuOffloadingBufferSize": "0GB"}), "cpuOffloadingBufferSize"),
    "a port that is none": (one_model(lmcacheConfig={"distributedPort": "peer"}), "distributedPort"),
    "more memory than there is": (one_model(vllmConfig={"gpuMemoryUtilization": 1.5}), "gpuMemoryUtilization"),
    "a policy that is none": ({"routerSpec": {"routingLogic": "random"}}, "routingLogic"),
}
SHARES = {"enabled": True, "cpuOffloadingBufferSize": "20"}
CANNOT_WORK = {
    "several lookup servers": ({"lookupserverSpec": {"replicaCount": 3}}, "Leave it at 1"),
    "no directory": ({"controllerSpec": {"enabled": False}}, "give controllerSpec.host"),
    "redis without a spec": ({"kvmeshSpec": {"directory": "redis"}}, "there is no lookupserverSpec"),
    "kv routing without a controller": (
        {"lookupserverSpec": {}, "routerSpec": {"routingLogic": "kv"}},
        "choose another routingLogic",
    ),
    "a pool that does not fit": (one_model(lmcacheConfig=SHARES, limitMemory="16Gi"), "make the pool smaller"),
    "equal ports": (one_model(lmcacheConfig={**SHARES, "distributedPort": 8000}), "must differ"),
    "sharing that is not enabled": (one_model(lmcacheConfig={"p2pEnabled": True}), "set enabled: true"),
    "disaggregated prefill": (one_model(lmcacheConfig={**SHARES, "enablePD": True}), "prefill and decode"),
    "ray": (one_model(raySpec={"headNode": {}}), "no common host pool"),
    "LoRA controller": ({"loraController": {"enableLoraController": True}}, "--lora-modules"),
    "static discovery of nobody": ({"routerSpec": {"serviceDiscovery": "static"}}, "staticBackends is empty"),
    "a chart's own key": (one_model(lmcacheConfig={**SHARES, "config": {"peer_port": 1}}), "peer_port"),
    "a drain longer than the grace": (
        {"servingEngineSpec": {"terminationGracePeriodSeconds": 10}},
        "the pod would be killed in between",
    ),
    "a template that is not there": (one_model(chatTemplate="x.jinja"), "chatTemplateConfigMap"),
}


@pytest.mark.parametrize("case", [*MISSPELT, *WRONG])
def test_the_schema_names_the_key(helm: Helm, case: str) -> None:
    """A key that is not known, or a value of the wrong form, stops both versions of Helm; the message has the key."""
    values, told = {**MISSPELT, **WRONG}[case]
    result = helm.template(overlay=values)
    assert result.code != 0
    assert "values don't meet the specifications of the schema" in result.err
    assert told in result.err


@pytest.mark.parametrize("case", CANNOT_WORK)
def test_what_does_not_go_together(any_helm: Helm, case: str) -> None:
    values, told = CANNOT_WORK[case]
    result = any_helm.template(overlay=values)
    assert result.code != 0
    assert "These values cannot work:" in result.err
    assert told in result.err


def test_all_problems_come_at_once(any_helm: Helm) -> None:
    values = {**one_model(raySpec={}), "lookupserverSpec": {"replicaCount": 2}}
    result = any_helm.template(overlay=values)
    assert result.err.count("\n  - ") == 2


@pytest.fixture(scope="module")
def kubeconfig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with ApiServer(tmp_path_factory.mktemp("api")) as api:
        yield api.kubeconfig()


def notes(helm: Helm, kubeconfig: Path, *values: Path) -> str:
    arguments = [part for file in values for part in ("-f", file)]
    result = helm.run("install", "vllm", CHART, "--dry-run=client", *arguments, kubeconfig=kubeconfig)
    assert result.code == 0, result.err
    return result.out.partition("NOTES:")[2]


def test_notes_of_the_seed(helm: Helm, kubeconfig: Path) -> None:
    """What the tutorial's file says without effect is named; so are its placeholder and its moving tag."""
    told = notes(helm, kubeconfig, SEED)
    assert "IGNORED    lookupserverSpec.serde (naive)" in told
    assert "WARNING    mistral-1: hf_token is still the placeholder <YOUR HF TOKEN>" in told
    assert "NOTE       mistral-2: the tag `latest`" in told
    assert "kubectl port-forward -n default svc/vllm-router-service 30080:80" in told
    assert "curl -X POST http://localhost:30080/v1/completions" in told
    assert "mistralai/Mistral-7B-Instruct-v0.2" in told
    assert "helm test vllm" in told


def test_notes_of_a_file_without_faults(any_helm: Helm, kubeconfig: Path) -> None:
    """Nothing is warned about where there is nothing to warn about."""
    told = notes(any_helm, kubeconfig, CONTROLLER)
    assert not [line for line in told.splitlines() if line.startswith(("IGNORED", "WARNING", "NOTE"))]
    assert "svc/vllm-controller-service 9000:9000" in told


def test_one_engine_alone_is_said_to_be_alone(any_helm: Helm, kubeconfig: Path, tmp_path: Path) -> None:
    overlay = tmp_path / "values.yaml"
    overlay.write_text(
        "servingEngineSpec:\n"
        "  modelSpec: [{name: m, repository: r, tag: '1', modelURL: m, lmcacheConfig: {enabled: true}}]\n"
    )
    assert "there is nobody to pull from" in notes(any_helm, kubeconfig, overlay)


def test_keys_of_production_stack_without_a_meaning(any_helm: Helm, kubeconfig: Path, tmp_path: Path) -> None:
    overlay = tmp_path / "values.yaml"
    overlay.write_text(
        """
cacheserverSpec: {replicaCount: 1}
routerSpec: {engineScrapeInterval: 15, requestStatsWindow: 60}
servingEngineSpec:
  modelSpec:
    - {name: m, repository: r, tag: '1', modelURL: m, lmcacheConfig: {enabled: true, diskOffloadingBufferSize: 60Gi}}
"""
    )
    told = notes(any_helm, kubeconfig, overlay)
    assert "IGNORED    cacheserverSpec" in told
    assert "IGNORED    m: lmcacheConfig.diskOffloadingBufferSize" in told
    assert "IGNORED    routerSpec.engineScrapeInterval" in told


def test_the_packaged_chart_is_as_strict(any_helm: Helm, tmp_path: Path) -> None:
    """The schema is in the package, so a misspelt key is refused there too."""
    packaged = any_helm.run("package", CHART, "--destination", tmp_path)
    assert packaged.code == 0, packaged.err
    (archive,) = tmp_path.glob("kvmesh-stack-*.tgz")
    assert any_helm.run("template", "vllm", archive, "-f", SEED).code == 0
    refused = any_helm.run("template", "vllm", archive, "--set", "routerspec.x=1")
    assert refused.code != 0
    assert "routerspec" in refused.err
