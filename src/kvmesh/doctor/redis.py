"""A Redis or Valkey directory: can each of its servers be reached, and does it take our password?

Four lines of its protocol (RESP) do for that, so no client library is needed here.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qsl, unquote

from kvmesh.config.values import format_host_port, mask_secrets, parse_host_port
from kvmesh.doctor.findings import INSTANCE, Finding, ok, problem, skipped
from kvmesh.doctor.situation import Situation

CHECK = "redis.reachable"
REDIS_PORT, SENTINEL_PORT = 6379, 26379
MAX_LINE_BYTES = 4096
_REFUSALS = ("-NOAUTH", "-WRONGPASS", "-ERR invalid password", "-ERR AUTH", "-ERR Client sent AUTH")


class Server(NamedTuple):
    """One server that the URL names, and how it lets us in. `password` is a secret."""

    host: str
    port: int
    tls: bool
    user: str
    password: str
    ca_file: str | None
    cert_file: str | None
    key_file: str | None


def check(situation: Situation) -> Iterator[Finding]:
    """Every server of the configuration's lookup_url, if there is one."""
    url = None if situation.config is None else situation.config.lookup_url
    if url is None:
        yield skipped(CHECK, INSTANCE, "no lookup_url is configured")
        return
    yield from reachable(url, situation.timeout_s)


def reachable(url: str, timeout_s: float) -> Iterator[Finding]:
    """Connect, authenticate where the URL says so, and PING."""
    try:
        found = servers(url)
    except (ValueError, OSError) as error:
        yield problem(CHECK, mask_secrets(url), f"cannot be used: {mask_secrets(str(error))}", "mend lookup_url")
        return
    for server in found:
        yield _judge(server, timeout_s)


def _judge(server: Server, timeout_s: float) -> Finding:
    about = format_host_port(server.host, server.port)
    try:
        answer = ping(server, timeout_s)
    except OSError as error:
        return problem(CHECK, about, f"no connection: {error}", "start Redis there, open its port, or mend lookup_url")
    if answer == "+PONG":
        return ok(CHECK, about, "it answers")
    if answer.startswith(_REFUSALS):
        advice = "mend user and password of lookup_url, or its password_file"
        return problem(CHECK, about, "it does not take our password", advice)
    return problem(CHECK, about, f"it answers {answer[:100]!r} to PING", "is this the port of a Redis or Valkey?")


def servers(url: str) -> list[Server]:
    """The servers of a lookup_url: `redis://`, `rediss://`, and both with `+cluster` or `+sentinel`.

    Raises ValueError, and OSError for a password file that cannot be read.
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        scheme, rest = "redis", url
    protocol, _, kind = scheme.partition("+")
    rest, _, query = rest.partition("?")
    user_info, _, location = rest.rpartition("@")
    user, _, password = user_info.partition(":")
    options = dict(parse_qsl(query))
    file = options.get("sentinel_password_file" if kind == "sentinel" else "password_file")
    if file is not None:
        password = Path(file).expanduser().read_text().strip()
    usual = SENTINEL_PORT if kind == "sentinel" else REDIS_PORT
    found = []
    for text in location.partition("/")[0].split(","):
        has_port = ":" in text.rpartition("]")[2]
        host, port = parse_host_port(text if has_port else f"{text}:{usual}")
        server = Server(
            host,
            port,
            protocol == "rediss",
            "" if kind == "sentinel" else unquote(user),
            password if file is not None else "" if kind == "sentinel" else unquote(password),
            options.get("ca_file", options.get("ssl_ca_certs")),
            options.get("cert_file", options.get("ssl_certfile")),
            options.get("key_file", options.get("ssl_keyfile")),
        )
        found.append(server)
    return found


def ping(server: Server, timeout_s: float) -> str:
    """The line with which the server answers; the first one that is an error. Raises OSError."""
    line = ""
    with socket.create_connection((server.host, server.port), timeout=timeout_s) as plain:
        sock = _encrypted(plain, server) if server.tls else plain
        with sock.makefile("rb") as answers:
            for command in _commands(server):
                sock.sendall(_encoded(command))
                line = answers.readline(MAX_LINE_BYTES).decode(errors="replace").strip()
                if not line.startswith("+"):
                    break
    return line


def _commands(server: Server) -> Iterator[list[str]]:
    if server.password:
        yield ["AUTH", *([server.user] if server.user else []), server.password]
    yield ["PING"]


def _encoded(command: list[str]) -> bytes:
    words = [word.encode() for word in command]
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words)


def _encrypted(sock: socket.socket, server: Server) -> socket.socket:
    context = ssl.create_default_context(cafile=server.ca_file)
    if server.cert_file is not None:
        context.load_cert_chain(server.cert_file, server.key_file)
    return context.wrap_socket(sock, server_hostname=server.host)
