"""The controller's own settings, given as flags of `kvmesh controller`."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import NamedTuple, NoReturn

from pydantic import BaseModel, ConfigDict, Field, SecretStr

from kvmesh.config.cluster_key import find_cluster_key
from kvmesh.config.model import Port
from kvmesh.config.redis_url import parse_redis_url
from kvmesh.config.tls import TlsFiles
from kvmesh.config.values import PORT_MAX, is_loopback, parse_host, show
from kvmesh.errors import ConfigError, ConfigProblem

_FLAG = "--monitor-ports"
_EXAMPLE = '{"pull": 8300, "reply": 8400, "heartbeat": 8082}'
_CLUSTER_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_PORT_NAMES = ("pull", "reply", "heartbeat")


class MonitorPorts(NamedTuple):
    """The controller's ZMQ ports; 0 means any free one. Without a heartbeat port heartbeats come with the events."""

    pull: int
    reply: int
    heartbeat: int | None = None


DEFAULT_MONITOR_PORTS = MonitorPorts(pull=8300, reply=8400)


class ControllerConfig(BaseModel):
    """The resolved settings of one controller. Immutable. Made by `make_controller_config`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = "localhost"
    """Address that the page and all ZMQ sockets bind."""
    port: Port = 9000
    """HTTP: API, metrics, page. 0: any free port."""
    pull_port: Port = DEFAULT_MONITOR_PORTS.pull
    reply_port: Port = DEFAULT_MONITOR_PORTS.reply
    heartbeat_port: Port | None = DEFAULT_MONITOR_PORTS.heartbeat
    heartbeat_interval_s: float = 2.0
    """What the nodes are expected to keep; they have the same key."""
    instance_timeout_s: float = 7.0
    """An instance not heard of for so long is dropped, with its chunks."""
    lookup_url: str | None = Field(None, repr=False)
    """A Redis whose directory is shown; None: this controller is the directory."""
    cluster_name: str = "default"
    insecure: bool = False
    cluster_key: SecretStr | None = None
    """The text of the cluster key; None: loopback only, or `insecure`."""
    tls_cert_file: str | None = None
    """Certificate (PEM) of the page and the API; None: plain HTTP."""
    tls_key_file: str | None = None
    tls_ca_file: str | None = None
    """The CA of the nodes' certificates, where peers use TLS; None: they do not, or are never asked by this way."""
    warnings: tuple[str, ...] = ()
    """To be logged once by whoever starts the controller."""

    @property
    def peer_tls(self) -> TlsFiles | None:
        """What is shown to nodes that are asked over their peer ports; None where those do without TLS."""
        if self.tls_cert_file is None or self.tls_key_file is None or self.tls_ca_file is None:
            return None
        return TlsFiles(self.tls_cert_file, self.tls_key_file, self.tls_ca_file)


def parse_monitor_ports(text: str) -> MonitorPorts:
    """Read the flag `--monitor-ports '{"pull": 8300, "reply": 8400, "heartbeat": 8082}'`; heartbeat may be left out.

    Raises:
        ConfigError: with every problem found.
    """
    try:
        ports = json.loads(text, object_pairs_hook=_pairs)
    except (ValueError, RecursionError) as error:
        hint = "put the whole value in single quotes and the names in double quotes"
        _refuse([ConfigProblem(_FLAG, "flag", f"JSON such as {_EXAMPLE}", f"{show(text)} ({error})", hint)])
    if not isinstance(ports, dict):
        _refuse([ConfigProblem(_FLAG, "flag", f"a JSON object such as {_EXAMPLE}", show(text))])
    problems = []
    for name, port in ports.items():
        if name not in _PORT_NAMES:
            problems.append(ConfigProblem(f"{_FLAG} {name}", "flag", f"one of {', '.join(_PORT_NAMES)}", show(name)))
        elif not _is_port(port) and not (name == "heartbeat" and port is None):
            expected = f"a port from 0 to {PORT_MAX} (0: any free one)"
            problems.append(ConfigProblem(f"{_FLAG} {name}", "flag", expected, show(port)))
    problems += [
        ConfigProblem(f"{_FLAG} {name}", "flag", "a port", "none", f"as in {_EXAMPLE}")
        for name in ("pull", "reply")
        if name not in ports
    ]
    if problems:
        _refuse(problems)
    return MonitorPorts(ports["pull"], ports["reply"], ports.get("heartbeat"))


def make_controller_config(
    *,
    host: str = "localhost",
    port: int = 9000,
    monitor_ports: MonitorPorts | str = DEFAULT_MONITOR_PORTS,
    heartbeat_interval_s: float = 2.0,
    instance_timeout_s: float | None = None,
    lookup_url: str | None = None,
    cluster_name: str = "default",
    insecure: bool = False,
    cluster_key_file: str | None = None,
    tls_cert_file: str | None = None,
    tls_key_file: str | None = None,
    tls_ca_file: str | None = None,
    environ: Mapping[str, str] | None = None,
) -> ControllerConfig:
    """Check the controller's flags and put them together.

    Args:
        host: address to bind.
        port: HTTP port.
        monitor_ports: parsed, or the text of the flag.
        heartbeat_interval_s: seconds between heartbeats of a node.
        instance_timeout_s: None: three heartbeats and a second.
        lookup_url: a Redis whose directory is to be shown, as in a node's configuration.
        cluster_name: whose part of that Redis.
        insecure: says that binding beyond loopback without a cluster key is meant.
        cluster_key_file: the file with the cluster key.
        tls_cert_file: certificate for HTTP; goes with its key.
        tls_key_file: the certificate's private key.
        tls_ca_file: with `lookup_url`, where peers use TLS: the CA of theirs, and of ours.
        environ: may hold the cluster key, as KVMESH_CLUSTER_KEY. None: the process's environment.

    Raises:
        ConfigError: with every problem found.
    """
    problems: list[ConfigProblem] = []
    ports = DEFAULT_MONITOR_PORTS
    try:
        ports = parse_monitor_ports(monitor_ports) if isinstance(monitor_ports, str) else monitor_ports
    except ConfigError as error:
        problems += error.problems
    try:
        host = parse_host(host)
    except ValueError as error:
        problems.append(ConfigProblem("--host", "flag", "a host name or an IP address", show(host), str(error)))
    try:
        lookup_url = None if lookup_url is None else parse_redis_url(lookup_url)
    except ValueError as error:
        expected = "the address of a Redis, such as redis://host:6379"
        problems.append(ConfigProblem("--lookup-url", "flag", expected, show(lookup_url), str(error)))
    if not _CLUSTER_NAME.fullmatch(cluster_name):
        expected = "letters, digits and . _ -, at most 64"
        problems.append(ConfigProblem("--cluster-name", "flag", expected, show(cluster_name)))
    if not _is_port(port):
        problems.append(ConfigProblem("--port", "flag", f"a port from 0 to {PORT_MAX} (0: any free one)", show(port)))
    problems += _equal_ports({"--port": port, **{f"{_FLAG} {name}": getattr(ports, name) for name in _PORT_NAMES}})
    timeout_s = 3 * heartbeat_interval_s + 1 if instance_timeout_s is None else instance_timeout_s
    if not 0 < heartbeat_interval_s < float("inf"):
        problems.append(
            ConfigProblem("heartbeat_interval_s", "flag", "a number of seconds above 0", show(heartbeat_interval_s))
        )
    elif not 2 * heartbeat_interval_s <= timeout_s < float("inf"):
        expected = f"at least twice heartbeat_interval_s, {2 * heartbeat_interval_s:g}"
        problems.append(ConfigProblem("instance_timeout_s", "flag", expected, show(timeout_s)))
    key = find_cluster_key(
        cluster_key_file,
        os.environ if environ is None else environ,
        name="--cluster-key-file",
        where="flag",
        problems=problems,
    )
    is_exposed = key is None and not is_loopback(host)
    if is_exposed and not insecure and not any(problem.key in {"--host", "--cluster-key-file"} for problem in problems):
        hint = (
            "give --cluster-key-file (kvmesh key new FILE makes one) or KVMESH_CLUSTER_KEY; or bind localhost; or say "
            "--insecure if everybody who reaches this address may use and change the directory"
        )
        expected = "a loopback address, because there is no cluster key"
        problems.append(ConfigProblem("--host", "flag", expected, show(host), hint))
    if (tls_cert_file is None) != (tls_key_file is None):
        given, missing = ("cert", "key") if tls_key_file is None else ("key", "cert")
        problems.append(
            ConfigProblem(f"--tls-{missing}-file", "flag", f"both TLS files, as --tls-{given}-file is there", "one")
        )
    if tls_ca_file is not None and tls_cert_file is None:
        expected = "--tls-cert-file and --tls-key-file of this CA, which nodes ask for"
        problems.append(ConfigProblem("--tls-ca-file", "flag", expected, "none"))
    if tls_ca_file is not None and lookup_url is None:
        hint = "nodes that register with a controller prove the cluster key on its own sockets"
        problems.append(ConfigProblem("--lookup-url", "flag", "a Redis, as --tls-ca-file is there", "none", hint))
    if problems:
        _refuse(problems)
    return ControllerConfig(
        host=host,
        port=port,
        pull_port=ports.pull,
        reply_port=ports.reply,
        heartbeat_port=ports.heartbeat,
        heartbeat_interval_s=heartbeat_interval_s,
        instance_timeout_s=timeout_s,
        lookup_url=lookup_url,
        cluster_name=cluster_name,
        insecure=insecure,
        cluster_key=None if key is None else SecretStr(key),
        tls_cert_file=tls_cert_file,
        tls_key_file=tls_key_file,
        tls_ca_file=tls_ca_file,
        warnings=(_exposed(host),) if is_exposed else (),
    )


def _exposed(host: str) -> str:
    risk = f"whoever reaches {host} can change the directory and use the API, because no cluster key protects it"
    return f"INSECURE: {risk}; insecure says that this is meant"


def _equal_ports(ports: dict[str, int | None]) -> list[ConfigProblem]:
    problems = []
    taken: dict[int, str] = {}
    for name, port in ports.items():
        if not port:
            continue  # not bound, or any free one
        if port in taken:
            problems.append(ConfigProblem(name, "flag", f"another port than {taken[port]}", str(port)))
        taken.setdefault(port, name)
    return problems


def _is_port(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= PORT_MAX


def _pairs(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name is given twice")
    return dict(pairs)


def _refuse(problems: list[ConfigProblem]) -> NoReturn:
    raise ConfigError(problems)
