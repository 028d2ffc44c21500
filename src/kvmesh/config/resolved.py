"""The configuration as the program uses it: `KVMeshConfig`, the keys and what follows from them.

`load_config` makes the object and checks what does not go together; constructing it directly checks single values only,
which is what tests, benchmarks and a node without a directory need.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

from pydantic import Field, SecretStr, ValidationError, field_serializer

from kvmesh.config.keys import ConfigRow
from kvmesh.config.model import (
    CONTROLLER_URLS,
    ID_MAX_CHARACTERS,
    KEYS,
    PEER_LOCATIONS,
    PORT_KEYS,
    DeclaredKeys,
    Port,
    split_urls,
)
from kvmesh.config.ranks import ports_for_rank
from kvmesh.config.tls import TlsFiles
from kvmesh.config.values import mask_secrets
from kvmesh.core.gate import Objective, Policy
from kvmesh.errors import ConfigError, ConfigProblem

DirectoryKind = Literal["controller", "redis", "static", "none"]

_GIB = 1024**3


class ControllerUrls(NamedTuple):
    """The sockets of one controller."""

    pull: str
    reply: str
    heartbeat: str | None


class KVMeshConfig(DeclaredKeys):
    """The resolved configuration of one instance: engine and node. Immutable; safe to share between threads."""

    # How this object came about
    cluster_key: SecretStr | None = None
    """The text of the cluster key, from `cluster_key_file` or the environment."""
    port_lists: Mapping[str, tuple[Port, ...]] = {}
    """Ports per data-parallel rank, for each port key that was given as a list; the key itself holds the first."""
    data_parallel_rank: int | None = None
    """Set by `for_data_parallel_rank`."""
    warnings: tuple[str, ...] = ()
    """What a person should know but need not stop for. To be logged once, by whoever loaded the configuration."""
    sources: Mapping[str, str] = Field(default={}, repr=False)
    """Where each key's value came from: "file:line", "env NAME", "extra". A key that is missing has its default."""

    @field_serializer("cluster_key", when_used="json")
    def _tell_child_process(self, value: SecretStr | None) -> str | None:
        return None if value is None else value.get_secret_value()

    @property
    def tls(self) -> TlsFiles | None:
        """The files for TLS between peers; None without TLS."""
        if self.tls_cert_file is None or self.tls_key_file is None or self.tls_ca_file is None:
            return None
        return TlsFiles(self.tls_cert_file, self.tls_key_file, self.tls_ca_file)

    @property
    def pool_size_bytes(self) -> int:
        """Size of the host pool in bytes; 0 when it is off."""
        return int(self.pool_size_gb * _GIB) if self.pool_enabled else 0

    @property
    def directory(self) -> DirectoryKind:
        """Which directory tells us who holds what; "none" when sharing is off too."""
        if not self.share:
            return "none"
        if self.enable_controller:
            return "controller"
        if self.lookup_url is not None:
            return "redis"
        return "static" if self.static_peers else "none"

    @property
    def controllers(self) -> list[ControllerUrls]:
        """The controllers to join, all of them."""
        pull, reply, heartbeat = (split_urls(getattr(self, key) or "") for key in CONTROLLER_URLS)
        beats = [*heartbeat, *(None for _ in pull)]
        return [ControllerUrls(*urls) for urls in zip(pull, reply, beats, strict=False)]  # as many: check_combinations

    @property
    def fetches(self) -> bool:
        """Whether this instance pulls from peers. It publishes whenever `share` is on."""
        locations = {location.lower() for location in self.retrieve_locations}
        return self.share and (not locations or not PEER_LOCATIONS.isdisjoint(locations))

    @property
    def gate_policy(self) -> Policy:
        """How the gate between fetching and computing is set."""
        return Policy(Objective(self.fetch_gate), self.fetch_gate_margin)

    def for_data_parallel_rank(self, rank: int, data_parallel_size: int | None = None) -> KVMeshConfig:
        """The configuration of one data-parallel rank, which is an instance of its own.

        The id gets `-dp{rank}` as suffix (one that is to be made up later stays None). A port that was given as a list
        is taken from there by rank; another is offset by the rank, except 0 (any free port).

        Args:
            rank: this engine's data-parallel rank, from 0.
            data_parallel_size: how many ranks there are; 1 changes nothing. None: more than one.

        Raises:
            ConfigError: a list is too short, or ports of two ranks would meet.
        """
        if data_parallel_size == 1 and rank == 0:
            return self
        if self.data_parallel_rank is not None or rank < 0:
            raise ValueError(f"rank {rank} of a configuration that is for rank {self.data_parallel_rank} already")
        ports: dict[str, int | None] = {name: getattr(self, name) for name in PORT_KEYS}
        changed: dict[str, object] = {
            **ports_for_rank(ports, self.port_lists, self.sources, rank),
            "port_lists": {},
            "data_parallel_rank": rank,
        }
        if self.instance_id is not None:
            changed["instance_id"] = name = f"{self.instance_id}-dp{rank}"
            if len(name) > ID_MAX_CHARACTERS:
                expected = f"at most {ID_MAX_CHARACTERS} characters with the suffix of the rank"
                raise ConfigError(
                    [ConfigProblem("instance_id", self.sources.get("instance_id", ""), expected, repr(name))]
                )
        return self.model_copy(update=changed)

    def to_wire(self) -> bytes:
        """The whole object as JSON, for handing it to a child process. Holds secrets: a pipe, never argv or a log."""
        return self.model_dump_json().encode()

    @classmethod
    def from_wire(cls, data: bytes) -> KVMeshConfig:
        """The inverse of `to_wire`. Raises ConfigError on anything else."""
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            problems = [
                ConfigProblem(".".join(map(str, item["loc"])) or "wire form", "wire", "what to_wire made", item["msg"])
                for item in error.errors(include_url=False, include_input=False)
            ]
            raise ConfigError(problems) from None

    def describe(self) -> list[ConfigRow]:
        """Every key with value, source and meaning, in the order of the documentation, passwords masked."""
        return [
            ConfigRow(name, _plain(getattr(self, name)), self.sources.get(name, "default"), info.meaning)
            for name, info in KEYS.items()
        ]


def _plain(value: object) -> str | int | float | bool | list[str] | None:
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, tuple):
        return [mask_secrets(str(item)) for item in value]
    return mask_secrets(str(value))
