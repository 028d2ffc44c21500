"""What the chart makes of values: valid objects, the promises of the tutorial, and parts that fit together."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from kvmesh.config import load_config
from support.helm import ALL_EXAMPLES, CHART, EXAMPLES, ROOT, SEED, Helm, Manifest, Result, find_tool

KUBERNETES = ("1.28", "1.31", "1.34", "1.37")
CONTROLLER = EXAMPLES / "values-controller.yaml"
FULL = EXAMPLES / "values-full.yaml"
NEED_CRDS = {"ServiceMonitor", "PrometheusRule"}
WORKLOADS = {"Deployment", "StatefulSet"}
KEY = "0123456789abcdef0123456789abcdef"


@pytest.fixture(scope="module")
def seed(any_helm: Helm) -> Result:
    """The tutorial's values file, as it stands."""
    return any_helm.render(SEED)


@pytest.fixture(scope="module")
def full(any_helm: Helm) -> Result:
    return any_helm.render(FULL)


def containers(manifest: Manifest) -> list[Manifest]:
    pod = manifest["spec"] if manifest["kind"] == "Pod" else manifest["spec"]["template"]["spec"]
    return [*pod.get("initContainers", ()), *pod["containers"]]


def variables(container: Manifest) -> dict[str, Any]:
    return {one["name"]: one.get("value", one.get("valueFrom")) for one in container.get("env", ())}


def engine(result: Result, name: str = "mistral-1") -> Manifest:
    manifest = next(
        one for one in result.manifests if one["kind"] in WORKLOADS and one["metadata"]["labels"].get("model") == name
    )
    return next(one for one in containers(manifest) if one["name"] == "vllm")


@pytest.mark.parametrize("values", ALL_EXAMPLES, ids=lambda path: path.stem)
def test_lint(helm: Helm, values: Path) -> None:
    """`helm lint --strict` has nothing to say."""
    result = helm.run("lint", "--strict", CHART, "-f", values)
    assert result.code == 0, result.out + result.err
    assert "[WARNING]" not in result.out


@pytest.mark.parametrize("values", ALL_EXAMPLES, ids=lambda path: path.stem)
def test_both_helms_render_the_same(tmp_path: Path, values: Path) -> None:
    """What Helm 3 and Helm 4 make differs only in the random key."""
    rendered = [Helm(find_tool(name), tmp_path).render(values).manifests for name in ("helm3", "helm4")]
    for manifests in rendered:
        for one in manifests:
            if one["kind"] == "Secret":
                one["data"] = sorted(one["data"])
    first, second = (sorted(map(json.dumps, manifests)) for manifests in rendered)
    assert first == second


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("values", ALL_EXAMPLES, ids=lambda path: path.stem)
def test_manifests_are_valid(any_helm: Helm, schemas: ModuleType, values: Path, version: str) -> None:
    """Every object has the form that this version of Kubernetes wants, and no field that it does not know."""
    checked = 0
    for manifest in any_helm.render(values).manifests:
        if manifest["kind"] not in NEED_CRDS:
            schemas.validate(manifest, version, strict=True)
            checked += 1
    assert checked > 10


def test_empty_values_render_too(any_helm: Helm) -> None:
    """Without any model there is a router and a controller, and no engine."""
    kinds = {one["metadata"]["name"] for one in any_helm.render().manifests if one["kind"] in WORKLOADS}
    assert kinds == {"vllm-deployment-router", "vllm-deployment-controller"}


class TestSeed:
    """The tutorial's values file, without a change."""

    def test_it_is_the_one_that_the_tutorial_shows(self) -> None:
        blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "kubernetes.md").read_text(), re.DOTALL)
        assert SEED.read_text().strip() in [block.strip() for block in blocks]

    def test_names_that_users_know(self, seed: Result) -> None:
        names = {(one["kind"], one["metadata"]["name"]) for one in seed.manifests}
        assert {
            ("Deployment", "vllm-mistral-1-deployment-vllm"),
            ("Deployment", "vllm-mistral-2-deployment-vllm"),
            ("Service", "vllm-mistral-1-engine-service"),
            ("Deployment", "vllm-deployment-lookup-server"),
            ("Service", "vllm-lookup-server-service"),
            ("Deployment", "vllm-deployment-router"),
            ("Service", "vllm-router-service"),
        } <= names

    def test_sharing_is_really_on(self, seed: Result, tmp_path: Path) -> None:
        """The variables and the file that an engine gets are a configuration that shares by Redis."""
        config_map = seed.find("ConfigMap", "vllm-mistral-2-kvmesh-config")
        (tmp_path / "kvmesh.yaml").write_text(config_map["data"]["kvmesh.yaml"])
        env = {name: value for name, value in variables(engine(seed, "mistral-2")).items() if isinstance(value, str)}
        env = {
            name: value.replace("$(POD_IP)", "10.1.2.3").replace("$(POD_NAME)", "pod-1") for name, value in env.items()
        }
        env |= {"KVMESH_CONFIG_FILE": str(tmp_path / "kvmesh.yaml"), "KVMESH_CLUSTER_KEY": KEY}
        config = load_config(environ={name: value for name, value in env.items() if name.startswith("KVMESH_")})
        assert config.directory == "redis"
        assert (config.share, config.fetches, config.insecure) == (True, True, False)
        assert "vllm-lookup-server-service:8100" in str(config.lookup_url)
        assert (config.host, config.advertise_host, config.peer_port) == ("10.1.2.3", "10.1.2.3", 8201)
        assert (config.instance_id, config.pool_size_gb) == ("pod-1", 20)
        assert not config.warnings

    def test_a_pod_that_goes_asks_its_own_node_to_hand_over(self, seed: Result) -> None:
        """There is no controller that could; the node's address is that of the pod, on the port that it listens on."""
        one = engine(seed, "mistral-2")
        script = one["lifecycle"]["preStop"]["exec"]["command"][2]
        (port,) = (port["containerPort"] for port in one["ports"] if port["name"] == "node-admin")
        assert f'ops drain "$POD_NAME" --yes --within 20s --node "http://$node:{port}"' in script
        assert "--controller" not in script

    def test_vllm_gets_its_flags(self, seed: Result) -> None:
        arguments = engine(seed)["args"]
        assert arguments[:2] == ["serve", "mistralai/Mistral-7B-Instruct-v0.2"]
        assert {"--no-enable-chunked-prefill", "--no-enable-prefix-caching"} <= set(arguments)
        assert arguments[arguments.index("--max-model-len") + 1] == "16384"
        transfer = json.loads(arguments[arguments.index("--kv-transfer-config") + 1])
        assert transfer == {"kv_connector": "KVMeshConnector", "kv_role": "kv_both"}

    def test_kvmesh_comes_into_an_image_that_has_none(self, seed: Result) -> None:
        pod = seed.find("Deployment", "vllm-mistral-1-deployment-vllm")["spec"]["template"]["spec"]
        assert [one["name"] for one in pod["initContainers"]] == ["kvmesh"]
        assert engine(seed)["image"] == "lmcache/vllm-openai:latest"
        assert "PYTHONPATH" in engine(seed)["command"][2]

    def test_resources(self, seed: Result) -> None:
        resources = engine(seed)["resources"]
        assert resources["requests"] == {"cpu": "10", "memory": "40Gi", "nvidia.com/gpu": "1"}
        assert resources["limits"] == {"nvidia.com/gpu": "1"}
        pod = seed.find("Deployment", "vllm-mistral-1-deployment-vllm")["spec"]["template"]["spec"]
        (shm,) = (one["emptyDir"] for one in pod["volumes"] if one["name"] == "shm")
        assert shm == {"medium": "Memory", "sizeLimit": f"{24 * 1024}Mi"}

    def test_the_placeholder_is_no_token(self, seed: Result) -> None:
        """`<YOUR HF TOKEN>` is said to be one, and not sent to anybody."""
        assert "HF_TOKEN" not in variables(engine(seed))
        assert not any(one["metadata"]["name"] == "vllm-secrets" for one in seed.manifests)

    def test_two_replicas_do_not_share_one_volume(self, seed: Result) -> None:
        pod = seed.find("Deployment", "vllm-mistral-1-deployment-vllm")["spec"]["template"]["spec"]
        (storage,) = (one for one in pod["volumes"] if one["name"] == "storage")
        assert storage["ephemeral"]["volumeClaimTemplate"]["spec"]["resources"]["requests"] == {"storage": "50Gi"}

    def test_redis_listens_where_the_service_sends(self, seed: Result) -> None:
        (redis,) = containers(seed.find("Deployment", "vllm-deployment-lookup-server"))
        assert redis["image"] == "redis:latest"
        assert redis["args"][redis["args"].index("--port") + 1] == "8080"
        assert redis["args"][redis["args"].index("--maxmemory") + 1] == "7628mb"  # 80 % of 10G
        assert redis["ports"] == [{"name": "redis", "containerPort": 8080}]
        service = seed.find("Service", "vllm-lookup-server-service")
        assert service["spec"]["ports"] == [{"name": "redis", "port": 8100, "targetPort": "redis"}]
        labels = seed.find("Deployment", "vllm-deployment-lookup-server")["spec"]["template"]["metadata"]["labels"]
        assert labels["environment"] == labels["release"] == "lookupserver"
        assert all("redis-cli" in redis[probe]["exec"]["command"][2] for probe in ("readinessProbe", "livenessProbe"))

    def test_no_password_in_the_open(self, seed: Result) -> None:
        """Secrets' values stand in Secrets only."""
        secrets = [one for one in seed.manifests if one["kind"] == "Secret"]
        others = json.dumps([one for one in seed.manifests if one["kind"] != "Secret"])
        for value in [value for secret in secrets for value in secret["data"].values()]:
            assert value not in others


class TestController:
    """The first tutorial's way: a controller instead of Redis."""

    def test_nodes_are_configured_for_it(self, any_helm: Helm, tmp_path: Path) -> None:
        result = any_helm.render(CONTROLLER)
        path = tmp_path / "kvmesh.yaml"
        path.write_text(result.find("ConfigMap", "vllm-llama-kvmesh-config")["data"]["kvmesh.yaml"])
        environ = {"KVMESH_HOST": "10.0.0.1", "KVMESH_CLUSTER_KEY": KEY, "KVMESH_INSTANCE_ID": "pod"}
        config = load_config(path=path, environ=environ)
        assert config.directory == "controller"
        service = result.find("Service", "vllm-controller-service")
        ports = {one["name"]: one["port"] for one in service["spec"]["ports"]}
        assert config.controller_pull_url == f"tcp://vllm-controller-service:{ports['pull']}"
        assert config.controller_reply_url == f"tcp://vllm-controller-service:{ports['reply']}"
        assert config.controller_heartbeat_url == f"tcp://vllm-controller-service:{ports['heartbeat']}"
        assert (config.peer_port, config.admin_port, config.pool_size_gb) == (8200, 8500, 100)
        assert not config.warnings
        assert not any("lookup" in one["metadata"]["name"] for one in result.manifests)

    def test_the_controller_gets_its_flags(self, any_helm: Helm) -> None:
        (controller,) = containers(any_helm.render(CONTROLLER).find("Deployment", "vllm-deployment-controller"))
        arguments = controller["args"]
        monitor = json.loads(arguments[arguments.index("--monitor-ports") + 1])
        assert monitor == {"pull": 8300, "reply": 8400, "heartbeat": 8082}
        assert "secretKeyRef" in variables(controller)["KVMESH_CLUSTER_KEY"]

    def test_an_image_with_kvmesh_needs_no_init_container(self, any_helm: Helm) -> None:
        manifest = any_helm.render(CONTROLLER).find("Deployment", "vllm-llama-deployment-vllm")
        assert "initContainers" not in manifest["spec"]["template"]["spec"]


class TestFull:
    """Everything at once."""

    def test_selectors_name_the_release_and_the_component(self, full: Result) -> None:
        """Two releases in one namespace never mix, and no two workloads have the same pods."""
        seen = set()
        for manifest in full.manifests:
            if manifest["kind"] in WORKLOADS:
                wanted = manifest["spec"]["selector"]["matchLabels"]
                assert wanted["app.kubernetes.io/instance"] == "vllm"
                assert wanted.items() <= manifest["spec"]["template"]["metadata"]["labels"].items()
                seen.add(tuple(sorted(wanted.items())))
            if manifest["kind"] == "Service":
                assert manifest["spec"]["selector"]["app.kubernetes.io/instance"] == "vllm"
        assert len(seen) == 5

    def test_every_service_finds_its_port(self, full: Result) -> None:
        pods = [one["spec"]["template"] for one in full.manifests if one["kind"] in WORKLOADS]
        for service in (one for one in full.manifests if one["kind"] == "Service"):
            wanted = service["spec"]["selector"].items()
            (pod,) = (one for one in pods if wanted <= one["metadata"]["labels"].items())
            names = {port["name"] for container in pod["spec"]["containers"] for port in container["ports"]}
            assert {port["targetPort"] for port in service["spec"]["ports"]} <= names

    def test_what_is_switched_off_makes_nothing(self, full: Result) -> None:
        assert "switched-off" not in full.out

    def test_an_engine_without_kvmesh_stays_plain(self, full: Result) -> None:
        plain = engine(full, "plain")
        assert "--kv-transfer-config" not in plain["args"]
        assert not any(name.startswith("KVMESH_") for name in variables(plain))

    def test_a_rollout_takes_no_second_set_of_gpus(self, full: Result) -> None:
        strategy = full.find("Deployment", "vllm-batch-deployment-vllm")["spec"]["strategy"]
        assert strategy == {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}}

    def test_all_our_own_pods_are_locked_down(self, full: Result) -> None:
        for name in ("vllm-deployment-router", "vllm-deployment-controller"):
            pod = full.find("Deployment", name)["spec"]["template"]["spec"]
            assert pod["securityContext"]["runAsNonRoot"] is True
            for container in pod["containers"]:
                security = container["securityContext"]
                assert security["readOnlyRootFilesystem"] is True
                assert security["allowPrivilegeEscalation"] is False
                assert security["capabilities"] == {"drop": ["ALL"]}

    def test_every_container_has_probes_and_limits(self, full: Result) -> None:
        for manifest in (one for one in full.manifests if one["kind"] in WORKLOADS):
            for container in manifest["spec"]["template"]["spec"]["containers"]:
                assert {"startupProbe", "readinessProbe", "livenessProbe"} <= container.keys()
                assert "limits" in container["resources"]

    def test_only_the_router_talks_to_the_api_server(self, full: Result) -> None:
        for manifest in (one for one in full.manifests if one["kind"] in WORKLOADS):
            allowed = manifest["spec"]["template"]["spec"]["automountServiceAccountToken"]
            assert allowed == (manifest["metadata"]["name"] == "vllm-deployment-router")
        (rule,) = full.find("Role", "vllm-router")["rules"]
        assert rule == {"apiGroups": [""], "resources": ["pods"], "verbs": ["list", "watch"]}

    def test_further_keys_reach_the_configuration(self, full: Result) -> None:
        config = yaml.safe_load(full.find("ConfigMap", "vllm-llama-kvmesh-config")["data"]["kvmesh.yaml"])
        assert (config["cache_policy"], config["save_decode_cache"], config["fetch_connections"]) == ("arc", True, 4)
        assert (config["transfer_channel"], config["log_level"]) == ("nixl", "info")

    def test_a_digest_counts_more_than_a_tag(self, full: Result) -> None:
        (controller,) = containers(full.find("Deployment", "vllm-deployment-controller"))
        assert controller["image"] == "kvmesh/kvmesh@sha256:" + "0" * 64

    def test_the_dashboard_is_json(self, full: Result) -> None:
        dashboard = json.loads(full.find("ConfigMap", "vllm-kvmesh-dashboard")["data"]["kvmesh-stack.json"])
        assert dashboard["panels"]


def test_a_change_of_configuration_replaces_the_pods(any_helm: Helm) -> None:
    """Pods read their file once, so another file must mean other pods."""

    def checksum(chunk_tokens: int) -> str:
        result = any_helm.render(CONTROLLER, sets=[f"kvmeshSpec.chunkTokens={chunk_tokens}"])
        template = result.find("Deployment", "vllm-llama-deployment-vllm")["spec"]["template"]
        return str(template["metadata"]["annotations"]["checksum/kvmesh"])

    assert checksum(256) != checksum(512)


@pytest.mark.parametrize("name", ["prefixaware", "kvaware", "session", "leastload"])
def test_policies_by_their_names_there_and_here(any_helm: Helm, name: str) -> None:
    result = any_helm.render(CONTROLLER, sets=[f"routerSpec.routingLogic={name}", "routerSpec.sessionKey=x-user-id"])
    (router,) = containers(result.find("Deployment", "vllm-deployment-router"))
    ours = {"prefixaware": "prefix", "kvaware": "kv"}.get(name, name)
    assert router["args"][router["args"].index("--policy") + 1] == ours
    assert ("--controller-url" in router["args"]) == (ours == "kv")
    assert router["args"][router["args"].index("--session-header") + 1] == "x-user-id"


def test_large_numbers_stay_numbers(any_helm: Helm) -> None:
    """Helm reads numbers as floats; nobody may get 1e+06."""
    model = {"name": "m", "repository": "r", "tag": 1, "modelURL": "m", "vllmConfig": {"maxModelLen": 1048576}}
    result = any_helm.render(overlay={"servingEngineSpec": {"modelSpec": [model]}})
    arguments = engine(result, "m")["args"]
    assert arguments[arguments.index("--max-model-len") + 1] == "1048576"


def test_secrets_of_ones_own(any_helm: Helm) -> None:
    """A token and a key that lie in Secrets already are only referred to."""
    result = any_helm.render(CONTROLLER, sets=["kvmeshSpec.clusterKey.existingSecret=mine"])
    env = variables(engine(result, "llama"))
    assert env["KVMESH_CLUSTER_KEY"] == {"secretKeyRef": {"name": "mine", "key": "cluster-key"}}
    assert env["HF_TOKEN"] == {"secretKeyRef": {"name": "hf-token", "key": "token"}}
    assert not any(one["kind"] == "Secret" for one in result.manifests)


def test_redis_of_ones_own(any_helm: Helm) -> None:
    sets = ["lookupserverSpec.externalUrlSecret.secretName=r", "lookupserverSpec.externalUrlSecret.secretKey=url"]
    result = any_helm.render(CONTROLLER, sets=sets)
    assert variables(engine(result, "llama"))["KVMESH_LOOKUP_URL"] == {"secretKeyRef": {"name": "r", "key": "url"}}
    assert not any("lookup-server" in one["metadata"]["name"] for one in result.manifests)


def test_zero_engines_are_zero(any_helm: Helm) -> None:
    """Scaled to nothing, not to the default."""
    result = any_helm.render(CONTROLLER, sets=["servingEngineSpec.modelSpec[0].replicaCount=0"])
    assert result.find("Deployment", "vllm-llama-deployment-vllm")["spec"]["replicas"] == 0
