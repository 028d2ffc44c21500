"""The objects of the little cluster, with versions and watchers. Thread-safe."""

from __future__ import annotations

import copy
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

Object = dict[str, Any]


class Kind(NamedTuple):
    group_version: str
    plural: str
    kind: str
    namespaced: bool = True


KINDS = tuple(
    Kind(*row)
    for row in (
        ("v1", "pods", "Pod"),
        ("v1", "services", "Service"),
        ("v1", "secrets", "Secret"),
        ("v1", "configmaps", "ConfigMap"),
        ("v1", "serviceaccounts", "ServiceAccount"),
        ("v1", "persistentvolumeclaims", "PersistentVolumeClaim"),
        ("v1", "events", "Event"),
        ("v1", "namespaces", "Namespace", False),
        ("apps/v1", "deployments", "Deployment"),
        ("apps/v1", "statefulsets", "StatefulSet"),
        ("apps/v1", "replicasets", "ReplicaSet"),
        ("policy/v1", "poddisruptionbudgets", "PodDisruptionBudget"),
        ("networking.k8s.io/v1", "networkpolicies", "NetworkPolicy"),
        ("networking.k8s.io/v1", "ingresses", "Ingress"),
        ("rbac.authorization.k8s.io/v1", "roles", "Role"),
        ("rbac.authorization.k8s.io/v1", "rolebindings", "RoleBinding"),
        ("monitoring.coreos.com/v1", "servicemonitors", "ServiceMonitor"),
        ("monitoring.coreos.com/v1", "prometheusrules", "PrometheusRule"),
    )
)


class Key(NamedTuple):
    group_version: str
    plural: str
    namespace: str
    name: str


class Event(NamedTuple):
    type: str
    key: Key
    object: Object
    version: int


class ConflictError(Exception):
    """The name is taken."""


class MissingError(Exception):
    """No such object."""


class Store:
    """All objects, newest version only, and the history that watchers ask for."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._objects: dict[Key, Object] = {}
        self._version = 1
        self._history: list[Event] = []
        self._watchers: list[queue.Queue[Event]] = []

    @property
    def version(self) -> int:
        return self._version

    def get(self, key: Key) -> Object:
        with self._lock:
            if key not in self._objects:
                raise MissingError(key.name)
            return copy.deepcopy(self._objects[key])

    def list(self, plural: str, namespace: str = "", group_version: str | None = None) -> list[Object]:
        """Copies of all objects of a kind; of all namespaces when none is named."""
        with self._lock:
            return [
                copy.deepcopy(found)
                for key, found in self._objects.items()
                if key.plural == plural
                and (not namespace or key.namespace == namespace)
                and (group_version is None or key.group_version == group_version)
            ]

    def create(self, key: Key, new: Object) -> Object:
        with self._lock:
            if key in self._objects:
                raise ConflictError(key.name)
            return self._put("ADDED", key, new)

    def change(self, key: Key, change: Callable[[Object], Object]) -> Object:
        """Replace an object by what `change` makes of it."""
        with self._lock:
            before = self.get(key)
            after = change(before)
            for name in ("uid", "creationTimestamp"):
                after["metadata"][name] = self._objects[key]["metadata"][name]
            if {**after, "metadata": {**after["metadata"], "resourceVersion": ""}} == {
                **self._objects[key],
                "metadata": {**self._objects[key]["metadata"], "resourceVersion": ""},
            }:
                return after  # a change of nothing is no news
            return self._put("MODIFIED", key, after)

    def delete(self, key: Key) -> Object:
        with self._lock:
            if key not in self._objects:
                raise MissingError(key.name)
            gone = self._objects.pop(key)
            self._version += 1
            gone["metadata"]["resourceVersion"] = str(self._version)
            self._tell(Event("DELETED", key, gone, self._version))
            return copy.deepcopy(gone)

    def watch(self, since: int | None) -> tuple[queue.Queue[Event], Callable[[], None]]:
        """A queue of events from now on, with those after `since` before them; and what ends it."""
        events: queue.Queue[Event] = queue.Queue()
        with self._lock:
            for event in self._history:
                if since is not None and event.version > since:
                    events.put(event)
            self._watchers.append(events)

        def end() -> None:
            with self._lock:
                self._watchers.remove(events)

        return events, end

    def changes(self, stop: threading.Event, *plurals: str) -> Iterator[Event]:
        """What changes from now on in these kinds, until `stop`."""
        events, end = self.watch(None)
        try:
            while not stop.is_set():
                try:
                    event = events.get(timeout=0.1)
                except queue.Empty:
                    continue
                if event.key.plural in plurals:
                    yield event
        finally:
            end()

    def _put(self, what: str, key: Key, new: Object) -> Object:
        self._version += 1
        new = copy.deepcopy(new)
        metadata = new.setdefault("metadata", {})
        metadata["name"] = key.name
        if key.namespace:
            metadata["namespace"] = key.namespace
        metadata.setdefault("uid", str(uuid.uuid4()))
        metadata.setdefault("creationTimestamp", time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
        metadata["resourceVersion"] = str(self._version)
        if new.get("spec") is not None:
            before = self._objects.get(key)
            generation = before["metadata"].get("generation", 1) if before else 0
            metadata["generation"] = generation + (before is None or before.get("spec") != new["spec"])
        self._objects[key] = new
        self._tell(Event(what, key, copy.deepcopy(new), self._version))
        return copy.deepcopy(new)

    def _tell(self, event: Event) -> None:
        self._history.append(event)
        for watcher in self._watchers:
            watcher.put(event)
