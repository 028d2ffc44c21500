"""The life of a release on a real API: install, upgrade, rollback, uninstall, with both versions of Helm."""

from __future__ import annotations

import base64
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.helm import CHART, EXAMPLES, SEED, Helm, Manifest, Result, find_tool
from support.kube.api import ApiServer
from support.kube.store import Key

CONTROLLER = EXAMPLES / "values-controller.yaml"


@pytest.fixture
def api(tmp_path: Path) -> Iterator[ApiServer]:
    with ApiServer(tmp_path) as server:
        yield server


def act(helm: Helm, api: ApiServer, *arguments: object) -> Result:
    result = helm.run(*arguments, kubeconfig=api.kubeconfig())
    assert result.code == 0, result.err
    return result


def live(api: ApiServer) -> dict[tuple[str, str], Manifest]:
    """What is there, by kind and name; Helm's own records left out."""
    found = {}
    for plural in ("deployments", "statefulsets", "services", "configmaps", "secrets", "networkpolicies", "roles"):
        for one in api.store.list(plural):
            if not one["metadata"]["name"].startswith("sh.helm.release"):
                found[one["kind"], one["metadata"]["name"]] = one
    return found


def specs(api: ApiServer) -> dict[tuple[str, str], object]:
    return {key: one.get("spec") or one.get("data") or one.get("rules") for key, one in live(api).items()}


def key_of(api: ApiServer) -> str:
    data = api.store.get(Key("v1", "secrets", "default", "vllm-kvmesh"))["data"]
    return base64.b64decode(data["cluster-key"]).decode()


def test_life_of_a_release(helm: Helm, api: ApiServer) -> None:
    """The key is made once and survives upgrade and rollback; every step leaves exactly what was rendered."""
    act(helm, api, "install", "vllm", CHART, "-f", SEED)
    first, key = specs(api), key_of(api)
    assert len(key) >= 32
    assert ("Deployment", "vllm-deployment-lookup-server") in first

    changes = ("--set", "kvmeshSpec.directory=controller,kvmeshSpec.chunkTokens=512,kvmeshSpec.peerPort=8205")
    act(helm, api, "upgrade", "vllm", CHART, "-f", SEED, *changes)
    second = specs(api)
    assert key_of(api) == key
    assert ("Deployment", "vllm-deployment-lookup-server") not in second
    assert ("Deployment", "vllm-deployment-controller") in second
    assert "chunk_tokens: 512" in json.dumps(second["ConfigMap", "vllm-mistral-1-kvmesh-config"])
    rendered = helm.render(SEED, sets=changes[1].split(","))
    for manifest in rendered.manifests:
        if manifest["kind"] in {"Deployment", "NetworkPolicy"}:
            assert second[manifest["kind"], manifest["metadata"]["name"]] == manifest["spec"]

    act(helm, api, "rollback", "vllm", "1")
    assert specs(api) == first

    history = json.loads(act(helm, api, "history", "vllm", "-o", "json").out)
    assert [one["revision"] for one in history] == [1, 2, 3]
    act(helm, api, "uninstall", "vllm")
    assert live(api) == {}


def test_an_upgrade_to_the_same_changes_nothing(helm: Helm, api: ApiServer) -> None:
    """No pod is replaced by an upgrade that has nothing new."""
    act(helm, api, "install", "vllm", CHART, "-f", CONTROLLER)
    before = {key: one["metadata"].get("generation") for key, one in live(api).items()}
    act(helm, api, "upgrade", "vllm", CHART, "-f", CONTROLLER)
    assert {key: one["metadata"].get("generation") for key, one in live(api).items()} == before


def test_two_releases_side_by_side(any_helm: Helm, api: ApiServer) -> None:
    """In one namespace, without a name or a key in common."""
    for name in ("one", "two"):
        act(any_helm, api, "install", name, CHART, "-f", SEED)
    keys = {
        api.store.get(Key("v1", "secrets", "default", f"{name}-kvmesh"))["data"]["cluster-key"]
        for name in ("one", "two")
    }
    assert len(keys) == 2
    act(any_helm, api, "uninstall", "one")
    assert all(name.startswith("two-") for _, name in live(api))


def test_a_broken_upgrade_leaves_everything(any_helm: Helm, api: ApiServer) -> None:
    act(any_helm, api, "install", "vllm", CHART, "-f", SEED)
    before = specs(api)
    values = ("-f", SEED, "--set", "lookupserverSpec.replicaCount=2")
    result = any_helm.run("upgrade", "vllm", CHART, *values, kubeconfig=api.kubeconfig())
    assert result.code != 0
    assert "several Redis servers that know nothing of each other" in result.err
    assert specs(api) == before


def test_kubectl_reads_what_helm_wrote(any_helm: Helm, api: ApiServer) -> None:
    """The tutorial's command, against the little API server."""
    act(any_helm, api, "install", "vllm", CHART, "-f", SEED)
    command = [str(find_tool("kubectl")), "--kubeconfig", str(api.kubeconfig()), "get", "deployments", "-o", "name"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert "deployment.apps/vllm-mistral-1-deployment-vllm" in done.stdout


def test_the_account_of_the_router_may_watch_pods_and_nothing_else(any_helm: Helm, api: ApiServer) -> None:
    act(any_helm, api, "install", "vllm", CHART, "-f", SEED)
    token = api.account_token("default", "vllm-router-service-account")
    kubectl = [str(find_tool("kubectl")), "--server", api.url, "--certificate-authority", str(api.ca_file)]
    kubectl += ["--token", token, "--kubeconfig", "/dev/null", "get"]

    def get(what: str) -> int:
        return subprocess.run([*kubectl, what], capture_output=True, check=False, timeout=60).returncode

    assert get("pods") == 0
    assert get("secrets") != 0
    assert get("deployments") != 0
