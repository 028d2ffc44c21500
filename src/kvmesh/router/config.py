"""The router's settings: flags of `kvmesh router` over a YAML file over defaults, checked as a whole."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kvmesh.config.model import Port
from kvmesh.config.values import show
from kvmesh.errors import ConfigError, ConfigProblem
from kvmesh.router.backends import Backend

POLICIES = ("roundrobin", "leastload", "session", "prefix", "kv")
MAX_FILE_BYTES = 1 << 20
_NAME = re.compile(r"^[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?$")


class RouterConfig(BaseModel):
    """The resolved settings of one router. Immutable. Made by `make_router_config`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = Field("localhost", description="Address to bind.")
    port: Port = Field(8080, description="Port to bind; 0: any free one.")
    policy: str = Field("roundrobin", description=f"Who gets a request: {', '.join(POLICIES)}.")
    backends: tuple[str, ...] = Field(
        (), description="Engines, as URL or NAME=URL; with policy kv NAME is the engine's instance id."
    )

    kubernetes_selector: str = Field("", description="Instead of a list: the pods with these labels.")
    kubernetes_namespace: str = Field("", description="Of the pods; empty: the router's own.")
    kubernetes_port: str = Field("8000", description="The engines' port: a number, or a container port's name.")
    kubernetes_api: str = Field("", description="URL of the API server; empty: the one that pods are told of.")
    kubernetes_credentials: str = Field(
        "/var/run/secrets/kubernetes.io/serviceaccount", description="Folder with token, ca.crt and namespace."
    )

    controller_url: str = Field("", description="Policy kv: HTTP address of the controller.")
    controller_ca_file: str = Field("", description="CA certificate (PEM) of the controller's HTTPS.")

    connect_timeout_s: float = Field(5.0, gt=0, description="For a connection to an engine.")
    first_byte_timeout_s: float = Field(600.0, gt=0, description="From the request to the answer's first byte.")
    idle_timeout_s: float = Field(300.0, gt=0, description="Between two parts of an answer.")
    body_timeout_s: float = Field(60.0, gt=0, description="For a client to send its request's body.")
    keepalive_s: float = Field(75.0, gt=0, description="Client connections without a request are closed after it.")
    retries: int = Field(2, ge=0, le=10, description="Other engines tried after the first, before the first byte.")

    max_requests: int = Field(4096, ge=1, description="At a time; more are answered with 503.")
    max_requests_per_backend: int = Field(0, ge=0, description="At a time; 0: no limit.")
    max_connections: int = Field(16384, ge=1, description="Client connections at a time.")
    max_body_bytes: int = Field(64 << 20, ge=1, description="Of one request; longer ones are answered with 413.")
    max_buffered_bytes: int = Field(1 << 30, ge=1, description="Request bodies in memory, all together.")

    health_interval_s: float = Field(5.0, gt=0, description="Between health checks of an engine.")
    health_timeout_s: float = Field(5.0, gt=0, description="For one health check.")
    health_failures: int = Field(2, ge=1, description="So many failed checks in a row take an engine out.")
    health_path: str = Field("/health", description="Path of the check.")
    api_key_file: str = Field("", description="Key for asking engines which models they serve.")

    session_header: str = Field("x-session-id", description="Policy session: the header that names a session.")
    recent_half_life_s: float = Field(5.0, gt=0, description="Work given to an engine counts half after so long.")
    prefix_block_bytes: int = Field(512, ge=16, description="Policy prefix: text is compared in blocks of this size.")
    prefix_max_blocks: int = Field(1_000_000, ge=1, description="Policy prefix: blocks remembered (100 MB).")
    kv_fetch_cost: float = Field(
        0.3,
        ge=0,
        description="Policy kv: cost of pulling a token's KV from a peer, of computing it. 1: peers do not share.",
    )
    kv_timeout_s: float = Field(0.5, gt=0, description="Policy kv: for tokens and lookup; then by load.")
    kv_cache_keys: int = Field(500_000, ge=0, description="Policy kv: chunk keys of prompts remembered (60 MB).")

    drain_timeout_s: float = Field(30.0, ge=0, description="At the end: requests under way get so long.")
    log_level: str = Field("info", pattern="^(debug|info|warning|error)$", description="debug, info, warning, error.")

    def static_backends(self) -> tuple[Backend, ...]:
        """The listed engines."""
        return tuple(parse_backend(text) for text in self.backends)


def parse_backend(text: str) -> Backend:
    """Read `http://host:port` or `name=http://host:port`. Raises ValueError that says what is allowed."""
    name, separator, url = text.strip().partition("=")
    if not separator or "://" in name:
        name, url = "", text.strip()
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname:
        raise ValueError("an engine is NAME=http://HOST:PORT or http://HOST:PORT")
    if parts.username or parts.query or parts.fragment or parts.path.strip("/"):
        raise ValueError("only host and port: no path, user or query")
    port = 80 if parts.port is None else parts.port
    if port < 1:
        raise ValueError("the port must be from 1 to 65535")
    host = parts.hostname
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    if name and not _NAME.match(name):
        raise ValueError("a name has letters, digits, '.', '_' and '-'")
    return Backend(id=name or address, name=name, host=host, port=port)


def make_router_config(*, path: Path | None = None, flags: Mapping[str, object] | None = None) -> RouterConfig:
    """Put flags over the file over the defaults and check the whole.

    Args:
        path: YAML file with the names of RouterConfig's fields; None: no file.
        flags: values by field name; None as a value means not given.

    Raises:
        ConfigError: with every problem found.
    """
    problems: list[ConfigProblem] = []
    values: dict[str, object] = {}
    where: dict[str, str] = {}
    for name, value in _read_file(path, problems).items():
        values[name], where[name] = value, str(path)
    for name, value in (flags or {}).items():
        if value is not None:
            values[name], where[name] = value, "flag"
    for name in [name for name in values if name not in RouterConfig.model_fields]:
        near = difflib.get_close_matches(name, RouterConfig.model_fields, n=1)
        hint = f"did you mean {near[0]}?" if near else f"allowed: {', '.join(RouterConfig.model_fields)}"
        problems.append(ConfigProblem(name, where[name], "a known key", "an unknown one", hint))
        del values[name]
    if isinstance(values.get("backends"), str):
        values["backends"] = [part.strip() for part in str(values["backends"]).split(",") if part.strip()]
    if isinstance(values.get("kubernetes_port"), int):
        values["kubernetes_port"] = str(values["kubernetes_port"])
    config = _validated(values, where, problems)
    if config is not None:
        problems += _check(config, where)
    if problems or config is None:
        raise ConfigError(problems)
    return config


def _read_file(path: Path | None, problems: list[ConfigProblem]) -> dict[str, object]:
    if path is None:
        return {}
    import yaml  # noqa: PLC0415 - routers set up by flags alone need none

    try:
        with path.open("rb") as file:
            text = file.read(MAX_FILE_BYTES + 1)
        if len(text) > MAX_FILE_BYTES:
            raise ValueError(f"longer than {MAX_FILE_BYTES} bytes")
        found = yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        problems.append(ConfigProblem("file", str(path), "a readable YAML file", str(error)[:300]))
        return {}
    if found is None:
        return {}
    if not isinstance(found, dict):
        problems.append(ConfigProblem("file", str(path), "lines of the form `key: value`", show(found)))
        return {}
    # `name:` without a value is not a value, and both spellings of a name are taken.
    return {str(name).replace("-", "_"): value for name, value in found.items() if value is not None}


def _validated(
    values: Mapping[str, object], where: Mapping[str, str], problems: list[ConfigProblem]
) -> RouterConfig | None:
    try:
        return RouterConfig.model_validate(dict(values))
    except ValidationError as error:
        for details in error.errors(include_url=False):
            name = str(details["loc"][0])
            problems.append(
                ConfigProblem(name, where.get(name, "default"), details["msg"].lower(), show(values.get(name)))
            )
        return None


def _check(config: RouterConfig, where: Mapping[str, str]) -> list[ConfigProblem]:
    """What pydantic does not see: values that do not go together."""
    problems = []

    def wrong(name: str, expected: str, found: str, hint: str = "") -> None:
        problems.append(ConfigProblem(name, where.get(name, "default"), expected, found, hint))

    if config.policy not in POLICIES:
        wrong("policy", f"one of {', '.join(POLICIES)}", show(config.policy))
    for name, value in config:
        if isinstance(value, float) and not math.isfinite(value):
            wrong(name, "a finite number", show(value))
    if bool(config.backends) == bool(config.kubernetes_selector):
        found = "both" if config.backends else "neither"
        wrong("backends", "either backends or kubernetes_selector", found, "say which engines there are")
    seen: set[str] = set()
    for text in config.backends:
        try:
            backend = parse_backend(text)
        except ValueError as error:
            wrong("backends", "a list of engines", show(text), str(error))
            continue
        if backend.id in seen:
            wrong("backends", "each engine once", show(text))
        seen.add(backend.id)
    problems += _check_kv(config, where)
    for name in ("session_header",):
        if not re.fullmatch(r"[A-Za-z0-9-]+", getattr(config, name)):
            wrong(name, "the name of an HTTP header", show(getattr(config, name)))
    for name in ("api_key_file", "controller_ca_file"):
        given = getattr(config, name)
        if given and not Path(given).is_file():
            wrong(name, "a file that can be read", show(given))
    if not config.health_path.startswith("/"):
        wrong("health_path", "a path that begins with /", show(config.health_path))
    return problems


def _check_kv(config: RouterConfig, where: Mapping[str, str]) -> list[ConfigProblem]:
    problems = []
    if config.policy == "kv":
        if not config.controller_url:
            hint = "such as http://controller:9000, where the controller's page is"
            problems.append(ConfigProblem("controller_url", "default", "the controller's address", "none", hint))
        for text in config.backends:
            if "=" not in text.partition("://")[0]:
                hint = "write NAME=URL, where NAME is the engine's instance_id as the controller's page shows it"
                problems.append(
                    ConfigProblem("backends", where.get("backends", "default"), "named engines", show(text), hint)
                )
    if config.controller_url and urlsplit(config.controller_url).scheme not in {"http", "https"}:
        expected = "http://HOST:PORT or https://HOST:PORT"
        problems.append(
            ConfigProblem(
                "controller_url", where.get("controller_url", "default"), expected, show(config.controller_url)
            )
        )
    return problems
