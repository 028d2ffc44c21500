"""Asks the nodes about requests, and adds what only the controller knows. Runs on the controller's loop.

A node knows its own engine's requests and the members of its own format. The controller knows all formats, so it can
say that a chunk is held where it is of no use; and it can ask the other members of the format whether they have met the
same tokens, or are about to compute them. Nothing is kept here: every answer is asked for when a person wants it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from kvmesh.controller.asks import Asks
from kvmesh.controller.registry import Registry
from kvmesh.core.reasons import MissReason
from kvmesh.wire import control
from kvmesh.wire import explain as told
from kvmesh.wire.causes import make_cause, make_mismatch, replace_first_cause
from kvmesh.wire.control import ControlError

R = TypeVar("R", bound=control.Reply)

TIMEOUT_S = 3.0
MAX_AT_A_TIME = 64
"""Nodes asked at a time; others of this controller's questions need room too."""
MAX_WITNESSES = 64
"""Members asked whether they have met a request's tokens."""
MAX_PROBED = 3
"""Explanations of one answer for which others are asked."""
_UNKNOWN_CHUNK = frozenset({MissReason.NOT_PUBLISHED, MissReason.NO_PEERS})


class Unanswered(NamedTuple):
    """A node that could not be asked."""

    instance_id: str
    error: ControlError


class Inquiries:
    """Questions about requests, to one instance or to all."""

    def __init__(self, registry: Registry, asks: Asks) -> None:
        self._registry = registry
        self._asks = asks
        self._room = asyncio.Semaphore(MAX_AT_A_TIME)

    async def recent(self, instances: Sequence[str], limit: int) -> tuple[list[told.RecentRequest], list[Unanswered]]:
        """The last requests of these instances, newest first."""
        replies, unanswered = await self._ask(control.RequestList, instances, control.ListRequests(limit=limit))
        lines = [line for reply in replies for line in reply.requests]
        return sorted(lines, key=lambda line: line.age_s)[:limit], unanswered

    async def explain(self, instances: Sequence[str], request: str) -> tuple[list[told.Explanation], list[Unanswered]]:
        """Requests that go by this name, the best match first, then the newest."""
        replies, unanswered = await self._ask(
            control.Explained, instances, control.ExplainRequest(request=request[: told.MAX_ID])
        )
        found = [one for reply in replies for one in reply.found]
        found.sort(key=lambda one: (-told.matches(request, one.explanation.request_id), one.explanation.age_s))
        first = await asyncio.gather(*(self._improve(one) for one in found[:MAX_PROBED]))
        rest = [one.explanation for one in found[MAX_PROBED : told.MAX_MATCHES]]
        return [*first, *rest], unanswered

    async def why_missed(
        self, instances: Sequence[str], hours: float
    ) -> tuple[list[told.MissSummary], list[Unanswered]]:
        """What these instances missed, by instance."""
        replies, unanswered = await self._ask(control.Missed, instances, control.WhyMissed(hours=hours))
        return sorted((reply.summary for reply in replies), key=lambda summary: summary.instance_id), unanswered

    # -- what the controller adds --------------------------------------------------------------------------------------

    async def _improve(self, found: control.ExplainedRequest) -> told.Explanation:
        one = found.explanation
        if not one.causes or one.causes[0].reason not in _UNKNOWN_CHUNK:
            return one
        mismatch = self._held_in_another_format(one)
        if mismatch is not None:
            return replace_first_cause(one, mismatch)
        if one.causes[0].reason is not MissReason.NOT_PUBLISHED:
            return one
        return await self._ask_witnesses(one, found.probe)

    def _held_in_another_format(self, one: told.Explanation) -> told.Cause | None:
        """The chunk is there, under the same key, with bytes that this instance cannot use."""
        instance = self._registry.instances.get(one.instance_id)
        if instance is None or not one.first_missed_key:
            return None
        try:
            key = bytes.fromhex(one.first_missed_key)
        except ValueError:
            return None
        ours = instance.member
        for group in self._registry.groups.values():
            if group is instance.group or group.format.model_name != ours.format.model_name:
                continue
            for holder in group.replica.holders(key):
                other = group.members.get(holder)
                if other is not None:
                    return make_mismatch(ours, other.member, 0, 0)
        return None

    async def _ask_witnesses(self, one: told.Explanation, probe: control.Probe) -> told.Explanation:
        instance = self._registry.instances.get(one.instance_id)
        if instance is None:
            return one
        others = [name for name in instance.group.members if name != one.instance_id][:MAX_WITNESSES]
        pairs = await self._ask_each(control.Seen, others, control.HaveSeen(probe=probe))
        seen = [(name, reply) for name, reply in pairs if not isinstance(reply, ControlError)]
        for name, reply in seen:
            if reply.salted:
                cause = make_cause(MissReason.TENANT_SALT, 0, 0, name, {"instance": name})
                return replace_first_cause(one, cause)
        before = [
            (reply.asked_s - one.age_s, name)
            for name, reply in seen
            if reply.asked_s is not None and reply.asked_s > one.age_s
        ]
        if not before or "asked_s" in one.causes[0].detail:
            return one
        asked_s, name = min(before)
        detail: told.Detail = {"asked_at": name, "asked_s": asked_s}
        return replace_first_cause(one, make_cause(MissReason.NOT_PUBLISHED, 0, 0, name, detail))

    # -- asking --------------------------------------------------------------------------------------------------------

    async def _ask(
        self, expected: type[R], instances: Sequence[str], question: control.Question
    ) -> tuple[list[R], list[Unanswered]]:
        replies: list[R] = []
        unanswered: list[Unanswered] = []
        for name, reply in await self._ask_each(expected, instances, question):
            if isinstance(reply, ControlError):
                unanswered.append(Unanswered(name, reply))
            else:
                replies.append(reply)
        return replies, unanswered

    async def _ask_each(
        self, expected: type[R], instances: Sequence[str], question: control.Question
    ) -> list[tuple[str, R | ControlError]]:
        async def ask(name: str) -> tuple[str, R | ControlError]:
            async with self._room:
                try:
                    return name, await self._asks.ask_for(expected, name, question, TIMEOUT_S)
                except ControlError as error:
                    return name, error

        return await asyncio.gather(*(ask(name) for name in instances))
