"""Addresses of a Redis or Valkey directory, as people write them. Pure; ValueError says what is allowed.

    host:port                                         the second seed's form
    redis://[user:password@]host[:port][/database]    rediss:// for TLS
    redis+cluster://host[:port][,host[:port]...]      rediss+cluster://; a plain address of a cluster is noticed too
    redis+sentinel://host[:port],.../service          rediss+sentinel://; the hosts are the Sentinels

Parameters follow a question mark: password_file, ca_file, cert_file, key_file (TLS), sentinel_password_file.
"""

from __future__ import annotations

from typing import Literal, NamedTuple
from urllib.parse import parse_qsl, unquote

from kvmesh.config.values import PORT_MAX, format_host_port, parse_host, parse_host_port

RedisKind = Literal["single", "cluster", "sentinel"]

REDIS_PORT, SENTINEL_PORT = 6379, 26379
_SCHEMES: dict[str, tuple[RedisKind, bool]] = {
    "redis": ("single", False),
    "rediss": ("single", True),
    "redis+cluster": ("cluster", False),
    "rediss+cluster": ("cluster", True),
    "redis+sentinel": ("sentinel", False),
    "rediss+sentinel": ("sentinel", True),
}
_PARAMETERS = {
    "password_file": "password_file",
    "sentinel_password_file": "sentinel_password_file",
    "ca_file": "ca_file",
    "cert_file": "cert_file",
    "key_file": "key_file",
    "ssl_ca_certs": "ca_file",
    "ssl_certfile": "cert_file",
    "ssl_keyfile": "key_file",
}
"""As we name them and as redis-py does."""
_TLS_PARAMETERS = {"ca_file", "cert_file", "key_file"}


class RedisTarget(NamedTuple):
    """Where Redis is and how to be let in. `password` is a secret: not for logs."""

    kind: RedisKind
    hosts: tuple[tuple[str, int], ...]
    tls: bool = False
    username: str | None = None
    password: str | None = None
    database: int = 0
    service: str = ""
    """Name of the master that the Sentinels watch."""
    password_file: str | None = None
    sentinel_password_file: str | None = None
    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None

    def __str__(self) -> str:
        """Without secrets."""
        hosts = ",".join(format_host_port(*host) for host in self.hosts)
        plus = "" if self.kind == "single" else f"+{self.kind}"
        path = f"/{self.service}" if self.service else f"/{self.database}" if self.database else ""
        return f"redis{'s' if self.tls else ''}{plus}://{hosts}{path}"

    def __repr__(self) -> str:
        return f"RedisTarget({self})"


def parse_redis_target(text: str) -> RedisTarget:
    """Raises ValueError for anything that is not one of the forms above; its text holds no password."""
    scheme, separator, rest = text.strip().partition("://")
    if not separator:
        return RedisTarget("single", (parse_host_port(scheme),))
    if scheme not in _SCHEMES:
        raise ValueError(f"the scheme {scheme!r} is not supported, only {', '.join(_SCHEMES)}")
    kind, tls = _SCHEMES[scheme]
    rest, _, query = rest.partition("?")
    user_info, _, location = rest.rpartition("@")
    hosts_text, _, path = location.partition("/")
    username, _, password = user_info.partition(":")
    hosts = tuple(_parse_host(host, SENTINEL_PORT if kind == "sentinel" else REDIS_PORT) for host in _split(hosts_text))
    if kind == "single" and len(hosts) > 1:
        raise ValueError("several hosts need redis+cluster:// or redis+sentinel://")
    database, service = _parse_path(kind, path.strip("/"))
    return RedisTarget(
        kind,
        hosts,
        tls,
        unquote(username) or None,
        unquote(password) or None,
        database,
        service,
        **_parse_query(query, tls=tls),
    )


def parse_redis_url(text: str) -> str:
    """The address as a URL: the bare `host:port` gets its scheme, everything else stays. Raises ValueError."""
    target = parse_redis_target(text)
    return text.strip() if "://" in text else str(target)


def _split(hosts: str) -> list[str]:
    found = [host.strip() for host in hosts.split(",")]
    if not all(found):
        raise ValueError("the host is missing")
    return found


def _parse_host(text: str, default_port: int) -> tuple[str, int]:
    has_port = text.rpartition("]")[2].startswith(":") if text.startswith("[") else ":" in text
    if has_port:
        return parse_host_port(text)
    return parse_host(text), default_port


def _parse_path(kind: RedisKind, path: str) -> tuple[int, str]:
    if kind == "sentinel":
        service, _, number = path.partition("/")
        if not service:
            raise ValueError("the name of the service is missing, as in redis+sentinel://host:26379/mymaster")
        return _parse_database(number), unquote(service)
    if kind == "cluster" and path not in {"", "0"}:
        raise ValueError("a Redis Cluster has database 0 only")
    return _parse_database(path), ""


def _parse_database(text: str) -> int:
    if not text:
        return 0
    if not (text.isascii() and text.isdigit()) or int(text[:6]) > PORT_MAX:
        raise ValueError("the part after the host is the number of a database, as in redis://host:6379/0")
    return int(text)


def _parse_query(query: str, *, tls: bool) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        own = _PARAMETERS.get(name)
        if own is None:
            allowed = ", ".join(sorted(set(_PARAMETERS.values())))
            raise ValueError(f"the parameter {name[:40]!r} is not known, only {allowed}")
        if not value:
            raise ValueError(f"the parameter {name} is empty")
        if own in _TLS_PARAMETERS and not tls:
            raise ValueError(f"the parameter {name} is for rediss:// only")
        found[own] = value
    return found
