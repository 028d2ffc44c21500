"""Pods as the router sees them: the state behind the watch of `kubernetes.py`. Pure.

A pod is a backend while it runs, is ready and is not being deleted. Its identity is its uid and the number of times
its container was started: a pod that is replaced on the same address, or whose engine has started anew and lost its
cache, is another backend.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from kvmesh.router.backends import Backend


class _Struct(msgspec.Struct, rename="camel"):
    """Kubernetes' names."""


class _Metadata(_Struct):
    name: str = ""
    uid: str = ""
    resource_version: str = ""
    deletion_timestamp: str | None = None


class _Port(_Struct):
    name: str = ""
    container_port: int = 0


class _Container(_Struct):
    name: str = ""
    ports: list[_Port] | None = None


class _Spec(_Struct):
    containers: list[_Container] = []


class _Condition(_Struct):
    type: str = ""
    status: str = ""


class _ContainerStatus(_Struct):
    name: str = ""
    restart_count: int = 0


class _Status(_Struct):
    phase: str = ""
    pod_ip: str = msgspec.field(default="", name="podIP")
    conditions: list[_Condition] | None = None
    container_statuses: list[_ContainerStatus] | None = None


class Pod(_Struct):
    """The part of a pod that is read."""

    metadata: _Metadata = msgspec.field(default_factory=_Metadata)
    spec: _Spec = msgspec.field(default_factory=_Spec)
    status: _Status = msgspec.field(default_factory=_Status)


class _ListMetadata(_Struct):
    resource_version: str = ""
    continue_: str = msgspec.field(default="", name="continue")


class PodList(_Struct):
    """An answer to a list."""

    metadata: _ListMetadata
    items: list[Pod]


class WatchEvent(_Struct):
    """One line of a watch. `object` is a pod, or a Status when `type` is ERROR."""

    type: str
    object: msgspec.Raw


class WatchStatus(_Struct):
    """What an ERROR line holds."""

    code: int = 0
    message: str = ""


def backend_of(pod: Pod, port: str) -> Backend | None:
    """The pod as a backend; None while it must not get requests.

    Args:
        pod: as the API server told.
        port: a number, or the name of a container port.
    """
    status, metadata = pod.status, pod.metadata
    is_ready = any(condition.type == "Ready" and condition.status == "True" for condition in status.conditions or ())
    if status.phase != "Running" or not is_ready or metadata.deletion_timestamp or not status.pod_ip:
        return None
    found = _find_port(pod, port)
    if found is None:
        return None
    container, number = found
    restarts = sum(
        one.restart_count for one in status.container_statuses or () if container is None or one.name == container
    )
    return Backend(id=f"{metadata.uid}/{restarts}", name=metadata.name, host=status.pod_ip, port=number)


def _find_port(pod: Pod, port: str) -> tuple[str | None, int] | None:
    """(container, number) of a port; the container is None when no container names the number."""
    number = int(port) if port.isascii() and port.isdigit() else None
    for container in pod.spec.containers:
        for one in container.ports or ():
            if port == one.name or number == one.container_port:
                return container.name, one.container_port
    return None if number is None else (None, number)


class PodTable:
    """All pods that match the selector, by uid."""

    def __init__(self, port: str) -> None:
        self._port = port
        self._backends: dict[str, Backend] = {}

    def backends(self) -> list[Backend]:
        """Those that may get requests, in the order of their names."""
        return sorted(self._backends.values(), key=lambda backend: (backend.name, backend.id))

    def replace(self, pods: Iterable[Pod]) -> None:
        """A new list: pods that are not in it are gone."""
        self._backends = {}
        for pod in pods:
            self._take(pod)

    def apply(self, kind: str, pod: Pod) -> None:
        """ADDED, MODIFIED or DELETED."""
        if kind == "DELETED":
            self._backends.pop(pod.metadata.uid, None)
        else:
            self._take(pod)

    def _take(self, pod: Pod) -> None:
        backend = backend_of(pod, self._port)
        if backend is None:
            self._backends.pop(pod.metadata.uid, None)
        else:
            self._backends[pod.metadata.uid] = backend
