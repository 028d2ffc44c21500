"""Who has a stored response: the Responses API lets a request refer to an earlier one, which one engine knows. Pure."""

from __future__ import annotations

import re
from collections import OrderedDict

from kvmesh.router.request import RESPONSES, Facts

MAX_RESPONSES = 50_000
"""Remembered; the oldest go (10 MB)."""
_ID = re.compile(rb'"id"\s*:\s*"(resp_[A-Za-z0-9_-]{1,200})"')
_LOOK_AT_BYTES = 4096


class ResponseOwners:
    """Backend by response id."""

    def __init__(self, max_responses: int = MAX_RESPONSES) -> None:
        self._max_responses = max_responses
        self._owners: OrderedDict[str, str] = OrderedDict()

    def __len__(self) -> int:
        return len(self._owners)

    def owner(self, facts: Facts) -> str | None:
        """The backend that made the response which this request refers to; None when there is none."""
        if not facts.path.startswith(RESPONSES):
            return None
        named = facts.path[len(RESPONSES) :].strip("/").partition("/")[0] or facts.body.previous_response_id
        return self._owners.get(named) if named else None

    def learn(self, facts: Facts, first: bytes, backend_id: str) -> None:
        """Read the id at the beginning of an answer."""
        if facts.path != RESPONSES or facts.method != "POST":
            return
        found = _ID.search(first[:_LOOK_AT_BYTES])
        if found is None:
            return
        self._owners[found[1].decode()] = backend_id
        if len(self._owners) > self._max_responses:
            self._owners.popitem(last=False)
