"""Errors of the HTTP API, and who may write with a cluster key."""

from __future__ import annotations

import hmac
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvmesh.controller.api import Context

MAX_ID = 256
"""Characters of an id that are told back."""


class ApiError(Exception):
    """Becomes a JSON answer that says what is wrong and what to do."""

    def __init__(self, status: int, code: str, message: str, hint: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.hint = hint


LISTS_INSTANCES = "kvmesh status, or GET /api/v1/instances, lists all"


def unknown_instance(instance_id: str) -> ApiError:
    """For an id that no member has."""
    return ApiError(404, "unknown_instance", f"no member has the id {instance_id[:MAX_ID]!r}", LISTS_INSTANCES)


def require_token(context: Context, authorization: str | None) -> None:
    """Raises ApiError unless `Authorization: Bearer TOKEN` has the cluster's token."""
    if context.token is None:
        hint = "start the controller with --cluster-key-file or KVMESH_CLUSTER_KEY"
        raise ApiError(403, "no_cluster_key", "without a cluster key nothing can be changed over HTTP", hint)
    scheme, _, shown = (authorization or "").partition(" ")
    is_right = hmac.compare_digest(shown.strip().encode(), context.token.encode())
    if scheme.lower() != "bearer" or not is_right:
        hint = "send Authorization: Bearer TOKEN; kvmesh key token prints it"
        raise ApiError(401, "bad_token", "this call needs the cluster's token", hint)
