"""What all checks look at, gathered once: configuration, environment, and what the controller says."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import NamedTuple

from kvmesh.client import ControllerApi, Health, Incompatibility, Instance, Instances, Refusal
from kvmesh.client.explanations import Summaries, Summary
from kvmesh.config import KVMeshConfig, load_config
from kvmesh.config.sources import CONFIG_FILE_VARIABLES
from kvmesh.errors import ApiRefusedError, ConfigError, ConfigProblem, DirectoryError
from kvmesh.wire.auth import ClusterKey


class Clock(NamedTuple):
    """The controller's clock beside ours; both in seconds since 1970."""

    controller_s: float
    """To the second, as HTTP's Date header has it."""
    before_s: float
    """Ours when the question was sent."""
    after_s: float
    """Ours when the answer had come."""


@dataclass(frozen=True)
class Cluster:
    """A running cluster as its controller describes it at one moment."""

    url: str
    health: Health
    members: Instances
    incompatibilities: list[Incompatibility] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    """Who was turned away in the last minutes."""
    refused_handshakes: int = 0
    """Connections to the control sockets without the right cluster key, since the controller's start."""
    clock: Clock | None = None
    summary: Summary | None = None
    """Why chunks were missed in the last hour; None when this controller does not tell."""

    def member(self, instance_id: str | None) -> Instance | None:
        """The member of this id."""
        return next((one for one in self.members.instances if one.instance_id == instance_id), None)


@dataclass(frozen=True)
class Situation:
    """Everything the checks look at. `None` means: not there, not asked for, or could not be had."""

    environ: Mapping[str, str]
    config: KVMeshConfig | None = None
    """This instance's configuration; None without a file, or when it cannot be used."""
    config_file: Path | None = None
    config_problems: tuple[ConfigProblem, ...] = ()
    cluster: Cluster | None = None
    cluster_error: DirectoryError | None = None
    cluster_key: ClusterKey | None = None
    """That of the configuration, else the one given to this command."""
    timeout_s: float = 3.0
    """Longest wait for one answer of the network."""
    root: Path = Path("/")
    """Where /proc, /sys and /dev are; another folder in tests."""

    @property
    def pool_bytes(self) -> int | None:
        """Size of this instance's host pool; None without a configuration."""
        return None if self.config is None else self.config.pool_size_bytes

    @property
    def running(self) -> Instance | None:
        """This instance as a member, if it runs already."""
        if self.cluster is None or self.config is None or self.config.instance_id is None:
            return None
        return self.cluster.member(self.config.instance_id)


def read_configuration(
    path: Path | None, environ: Mapping[str, str]
) -> tuple[Path | None, KVMeshConfig | None, tuple[ConfigProblem, ...]]:
    """The file that an engine started here would use, what is in it, and what is wrong with it.

    Without a file there is no configuration: defaults alone describe no instance of anybody's.
    """
    named = path or next(
        (Path(environ[name]).expanduser() for name in CONFIG_FILE_VARIABLES if environ.get(name)), None
    )
    if named is None:
        return None, None, ()
    try:
        return named, load_config(path=path, environ=environ), ()
    except ConfigError as error:
        return named, None, error.problems


def look(api: ControllerApi) -> Cluster:
    """Ask the controller everything that the checks need. Raises DirectoryError."""
    before_s = time.time()
    date = api.date()
    after_s = time.time()
    told = _summary(api)
    return Cluster(
        url=api.target.url,
        health=api.health(),
        members=api.get("/api/v1/instances", Instances),
        incompatibilities=api.get("/api/v1/incompatibilities", list[Incompatibility]),
        refusals=api.get_if_known("/api/v1/refusals", list[Refusal]) or [],
        refused_handshakes=_refused_handshakes(api),
        clock=_clock(date, before_s, after_s),
        summary=None if told is None else told.cluster,
    )


def _summary(api: ControllerApi) -> Summaries | None:
    """The controller asks all nodes for it, and waits for stopped ones; the rest must not be lost for that."""
    try:
        return api.get_if_known("/api/v1/explain/summary", Summaries, hours=1)
    except DirectoryError:
        return None


def _clock(date: str | None, before_s: float, after_s: float) -> Clock | None:
    try:
        return None if date is None else Clock(parsedate_to_datetime(date).timestamp(), before_s, after_s)
    except (ValueError, OverflowError):
        return None


def _refused_handshakes(api: ControllerApi) -> int:
    """The sum over the control sockets, from `/metrics`; 0 when it is not told."""
    try:
        text = api.get_raw("/metrics").decode(errors="replace")
    except ApiRefusedError:
        return 0
    total = 0.0
    for line in text.splitlines():
        name, _, value = line.rpartition(" ")
        if name.startswith("kvmesh_controller_refused_handshakes_total"):
            with contextlib.suppress(ValueError):
                total += float(value)
    return int(total) if math.isfinite(total) else 0
