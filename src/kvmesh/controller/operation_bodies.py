"""What people ask for when they start an operation, validated; one body per kind. The field names are the API."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi.openapi.models import Example
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from kvmesh.core.keys import KEY_MAX_BYTES, KEY_MIN_BYTES
from kvmesh.wire.directory import MAX_KEYS_PER_MESSAGE
from kvmesh.wire.operations import MAX_HOT

MAX_PIN_S = 30 * 86_400.0
MAX_TIMEOUT_S = 3600.0
DEFAULT_TIMEOUT_S = 120.0
MAX_TOKENS = 200_000
MAX_TEXT_CHARS = 250_000
"""At most four bytes each: fits into a question to a node."""

HexKey = Annotated[
    str,
    StringConstraints(
        strip_whitespace=True,
        to_lower=True,
        pattern=rf"^([0-9a-fA-F]{{2}}){{{KEY_MIN_BYTES},{KEY_MAX_BYTES}}}$",
    ),
]
InstanceId = Annotated[str, Field(min_length=1, max_length=256)]


class Chunks(BaseModel):
    """Which chunks are meant: by keys, or as the prefix of a prompt given as tokens or text."""

    model_config = ConfigDict(extra="forbid")

    keys: list[HexKey] | None = Field(
        None, min_length=1, max_length=MAX_KEYS_PER_MESSAGE, description="Chunk keys in hexadecimal, in prefix order."
    )
    tokens: list[Annotated[int, Field(ge=0, lt=2**32)]] | None = Field(
        None, min_length=1, max_length=MAX_TOKENS, description="The token ids of a prompt."
    )
    text: str | None = Field(
        None,
        min_length=1,
        max_length=MAX_TEXT_CHARS,
        description="A prompt as the engine gets it, chat template and all; tokenised by an instance.",
    )
    cache_salt: str | None = Field(
        None, max_length=1024, description="The salt that requests with this prompt use, if any."
    )

    @model_validator(mode="after")
    def _at_most_one(self) -> Chunks:
        given = [name for name in ("keys", "tokens", "text") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)}: give one of keys, tokens and text")
        if self.cache_salt is not None and self.keys is not None:
            raise ValueError("cache_salt goes with tokens or text; keys contain their salt")
        return self

    @property
    def names_chunks(self) -> bool:
        """Whether any are named; otherwise all are meant, where that has a meaning."""
        return self.keys is not None or self.tokens is not None or self.text is not None


class _Body(Chunks):
    timeout_s: float = Field(
        DEFAULT_TIMEOUT_S, ge=1, le=MAX_TIMEOUT_S, description="What is not done after so long is given up."
    )


def _needs_chunks(body: Chunks) -> None:
    if not body.names_chunks:
        raise ValueError("say which chunks: keys, tokens or text")


class ClearBody(_Body):
    """Retract chunks and give their slots back; without chunks, all."""

    kind: Literal["clear"]
    instance: InstanceId | None = Field(None, description="Left out: everywhere.")


class PinBody(_Body):
    """Keep chunks in the host pools that hold them, whatever else comes, for a time."""

    kind: Literal["pin"]
    instance: InstanceId | None = Field(None, description="Left out: every instance that holds some of them.")
    seconds: float = Field(gt=0, le=MAX_PIN_S, description="How long; pinning again starts anew.")

    @model_validator(mode="after")
    def _chunks(self) -> PinBody:
        _needs_chunks(self)
        return self


class UnpinBody(_Body):
    """Let pinned chunks be evicted again; without chunks, all."""

    kind: Literal["unpin"]
    instance: InstanceId | None = Field(None, description="Left out: everywhere.")


class WarmBody(_Body):
    """Have an instance fetch chunks from others before requests need them."""

    kind: Literal["warm"]
    instance: InstanceId
    hottest: int | None = Field(
        None, ge=1, le=MAX_HOT, description="Instead of naming chunks: those that others used last."
    )
    sources: list[InstanceId] | None = Field(
        None, min_length=1, max_length=64, description="Whose chunks `hottest` means; left out: everybody's."
    )

    @model_validator(mode="after")
    def _chunks_or_hottest(self) -> WarmBody:
        if self.names_chunks == (self.hottest is not None):
            raise ValueError("say what to warm: hottest, or one of keys, tokens and text")
        if self.sources is not None and self.hottest is None:
            raise ValueError("sources goes with hottest; named chunks come from whoever holds them")
        return self


class DrainBody(BaseModel):
    """Stop publishing and fetching, hand hot chunks over to others, then leave."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["drain"]
    instance: InstanceId
    hand_over: int = Field(
        MAX_HOT, ge=0, le=MAX_HOT, description="At most so many chunks, hottest first, that nobody else holds."
    )
    leave: bool = Field(True, description="False: stay a member that shares nothing, until `resume`.")
    timeout_s: float = Field(DEFAULT_TIMEOUT_S, ge=1, le=MAX_TIMEOUT_S)


class ResumeBody(BaseModel):
    """Undo a drain without leaving."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["resume"]
    instance: InstanceId
    timeout_s: float = Field(DEFAULT_TIMEOUT_S, ge=1, le=MAX_TIMEOUT_S)


class MoveBody(_Body):
    """Have one instance fetch chunks of another, then clear them there; without chunks, all."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    kind: Literal["move"]
    source: InstanceId = Field(alias="from")
    to: InstanceId

    @model_validator(mode="after")
    def _two(self) -> MoveBody:
        if self.source == self.to:
            raise ValueError("from and to are the same instance")
        return self


AnyBody = ClearBody | PinBody | UnpinBody | WarmBody | DrainBody | ResumeBody | MoveBody
OperationBody = Annotated[AnyBody, Field(discriminator="kind")]

EXAMPLES: dict[str, Example] = {
    "warm": {
        "summary": "Warm a new instance with what the others used last",
        "value": {"kind": "warm", "instance": "engine-3", "hottest": 500},
    },
    "pin": {
        "summary": "Keep a system prompt everywhere for an hour",
        "value": {"kind": "pin", "text": "You are a helpful assistant. ...", "seconds": 3600},
    },
    "drain": {"summary": "Before a restart", "value": {"kind": "drain", "instance": "engine-1"}},
    "move": {"summary": "Move everything", "value": {"kind": "move", "from": "engine-1", "to": "engine-2"}},
    "clear": {"summary": "Forget everything, everywhere", "value": {"kind": "clear"}},
}
