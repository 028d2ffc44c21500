"""A cluster on this machine: the API server, and what makes pods of Deployments and addresses of Services.

It rolls Deployments out as their strategy says (which pods may be missing, how many may be too many), and hands every
pod's name resolution the services that there are when it starts.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from support.kube.api import ApiServer
from support.kube.network import Forwarder, PodNetwork
from support.kube.pods import Image, Pod, Surroundings
from support.kube.store import Key, Object, Store

NAMESPACE = "default"
HASH_LABEL = "pod-template-hash"


@contextlib.contextmanager
def running_cluster(
    folder: Path, images: Mapping[str, Image], claims: Mapping[str, Path] | None = None
) -> Iterator[Cluster]:
    """Everything, ended with the block."""
    with PodNetwork() as network, ApiServer(folder, network.host) as api:
        cluster = Cluster(folder, api, network, images, claims or {})
        try:
            yield cluster
        finally:
            cluster.close()


class Cluster:
    """See the module. One thread looks at what should be, and makes it so."""

    def __init__(
        self, folder: Path, api: ApiServer, network: PodNetwork, images: Mapping[str, Image], claims: Mapping[str, Path]
    ) -> None:
        self.api = api
        self.store: Store = api.store
        self.network = network
        self.pods: dict[str, Pod] = {}
        self.gone: list[Pod] = []
        """Pods that have ended, for their logs."""
        self.most_pods: dict[str, int] = {}
        """The most pods that each Deployment ever had at once."""
        self._accounts: dict[str, Path] = {}
        self._folder = folder
        env = {"KUBERNETES_SERVICE_HOST": api.host, "KUBERNETES_SERVICE_PORT": str(api.port)}
        self._around = Surroundings(
            self.store, network, folder / "pods", images, claims, self._accounts, {**env, "KUBERNETES_PORT": api.url}
        )
        self._forwarders: dict[str, list[Forwarder]] = {}
        self._addresses: dict[str, str] = {}
        self._count = 0
        self._problem: Exception | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="cluster")
        self._thread.start()

    def close(self) -> None:
        self._stopping.set()
        self._thread.join()
        for pod in self.pods.values():
            pod._kill_all()
            pod.end()
        for pod in self.pods.values():
            pod.join()
        for forwarder in [one for listed in self._forwarders.values() for one in listed]:
            forwarder.close()

    def of(self, component: str) -> list[Pod]:
        """The pods of one part of the stack."""
        label = "app.kubernetes.io/component"
        return [pod for pod in self.pods.values() if pod.object["metadata"]["labels"].get(label) == component]

    def service_url(self, name: str) -> str:
        """Where a service can be reached from this machine."""
        spec = self.store.get(Key("v1", "services", NAMESPACE, name))["spec"]
        return f"http://{self._addresses[name]}:{spec['ports'][0]['port']}"

    def behind(self, address: str, port: int) -> tuple[Pod | None, int]:
        """The pod that a connection to this address reaches, and the port there; None: no pod."""
        for pod in self.pods.values():
            if pod.address == address:
                return pod, port
        for name, at in self._addresses.items():
            if at == address:
                spec = self.store.get(Key("v1", "services", NAMESPACE, name))["spec"]
                target = next(one["targetPort"] for one in spec["ports"] if one["port"] == port)
                for pod in self.endpoints(spec):
                    return pod, port_of(pod, target)
        return None, port

    def wait(self, what: str, condition: Callable[[], bool], timeout_s: float) -> None:
        """Wait until `condition`; AssertionError with the ends of all logs otherwise."""
        until_s = time.monotonic() + timeout_s
        while not condition():
            if self._problem is not None:
                raise self._problem
            over = [pod for pod in list(self.pods.values()) if pod.is_over and not pod.is_ending]
            failed = [pod for pod in over if not _is_job(pod.object)]
            assert not failed, f"{failed[0].name} has ended\n{self.logs()}"
            assert time.monotonic() < until_s, f"no {what} after {timeout_s} s\n{self.logs()}"
            time.sleep(0.05)

    def wait_ready(self, timeout_s: float) -> None:
        """Wait until all pods that should be there are ready."""
        self.wait("ready pods", self._is_settled, timeout_s)

    def logs(self, lines: int = 40) -> str:
        """The ends of all logs, for failure messages."""
        return "\n".join(
            f"--- {pod.name} {pod.address} {pod.events}\n" + "\n".join(pod.log().splitlines()[-lines:])
            for pod in [*self.gone, *self.pods.values()]
        )

    def _is_settled(self) -> bool:
        wanted = 0
        for plural in ("deployments", "statefulsets"):
            for workload in self.store.list(plural, NAMESPACE):
                wanted += workload["spec"]["replicas"]
                current = _hash(workload)
                mine = self._pods_of(workload)
                fresh = [pod for pod in mine if pod.object["metadata"]["labels"][HASH_LABEL] == current]
                if len(mine) != len(fresh) or len(fresh) != workload["spec"]["replicas"]:
                    return False
        return wanted > 0 and all(pod.ready for pod in self.pods.values() if not _is_job(pod.object))

    # -- the loop ------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopping.wait(0.05):
                self._services()
                workloads = [
                    one for plural in ("deployments", "statefulsets") for one in self.store.list(plural, NAMESPACE)
                ]
                for workload in workloads:
                    self._roll_out(workload)
                self._collect({_id(workload) for workload in workloads})
        except Exception as error:
            self._problem = error

    def _roll_out(self, workload: Object) -> None:
        spec, current = workload["spec"], _hash(workload)
        pods = self._pods_of(workload)
        fresh = [pod for pod in pods if pod.object["metadata"]["labels"][HASH_LABEL] == current]
        old = [pod for pod in pods if pod not in fresh]
        wanted, strategy = spec["replicas"], spec.get("strategy", {})
        rolling = strategy.get("rollingUpdate") or {}
        surge = (
            0 if strategy.get("type") == "Recreate" or workload["kind"] == "StatefulSet" else rolling.get("maxSurge", 1)
        )
        missing = wanted if strategy.get("type") == "Recreate" else rolling.get("maxUnavailable", 1)
        ending = {pod.name for pod in pods if pod.is_ending}
        # Pods that are ending still have their GPU, so they count.
        if len(fresh) < wanted and len(pods) < wanted + surge:
            self._start(workload, current)
        ready = sum(pod.ready and pod.name not in ending for pod in pods)
        for pod in old:
            if pod.name not in ending and (not pod.ready or ready > wanted - missing):
                ready -= pod.ready
                pod.end()
        for pod in fresh[wanted:]:
            pod.end()
        name = workload["metadata"]["name"]
        self.most_pods[name] = max(self.most_pods.get(name, 0), len(self._pods_of(workload)))
        self._tell(workload, len(fresh), sum(pod.ready for pod in fresh))

    def _start(self, workload: Object, current: str) -> None:
        template = json.loads(json.dumps(workload["spec"]["template"]))
        self._count += 1
        name = f"{workload['metadata']['name']}-{current}-{self._count}"
        labels = {**template["metadata"].get("labels", {}), HASH_LABEL: current}
        owner = [{"apiVersion": workload["apiVersion"], "kind": workload["kind"], "name": workload["metadata"]["name"]}]
        metadata = {**template["metadata"], "name": name, "labels": labels}
        metadata["ownerReferences"] = [{**owner[0], "uid": workload["metadata"]["uid"], "controller": True}]
        self.store.create(
            Key("v1", "pods", NAMESPACE, name),
            {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]},
        )
        self._adopt(name)

    def _adopt(self, name: str) -> None:
        found = self.store.get(Key("v1", "pods", NAMESPACE, name))
        if found["spec"].get("automountServiceAccountToken", True):
            self._make_account(found["spec"].get("serviceAccountName", "default"))
        pod = Pod(found, self._around)
        self.pods[name] = pod
        self._write_hosts()
        pod.start()

    def _collect(self, workloads: set[str]) -> None:
        """End what nobody wants any more, take away what has ended, start what somebody has made by hand."""
        there = {one["metadata"]["name"]: one for one in self.store.list("pods", NAMESPACE)}
        for name, pod in list(self.pods.items()):
            owner = pod.object["metadata"].get("ownerReferences")
            if name not in there or (owner and owner[0]["uid"] not in workloads):
                pod.end()
            if pod.is_over and (owner or name not in there):
                del self.pods[name]
                self.gone.append(pod)
                self.network.remove(pod.space)
                with contextlib.suppress(Exception):
                    self.store.delete(Key("v1", "pods", NAMESPACE, name))
                self._write_hosts()
        for name, found in there.items():
            if name not in self.pods and not found["metadata"].get("ownerReferences"):
                self._adopt(name)

    def _tell(self, workload: Object, count: int, ready: int) -> None:
        metadata = workload["metadata"]
        plural = "statefulsets" if workload["kind"] == "StatefulSet" else "deployments"
        status = {"observedGeneration": metadata["generation"], "replicas": count, "updatedReplicas": count}
        status |= {"readyReplicas": ready, "availableReplicas": ready}
        status["conditions"] = [
            {"type": "Available", "status": "True" if ready >= workload["spec"]["replicas"] else "False"}
        ]
        if workload.get("status") != status:
            with contextlib.suppress(Exception):  # deleted meanwhile
                key = Key("apps/v1", plural, NAMESPACE, metadata["name"])
                self.store.change(key, lambda found: {**found, "status": status})

    def _pods_of(self, workload: Object) -> list[Pod]:
        uid = workload["metadata"]["uid"]
        return [
            pod
            for pod in self.pods.values()
            if any(owner["uid"] == uid for owner in pod.object["metadata"].get("ownerReferences", ()))
        ]

    # -- services and names --------------------------------------------------------------------------------------------

    def _services(self) -> None:
        there = {one["metadata"]["name"]: one["spec"] for one in self.store.list("services", NAMESPACE)}
        if there.keys() == self._forwarders.keys():
            return
        for name in self._forwarders.keys() - there.keys():
            for forwarder in self._forwarders.pop(name):
                forwarder.close()
        for name in there.keys() - self._forwarders.keys():
            spec, listed = there[name], []
            if spec.get("clusterIP") != "None":
                self._addresses.setdefault(name, self.network.add_service_address())
                for port in spec["ports"]:
                    targets = _Targets(self, spec, port["targetPort"])
                    listed.append(Forwarder(self._addresses[name], port["port"], targets))
            self._forwarders[name] = listed
        self._write_hosts()

    def _write_hosts(self) -> None:
        names = [(self._addresses[name], name) for name, listed in self._forwarders.items() if listed]
        for service in self.store.list("services", NAMESPACE):
            if service["spec"].get("clusterIP") == "None":
                names += [(pod.address, service["metadata"]["name"]) for pod in self.endpoints(service["spec"])]
        for pod in self.pods.values():
            self.network.write_hosts(pod.space, names)

    def endpoints(self, spec: Object) -> list[Pod]:
        """The pods behind a service."""
        wanted = spec["selector"].items()
        return [
            pod
            for pod in list(self.pods.values())
            if wanted <= pod.object["metadata"]["labels"].items()
            and (pod.ready or spec.get("publishNotReadyAddresses") or spec.get("clusterIP") == "None")
        ]

    def _make_account(self, name: str) -> None:
        if name in self._accounts:
            return
        folder = self._folder / "accounts" / name
        folder.mkdir(parents=True)
        (folder / "token").write_text(self.api.account_token(NAMESPACE, name))
        (folder / "ca.crt").write_bytes(self.api.ca_file.read_bytes())
        (folder / "namespace").write_text(NAMESPACE)
        self._accounts[name] = folder


class _Targets:
    """The addresses behind one port of a service, as they are now."""

    def __init__(self, cluster: Cluster, spec: Object, target: str | int) -> None:
        self._cluster, self._spec, self._target = cluster, spec, target

    def __call__(self) -> Sequence[tuple[str, int]]:
        return [(pod.address, port_of(pod, self._target)) for pod in self._cluster.endpoints(self._spec)]


def port_of(pod: Pod, target: str | int) -> int:
    """The number of a container's port, which services may call by name."""
    if isinstance(target, int):
        return target
    ports = [port for container in pod.object["spec"]["containers"] for port in container.get("ports", ())]
    return next(int(port["containerPort"]) for port in ports if port.get("name") == target)


def _hash(workload: Object) -> str:
    return hashlib.sha256(json.dumps(workload["spec"]["template"], sort_keys=True).encode()).hexdigest()[:8]


def _id(workload: Object) -> str:
    return str(workload["metadata"]["uid"])


def _is_job(pod: Object) -> bool:
    return bool(pod["spec"].get("restartPolicy") == "Never")
