"""Situations for tests of the checks."""

from __future__ import annotations

from pathlib import Path

import msgspec

from kvmesh.client import Departed, Health, Incompatibility, Instance, Instances
from kvmesh.config import KVMeshConfig
from kvmesh.doctor.findings import Finding, Level
from kvmesh.doctor.situation import Cluster, Situation
from support.fake_controller import instance


def make_config(**changed: object) -> KVMeshConfig:
    fields: dict[str, object] = {
        "instance_id": "me",
        "enable_controller": True,
        "controller_pull_url": "tcp://127.0.0.1:8300",
        "controller_reply_url": "tcp://127.0.0.1:8400",
        "pool_size_gb": 1.0,
    }
    return KVMeshConfig(**(fields | changed))


def member(name: str, **changed: object) -> Instance:
    return msgspec.convert(instance(name, **changed), Instance)


def make_cluster(*members: Instance, departed: list[Departed] | None = None, **changed: object) -> Cluster:
    fields: dict[str, object] = {
        "url": "http://127.0.0.1:9000",
        "health": Health("ok", "0.1.0"),
        "members": Instances(list(members), departed or []),
    }
    return Cluster(**(fields | changed))


def make_situation(root: Path = Path("/"), **changed: object) -> Situation:
    fields: dict[str, object] = {"environ": {}, "root": root, "timeout_s": 0.5}
    return Situation(**(fields | changed))


def incompatible(left: str, right: str, *fields: tuple[str, str, str], same_model: bool = True) -> Incompatibility:
    listed = [{"field": name, "ours": ours, "theirs": theirs} for name, ours, theirs in fields]
    shown = {"instance_id": left, "other_instance_id": right, "same_model": same_model, "fields": listed}
    return msgspec.convert(shown, Incompatibility)


def told(findings: list[Finding]) -> list[tuple[str, Level]]:
    """What scripts look at."""
    return [(one.check, one.level) for one in findings]
