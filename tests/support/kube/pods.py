"""One pod as processes: volumes, variables, init containers, probes, hooks and its end, as a kubelet does it.

Everything comes from the Pod object as it was rendered; only images are stand-ins (`Image`): folders and variables in
place of layers.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.kube.network import PodNetwork
from support.kube.store import Key, MissingError, Object, Store

CONTAINER = Path(__file__).with_name("container.py")
SERVICE_ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
_UNITS = {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "k": 10**3, "M": 10**6, "G": 10**9, "": 1}


@dataclass(frozen=True)
class Image:
    """What stands for an image: variables, folders at their places, and whether its user can be another than root."""

    env: Mapping[str, str] = field(default_factory=dict)
    folders: Mapping[str, Path] = field(default_factory=dict)
    drops_root: bool = False


@dataclass
class Surroundings:
    """What all pods of a cluster share."""

    store: Store
    network: PodNetwork
    folder: Path
    images: Mapping[str, Image]
    claims: Mapping[str, Path]
    """What a persistent volume holds, by the name of the pod's volume."""
    account_folder: Mapping[str, Path]
    """Token, ca.crt and namespace, by the name of the service account."""
    cluster_env: Mapping[str, str]


class Pod:
    """A running pod. `start` returns at once; a thread of its own does the rest and keeps the object's status true."""

    def __init__(self, found: Object, around: Surroundings) -> None:
        self.object = found
        self.name: str = found["metadata"]["name"]
        self.namespace: str = found["metadata"]["namespace"]
        self._around = around
        self._spec: Object = found["spec"]
        self._folder = around.folder / self.name
        self._folder.mkdir(parents=True)
        self.space, self.address = around.network.add_pod()
        self.ready = False
        self.events: list[str] = []
        """What happened, in order: for tests of the life cycle."""
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name=self.name)

    @property
    def log_path(self) -> Path:
        return self._folder / "log"

    def log(self) -> str:
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        """Begin its end, as when somebody has deleted it."""
        self._ending.set()

    def join(self, timeout_s: float | None = None) -> None:
        self._thread.join(timeout_s)

    @property
    def is_over(self) -> bool:
        return self._thread.ident is not None and not self._thread.is_alive()

    @property
    def is_ending(self) -> bool:
        return self._ending.is_set()

    # -- life ----------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        phase = "Failed"
        try:
            phase = self._live()
        except Exception as error:
            self._say(f"the pod failed: {type(error).__name__}: {error}")
        finally:
            self._kill_all()
            self._status(phase, ready=False)

    def _live(self) -> str:
        """Until the end; returns the last phase."""
        self._status("Pending", ready=False)
        volumes = {volume["name"]: self._volume(volume) for volume in self._spec.get("volumes", ())}
        for container in self._spec.get("initContainers", ()):
            process = self._launch(container, volumes)
            while process.poll() is None and not self._ending.is_set():
                time.sleep(0.02)
            if process.poll() != 0:
                self._say(f"init container {container['name']} ended with {process.poll()}")
                return "Failed"
        containers = self._spec["containers"]
        for container in containers:
            self._launch(container, volumes)
        self._status("Running", ready=False)
        states = [_Probes(container) for container in containers]
        while not self._ending.is_set():
            if all(self._processes[one["name"]].poll() is not None for one in containers):
                codes = [self._processes[one["name"]].returncode for one in containers]
                self._say(f"ended with {codes}")
                return "Failed" if any(codes) else "Succeeded"
            for state in states:
                state.look(lambda probe, container=state.container: self._probe(container, probe))
                if state.must_die:
                    self._say(f"container {state.container['name']} failed its {state.must_die} probe")
                    return "Failed"
            ready = all(state.ready for state in states)
            if ready != self.ready:
                self.ready = ready
                self._say("ready" if ready else "not ready")
                self._status("Running", ready=ready)
            self._ending.wait(0.1)
        self._end_in_order(containers)
        return "Succeeded"

    def _end_in_order(self, containers: Sequence[Object]) -> None:
        until_s = time.monotonic() + self._spec.get("terminationGracePeriodSeconds", 30)
        self._status("Running", ready=self.ready, deleting=True)
        for container in containers:
            hook = container.get("lifecycle", {}).get("preStop", {}).get("exec")
            if hook:
                self._say("preStop begins")
                code = self._execute(container, hook["command"], max(0.1, until_s - time.monotonic()))
                self._say(f"preStop ended with {code}")
        self._say("SIGTERM")
        for process in self._processes.values():
            if process.poll() is None:
                _signal(process, signal.SIGTERM)
        while time.monotonic() < until_s and any(one.poll() is None for one in self._processes.values()):
            time.sleep(0.05)
        late = [name for name, process in self._processes.items() if process.poll() is None]
        self._say(f"killed after the grace period: {', '.join(late)}" if late else "ended by itself")

    def _kill_all(self) -> None:
        for process in self._processes.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _say(self, what: str) -> None:
        self.events.append(what)

    def _status(self, phase: str, *, ready: bool, deleting: bool = False) -> None:
        def change(found: Object) -> Object:
            condition = {"type": "Ready", "status": "True" if ready else "False"}
            found["status"] = {"phase": phase, "podIP": self.address, "conditions": [condition]}
            found["status"]["podIPs"] = [{"ip": self.address}]
            found["log_file"] = str(self.log_path)
            names = [container["name"] for container in self._spec["containers"]]
            found["status"]["containerStatuses"] = [{"name": name, "ready": ready} for name in names]
            if deleting:
                found["metadata"]["deletionTimestamp"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            return found

        with contextlib.suppress(MissingError):
            self._around.store.change(Key("v1", "pods", self.namespace, self.name), change)

    # -- what a container gets -----------------------------------------------------------------------------------------

    def _volume(self, volume: Object) -> Object:
        """What to mount for a volume; the place is the container's."""
        folder = self._folder / "volumes" / volume["name"]
        folder.mkdir(parents=True)
        folder.chmod(0o755)
        if "emptyDir" in volume:
            folder.chmod(0o777)
            if volume["emptyDir"].get("medium") == "Memory":
                return {"memory_bytes": _bytes(volume["emptyDir"]["sizeLimit"]), "source": str(folder)}
        elif "configMap" in volume:
            self._write(folder, self._data("configmaps", volume["configMap"]["name"]), volume["configMap"])
        elif "secret" in volume:
            self._write(folder, self._data("secrets", volume["secret"]["secretName"]), volume["secret"])
        elif volume["name"] in self._around.claims:
            return {"source": str(self._around.claims[volume["name"]])}
        return {"source": str(folder)}

    def _write(self, folder: Path, data: Mapping[str, bytes], source: Object) -> None:
        wanted = source.get("items") or [{"key": key, "path": key} for key in data]
        for item in wanted:
            (folder / item["path"]).write_bytes(data[item["key"]])

    def _data(self, plural: str, name: str) -> dict[str, bytes]:
        found = self._around.store.get(Key("v1", plural, self.namespace, name)).get("data") or {}
        return {key: base64.b64decode(value) if plural == "secrets" else value.encode() for key, value in found.items()}

    def _environment(self, container: Object) -> dict[str, str]:
        """The variables, each made of those before it."""
        image = self._image(container)
        env = {"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "HOME": "/", **image.env}
        if self._spec.get("automountServiceAccountToken", True):
            env.update(self._around.cluster_env)
        for variable in container.get("env", ()):
            value = variable.get("value")
            source = variable.get("valueFrom", {})
            if "fieldRef" in source:
                fields = {
                    "status.podIP": self.address,
                    "metadata.name": self.name,
                    "metadata.namespace": self.namespace,
                }
                value = fields[source["fieldRef"]["fieldPath"]]
            elif "secretKeyRef" in source:
                value = self._data("secrets", source["secretKeyRef"]["name"])[source["secretKeyRef"]["key"]].decode()
            env[variable["name"]] = _expand(value or "", env)
        return env

    def _image(self, container: Object) -> Image:
        repository = re.sub(r"(@sha256:.*|:[^/:]*)$", "", container["image"])
        return self._around.images[repository]

    def _command(self, container: Object, command: Sequence[str], volumes: Mapping[str, Object]) -> list[str]:
        image = self._image(container)
        mounts = [{"path": path, "source": str(source)} for path, source in image.folders.items()]
        if self._spec.get("automountServiceAccountToken", True):
            account = self._around.account_folder[self._spec.get("serviceAccountName", "default")]
            mounts.append({"path": SERVICE_ACCOUNT, "source": str(account), "read_only": True})
        mounts += [
            {**volumes[mount["name"]], "path": mount["mountPath"], "read_only": mount.get("readOnly", False)}
            for mount in container.get("volumeMounts", ())
        ]
        security = container.get("securityContext", {})
        root = self._folder / "root"
        root.mkdir(exist_ok=True)
        description = {
            "root": str(root),
            "mounts": mounts,
            "read_only_root": security.get("readOnlyRootFilesystem", False),
            "user": (self._spec.get("securityContext") or {}).get("runAsUser") if image.drops_root else None,
            "command": list(command),
            "env": self._environment(container),
        }
        inside = ["ip", "netns", "exec", self.space, "unshare", "--mount"]
        return [*inside, sys.executable, str(CONTAINER), json.dumps(description)]

    def _launch(self, container: Object, volumes: Mapping[str, Object]) -> subprocess.Popen[bytes]:
        env = self._environment(container)
        words = [*container.get("command", ()), *container.get("args", ())]
        command = self._command(container, [_expand(word, env) for word in words], volumes)
        with self.log_path.open("ab") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        self._processes[container["name"]] = process
        return process

    def _execute(self, container: Object, command: Sequence[str], timeout_s: float) -> int:
        """Run something inside a running container, in its own mounts."""
        pid = self._processes[container["name"]].pid
        enter = ["nsenter", "--target", str(pid), "--mount", "--net", "--root", "--wd"]
        env = [f"{name}={value}" for name, value in self._environment(container).items()]
        try:
            with self.log_path.open("ab") as log:
                done = subprocess.run(
                    [*enter, "env", "-i", *env, *command], stdout=log, stderr=log, timeout=timeout_s, check=False
                )
        except subprocess.TimeoutExpired:
            return 124
        return done.returncode

    def _probe(self, container: Object, probe: Object) -> bool:
        timeout_s = float(probe.get("timeoutSeconds", 1))
        if "exec" in probe:
            return self._execute(container, probe["exec"]["command"], timeout_s) == 0
        check = probe.get("httpGet") or probe["tcpSocket"]
        ports = {port["name"]: port["containerPort"] for port in container.get("ports", ()) if "name" in port}
        port = ports.get(check["port"], check["port"])
        try:
            if "tcpSocket" in probe:
                socket.create_connection((self.address, port), timeout_s).close()
                return True
            with contextlib.closing(http.client.HTTPConnection(self.address, port, timeout=timeout_s)) as connection:
                connection.request("GET", check["path"])
                answer = connection.getresponse()
                answer.read()
                return 200 <= answer.status < 400
        except (OSError, http.client.HTTPException):
            return False


class _Probes:
    """What the probes of one container have said so far."""

    def __init__(self, container: Object) -> None:
        self.container = container
        self._due_s: dict[str, float] = {}
        self._failures: dict[str, int] = {}
        self._started = "startupProbe" not in container
        self.ready = self._started and "readinessProbe" not in container
        self.must_die = ""

    def look(self, probe: Any) -> None:
        names = ("readinessProbe", "livenessProbe") if self._started else ("startupProbe",)
        for name in names:
            settings = self.container.get(name)
            if settings is None or time.monotonic() < self._due_s.get(name, 0):
                continue
            # Tests need not wait for the pauses that spare a real cluster; how often it may fail is kept in seconds.
            pause_s = min(0.5, settings.get("periodSeconds", 10))
            self._due_s[name] = time.monotonic() + pause_s
            good = probe(settings)
            self._failures[name] = 0 if good else self._failures.get(name, 0) + 1
            allowed = settings.get("failureThreshold", 3) * settings.get("periodSeconds", 10) / pause_s
            too_many = self._failures[name] >= allowed
            if name == "startupProbe":
                self._started = good
                self.ready = good and "readinessProbe" not in self.container
                self.must_die = "startup" if too_many else ""
            elif name == "readinessProbe":
                self.ready = good or (self.ready and not too_many)
            else:
                self.must_die = "liveness" if too_many else ""


def _expand(text: str, env: Mapping[str, str]) -> str:
    """`$(NAME)` by its value, where there is one."""
    return re.sub(r"\$\(([A-Za-z_][A-Za-z0-9_]*)\)", lambda match: env.get(match[1], match[0]), text)


def _bytes(quantity: object) -> int:
    match = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", str(quantity))
    assert match is not None
    return int(float(match[1]) * _UNITS[match[2]])


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, number)
