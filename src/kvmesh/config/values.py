"""Values as people write them, made into values that programs use. Pure; ValueError says what is allowed.

No name is resolved here: configuration must not wait for a network.
"""

from __future__ import annotations

import ipaddress
import re
import reprlib

PORT_MAX = 65535

_USERINFO = re.compile(r"(://)\S*@")  # greedy: a password may hold / and @, although it should not
_BARE_USERINFO = re.compile(r"^[^/@\s]*:[^/@\s]*@")
_SECRET_PARAMETER = re.compile(r"([?&](?:password|token|secret|key)=)[^&#\s]*", re.IGNORECASE)
_HOST_NAME = re.compile(
    r"^(?=.{1,253}$)[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?(\.[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?)*\.?$"
)


def mask_secrets(text: str) -> str:
    """`text` with user names and passwords in URLs replaced by ***."""
    masked = _USERINFO.sub(r"\1***@", text)
    masked = _BARE_USERINFO.sub("***@", masked)
    return _SECRET_PARAMETER.sub(r"\1***", masked)


def show(value: object) -> str:
    """A value for an error message: short, quoted where it is text, without secrets."""
    if isinstance(value, str):
        return repr(mask_secrets(value)[:200])
    try:
        return mask_secrets(reprlib.repr(value))
    except ValueError:  # Python writes out no whole number of more than 4,300 digits; YAML reads them in hexadecimal
        return f"a {type(value).__name__} too long to show"


def is_loopback(host: str) -> bool:
    """Whether `host` can only be this machine. Names are not resolved: of them only `localhost` counts."""
    if host.rstrip(".").lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_wildcard(host: str) -> bool:
    """Whether binding `host` binds every address of the machine. Nobody can connect *to* such an address."""
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def parse_host(text: str) -> str:
    """A host name or an IP address, without scheme, port or brackets."""
    host = text.strip()
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        pass
    if "://" in host:
        raise ValueError("leave the scheme out")
    if ":" in host:
        raise ValueError("the port has a key of its own")
    if not _HOST_NAME.match(host) or re.fullmatch(r"[\d.]+", host):
        raise ValueError("this is neither a host name nor an IP address")
    return host


def parse_host_port(text: str) -> tuple[str, int]:
    """`host:port` or `[ipv6]:port`, port from 1 to 65535."""
    host, colon, port = text.strip().rpartition(":")
    if not colon or not host:
        raise ValueError("the port is missing" if text.strip() else "it is empty")
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise ValueError("put an IPv6 address in brackets, as in [::1]:8300")
    if not (port.isascii() and port.isdigit()) or not 1 <= int(port[:6]) <= PORT_MAX:
        raise ValueError(f"the port must be a whole number from 1 to {PORT_MAX}")
    return parse_host(host), int(port)


def format_host_port(host: str, port: int) -> str:
    """The inverse of `parse_host_port`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_tcp_url(text: str) -> str:
    """`host:port` or `tcp://host:port`, made into the latter: what ZMQ and our own sockets take."""
    scheme, separator, rest = text.strip().rpartition("://")
    if separator and scheme != "tcp":
        raise ValueError(f"the scheme {scheme!r} is not supported, only tcp")
    return f"tcp://{format_host_port(*parse_host_port(rest.rstrip('/')))}"


def split_list(value: object) -> object:
    """Text like `a, b`, `[a, b]` or `a`, as in an environment variable, made into a list; other values pass as is."""
    if not isinstance(value, str):
        return value
    inner = value.strip()
    if inner.startswith("[") and inner.endswith("]"):
        inner = inner[1:-1]
    return [part.strip().strip("\"'") for part in inner.split(",") if part.strip()]
