"""Who may change something over HTTP.

With a cluster key: whoever shows the token that is derived from it. Without one: whoever is on this machine, and is no
web page of somebody else's. A browser on this machine will send requests here for any page that it shows, so an Origin
that is not ours is refused, and so is a Host name that is not this machine's (a name of somebody else's that leads to
127.0.0.1 would make his page ours).
"""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from starlette.requests import HTTPConnection

from kvmesh.controller.errors import ApiError, require_token

if TYPE_CHECKING:
    from kvmesh.controller.api import Context


def require_write(context: Context, request: HTTPConnection) -> None:
    """Raise ApiError unless this caller may change something."""
    error = may_write(context, request)
    if error is not None:
        raise error


def may_write(context: Context, request: HTTPConnection) -> ApiError | None:
    """Why this caller may not change anything; None when it may."""
    if context.token is not None:
        try:
            require_token(context, request.headers.get("authorization"))
        except ApiError as error:
            return error
        return None
    client = request.client.host if request.client is not None else ""
    host = request.headers.get("host", "")
    origin = request.headers.get("origin")
    if is_loopback(client) and is_loopback(_name(host)) and (origin is None or urlsplit(origin).netloc == host):
        return None
    hint = (
        "call from the controller's own machine with http://127.0.0.1, or give the cluster a key "
        "(--cluster-key-file or KVMESH_CLUSTER_KEY) and send its token"
    )
    return ApiError(403, "writes_need_loopback", "without a cluster key only this machine may change something", hint)


def is_loopback(host: str) -> bool:
    """Whether a name or address can only mean this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _name(host: str) -> str:
    """A Host header without its port."""
    name = urlsplit(f"//{host}").hostname
    return name or ""
