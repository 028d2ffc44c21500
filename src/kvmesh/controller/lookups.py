"""Who holds what: lookups by keys, tokens or text, and single chunks."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastapi.openapi.models import Example
from pydantic import BaseModel, Field

from kvmesh.controller import views
from kvmesh.controller.errors import ApiError
from kvmesh.controller.instances import FormatGroup, Instance
from kvmesh.controller.operation_bodies import Chunks
from kvmesh.controller.operation_views import ProblemView
from kvmesh.controller.registry import Registry
from kvmesh.core.keys import KEY_MAX_BYTES, KEY_MIN_BYTES, ChunkKey, check_key
from kvmesh.wire import control
from kvmesh.wire.control import ControlError

if TYPE_CHECKING:
    from kvmesh.controller.asks import Asks
    from kvmesh.controller.selection import Selection

MAX_LOOKUP_KEYS = 10_000
INSPECT_TIMEOUT_S = 3.0


class LookupRequest(Chunks):
    """Body of a lookup by POST: many keys, or a prompt as tokens or text."""

    keys: list[str] | None = Field(
        None, max_length=MAX_LOOKUP_KEYS, description="Chunk keys in hexadecimal, in prefix order."
    )
    format_id: str | None = Field(None, description="Only this format.")


LOOKUP_EXAMPLES: dict[str, Example] = {
    "text": {
        "summary": "Is this prompt cached, and where?",
        "value": {"text": "You are a helpful assistant. ...", "cache_salt": "tenant-a"},
    },
    "tokens": {"summary": "The same by token ids", "value": {"tokens": [1, 887, 526, 263, 8444, 20255]}},
    "keys": {"summary": "Some chunks by their keys", "value": {"keys": ["00" * 36], "format_id": None}},
}


class HolderView(BaseModel):
    """One instance that holds a chunk."""

    instance_id: str
    state: str
    sharing: str
    held: bool | None = Field(description="What the holder itself says now; null when it did not answer.")
    slot: int | None = None
    generation: int | None = Field(default=None, description="Of the slot: goes up whenever its content changes.")
    checksum: str | None = Field(default=None, description="xxh3-128 of the chunk's bytes, in hexadecimal.")
    error: ProblemView | None = None


class ChunkFormatView(BaseModel):
    """A chunk in one format."""

    format_id: str
    model_name: str
    chunk_tokens: int
    chunk_bytes: int
    holders: list[HolderView]


class ChunkDetailView(BaseModel):
    """All that is known of one chunk."""

    key: str
    formats: list[ChunkFormatView]


def lookup_keys(registry: Registry, texts: Sequence[str], format_id: str | None) -> views.LookupView:
    """Raises ApiError for what is no key, too many of them, or an unknown format."""
    if len(texts) > MAX_LOOKUP_KEYS:
        raise ApiError(422, "too_many_keys", f"{len(texts)} keys in one lookup", f"ask for {MAX_LOOKUP_KEYS} at a time")
    keys = [parse_key(text) for text in texts]
    return views.lookup_view(find_groups(registry, format_id), keys)


async def lookup_prompt(registry: Registry, selection: Selection, body: LookupRequest) -> views.LookupView:
    """By tokens or text: each format's members say under which keys they would publish them. Raises ApiError."""
    groups = find_groups(registry, body.format_id)
    answers = await asyncio.gather(*(selection.keys_in(group, body) for group in groups), return_exceptions=True)
    found: list[views.LookupFormatView] = []
    failures: list[ControlError] = []
    for group, answer in zip(groups, answers, strict=True):
        if isinstance(answer, ControlError):
            failures.append(answer)
        elif isinstance(answer, BaseException):
            raise answer
        else:
            keys = [ChunkKey(key) for key in answer.keys]
            [view] = views.lookup_view([group], keys).formats
            found.append(view.model_copy(update={"tokens": answer.tokens}))
    if not found:
        text = failures[0].text if failures else "there are no members"
        hint = "look keys up instead, or start an engine whose kvmesh can tell its keys"
        raise ApiError(503, failures[0].code if failures else "no_engine", text, hint)
    return views.LookupView(formats=found)


async def describe_chunk(registry: Registry, asks: Asks, text: str, now_s: float) -> ChunkDetailView:
    """What the directory and the holders themselves say of one chunk. Raises ApiError when nobody holds it."""
    key = parse_key(text)
    groups = [group for group in registry.groups.values() if group.replica.holders(key)]
    if not groups:
        hint = (
            "it was never published, or all holders have evicted it: POST /api/v1/lookup says what is held of a prompt"
        )
        raise ApiError(404, "unknown_chunk", f"no member holds the chunk {key.hex()}", hint)
    found = []
    for group in groups:
        holders = [group.members[name] for name in group.replica.holders(key)]
        found.append(
            ChunkFormatView(
                format_id=group.format_id,
                model_name=group.format.model_name,
                chunk_tokens=group.format.chunk_tokens,
                chunk_bytes=group.format.chunk_bytes,
                holders=await asyncio.gather(*(_ask_holder(registry, asks, one, key, now_s) for one in holders)),
            )
        )
    return ChunkDetailView(key=key.hex(), formats=found)


async def _ask_holder(registry: Registry, asks: Asks, holder: Instance, key: ChunkKey, now_s: float) -> HolderView:
    state, sharing = registry.state(holder, now_s), holder.statistics.sharing
    try:
        question = control.Inspect(keys=[key])
        answer = await asks.ask_for(control.Inspected, holder.instance_id, question, INSPECT_TIMEOUT_S)
    except ControlError as error:
        problem = ProblemView.of(error)
        return HolderView(instance_id=holder.instance_id, state=state, sharing=sharing, held=None, error=problem)
    chunk = answer.chunks[0] if answer.chunks else None
    if chunk is None:
        return HolderView(instance_id=holder.instance_id, state=state, sharing=sharing, held=False)
    return HolderView(
        instance_id=holder.instance_id,
        state=state,
        sharing=sharing,
        held=True,
        slot=chunk.slot,
        generation=chunk.generation,
        checksum=chunk.checksum.hex(),
    )


def find_groups(registry: Registry, format_id: str | None) -> list[FormatGroup]:
    """One format's members or all. Raises ApiError for an unknown one."""
    if format_id is None:
        return list(registry.groups.values())
    found = registry.groups.get(format_id)
    if found is None:
        known = ", ".join(registry.groups) or "none: there are no members"
        raise ApiError(404, "unknown_format", f"no member has the format {format_id!r}", f"known formats: {known}")
    return [found]


def parse_key(text: str) -> ChunkKey:
    """Raises ApiError for what is no key."""
    try:
        return check_key(bytes.fromhex(text.strip()))
    except ValueError as error:
        hint = f"a key is {KEY_MIN_BYTES} to {KEY_MAX_BYTES} bytes in hexadecimal: the block hash and the group index"
        raise ApiError(422, "bad_key", f"{text[:100]!r} is no chunk key: {error}", hint) from None
