"""`kvmesh ops drain --node`: a node that leaves its cluster by itself."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Final

import msgspec

from kvmesh.cli.operations import parse_duration
from kvmesh.cli.shared import EXIT_NO, print_raw_json
from kvmesh.errors import ConfigError, ConfigProblem

if TYPE_CHECKING:
    from kvmesh.client import ControllerApi

ANSWER_S: Final = 30.0
"""The node answers when it is done, which may be a little late."""


class _Health(msgspec.Struct):
    instance_id: str


class _Drained(msgspec.Struct):
    sharing: str
    handed_over: int
    lost: int
    seconds: float


def drain_node(
    api: ControllerApi, instance: str, hand_over: int | None, within: str, *, leave: bool, as_json: bool
) -> int:
    """Have the node behind `api` drain itself; returns the exit status. Raises KVMeshError."""
    found = api.get("/healthz", _Health).instance_id
    if found != instance:
        raise ConfigError([ConfigProblem("INSTANCE", "argument", f"{found}, the node at {api.target.url}", instance)])
    body: dict[str, object] = {"timeout_s": parse_duration(within, "--within"), "leave": leave}
    body |= {} if hand_over is None else {"hand_over": hand_over}
    raw = api.change("POST", "/api/v1/drain", body)
    drained = api.decode(raw, _Drained)
    if as_json:
        print_raw_json(raw)
    else:
        state = "has left" if leave else "shares nothing any more"
        chunks = f"{drained.handed_over} chunks handed over, {drained.lost} lost"
        sys.stdout.write(f"{instance}: {state}; {chunks}, after {drained.seconds:.1f} s\n")
    return EXIT_NO if drained.lost else 0
