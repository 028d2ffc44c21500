"""From what a person names (keys, tokens, text, the hottest) to chunk keys and the instances concerned."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from itertools import chain, zip_longest

from kvmesh.controller.asks import Asks
from kvmesh.controller.carry_out import Commander
from kvmesh.controller.errors import unknown_instance
from kvmesh.controller.instances import FormatGroup, Instance
from kvmesh.controller.operation_bodies import Chunks
from kvmesh.controller.registry import Registry
from kvmesh.wire import control
from kvmesh.wire.control import ControlError
from kvmesh.wire.operations import Sharing

KEYS_TIMEOUT_S = 40.0
"""Loading a tokenizer takes seconds on a busy machine."""
TRIES = 3
"""Instances of a format that are asked for keys before giving up."""


def find_instance(registry: Registry, instance_id: str) -> Instance:
    """Raises ApiError when it is no member."""
    found = registry.instances.get(instance_id)
    if found is None:
        raise unknown_instance(instance_id)
    return found


def is_sharing(instance: Instance) -> bool:
    """Whether it takes part in everything; others neither fetch nor publish."""
    return instance.statistics.sharing == Sharing.ON.value


class Selection:
    """Asks the registry, and nodes where only they know."""

    def __init__(self, registry: Registry, asks: Asks, commander: Commander) -> None:
        self._registry = registry
        self._asks = asks
        self._commander = commander

    async def keys_at(self, instance: Instance, chunks: Chunks) -> list[bytes]:
        """The chunks that are named, as this very instance keys them. Raises ControlError."""
        return (await self._ask(instance.instance_id, chunks)).keys if chunks.keys is None else _parse(chunks.keys)

    async def keys_in(self, group: FormatGroup, chunks: Chunks) -> control.KeysAre:
        """The chunks that are named, as the members of a format key them. Raises ControlError when none can say."""
        if chunks.keys is not None:
            return control.KeysAre(keys=_parse(chunks.keys), tokens=0)
        names = list(group.members)[:TRIES]
        for instance_id in names[:-1]:
            with contextlib.suppress(ControlError):
                return await self._ask(instance_id, chunks)
        return await self._ask(names[-1], chunks)

    async def hottest(self, sources: Sequence[Instance], limit: int, until_s: float) -> list[bytes]:
        """The chunks that these instances used last, in turns, each once. Raises ControlError when none can say."""
        answers = await asyncio.gather(
            *(self._commander.hottest(source.instance_id, limit, until_s) for source in sources),
            return_exceptions=True,
        )
        lists = [answer for answer in answers if not isinstance(answer, BaseException)]
        if not lists:
            failures = [answer for answer in answers if isinstance(answer, ControlError)]
            raise failures[0] if failures else ControlError("no_source", "there is no other instance of its format")
        merged = chain.from_iterable(zip_longest(*lists))
        return list(dict.fromkeys(key for key in merged if key is not None))[:limit]

    async def _ask(self, instance_id: str, chunks: Chunks) -> control.KeysAre:
        question = control.MakeKeys(text=chunks.text, tokens=chunks.tokens, cache_salt=chunks.cache_salt)
        return await self._asks.ask_for(control.KeysAre, instance_id, question, KEYS_TIMEOUT_S)


def _parse(texts: Sequence[str]) -> list[bytes]:
    return [bytes.fromhex(text) for text in texts]
