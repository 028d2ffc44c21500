"""Completing names in a shell: the controller is asked, briefly, and never complained about."""

from __future__ import annotations

import contextlib
import os

TIMEOUT_S = 1.0


def complete_instance(incomplete: str) -> list[str]:
    """Ids of members that begin with what has been typed."""
    return [name for name in _instance_ids() if name.startswith(incomplete)]


def _instance_ids() -> list[str]:
    try:
        from kvmesh.cli.shared import DEFAULT_CONTROLLER
        from kvmesh.client import ControllerApi, ControllerTarget, Instances
        from kvmesh.config.sources import CONTROLLER_CA_VARIABLE, CONTROLLER_VARIABLE

        ca = os.environ.get(CONTROLLER_CA_VARIABLE)
        target = ControllerTarget.parse(os.environ.get(CONTROLLER_VARIABLE) or DEFAULT_CONTROLLER)
        with contextlib.closing(ControllerApi(target._replace(ca_file=ca or None), timeout_s=TIMEOUT_S)) as api:
            return [one.instance_id for one in api.get("/api/v1/instances", Instances).instances]
    except Exception:  # whatever it is, a shell in the middle of a line is no place to say it
        return []
