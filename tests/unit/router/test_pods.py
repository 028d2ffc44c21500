"""Which pods are backends, and who they are."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from kvmesh.router.backends import Backend
from kvmesh.router.pods import Pod, PodTable, backend_of

POD: dict[str, Any] = {
    "metadata": {"name": "vllm-0", "uid": "u1", "resourceVersion": "7"},
    "spec": {
        "containers": [
            {"name": "proxy", "ports": [{"name": "admin", "containerPort": 15000}]},
            {"name": "vllm", "ports": [{"name": "http", "containerPort": 8000}]},
        ]
    },
    "status": {
        "phase": "Running",
        "podIP": "10.1.2.3",
        "conditions": [{"type": "Initialized", "status": "True"}, {"type": "Ready", "status": "True"}],
        "containerStatuses": [{"name": "proxy", "restartCount": 5}, {"name": "vllm", "restartCount": 2}],
    },
}


def pod(**changed: dict[str, object]) -> Pod:
    return msgspec.convert({part: {**POD[part], **changed.get(part, {})} for part in POD}, Pod)


@pytest.mark.parametrize("port", ["http", "8000"])
def test_a_ready_pod(port: str) -> None:
    """Its identity counts the restarts of the container that has the port; its name is the instance's."""
    assert backend_of(pod(), port) == Backend("u1/2", "vllm-0", "10.1.2.3", 8000)


def test_a_port_that_no_container_names() -> None:
    """A number is taken as it is; a name that nobody has is no backend."""
    assert backend_of(pod(), "9000") == Backend("u1/7", "vllm-0", "10.1.2.3", 9000)
    assert backend_of(pod(), "grpc") is None


@pytest.mark.parametrize(
    "changed",
    [
        {"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}},
        {"status": {"phase": "Pending"}},
        {"status": {"podIP": ""}},
        {"status": {"conditions": [{"type": "Ready", "status": "False"}]}},
        {"status": {"conditions": None}},
    ],
)
def test_pods_that_get_no_requests(changed: dict[str, dict[str, object]]) -> None:
    """Leaving, not running, without an address, not ready."""
    assert backend_of(pod(**changed), "http") is None


def test_the_table_follows_events() -> None:
    """A pod that stops being ready goes, whatever the event is called; a list replaces everything."""
    table = PodTable("http")
    table.apply("ADDED", pod())
    assert [backend.id for backend in table.backends()] == ["u1/2"]
    table.apply("MODIFIED", pod(status={"conditions": []}))
    assert table.backends() == []
    table.apply("MODIFIED", pod())
    table.apply("ADDED", pod(metadata={"uid": "u0", "name": "vllm-9"}))
    assert [backend.name for backend in table.backends()] == ["vllm-0", "vllm-9"]
    table.apply("DELETED", pod(metadata={"uid": "u0"}))
    table.replace([pod(metadata={"uid": "u5"})])
    assert [backend.id for backend in table.backends()] == ["u5/2"]
