"""What the router reads in a request: as little as the policies need, and never a reason to refuse it.

The body is decoded without building what is not looked at (messages stay raw JSON). A body that cannot be read this way
goes to an engine all the same, whose own answer says best what is wrong with it. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, NamedTuple

import msgspec
import xxhash
from msgspec import Meta, Raw

BYTES_PER_TOKEN = 4
"""About, for text in JSON; only used to weigh requests against each other."""
MAX_BLOCKS = 2048
"""Of a prompt's text, for the policy `prefix`."""
MAX_SESSION_CHARACTERS = 256

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
RESPONSES = "/v1/responses"
MODEL = "/v1/models/"
_MODEL_FIELD = re.compile(rb'name="model"\r\n\r\n([^\r\n]{1,256})\r\n')
REPEATABLE_POSTS = frozenset(
    {
        COMPLETIONS,
        CHAT,
        "/v1/embeddings",
        "/v1/score",
        "/v1/rerank",
        "/v1/audio/transcriptions",
        "/v1/audio/translations",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/v2/rerank",
        "/classify",
        "/detokenize",
        "/embed",
        "/inference/v1/generate",
        "/invocations",
        "/pooling",
        "/rerank",
        "/score",
        "/tokenize",
        "/v2/embed",
    }
)
"""Calls that change nothing at the engine, so that another engine may be asked when one has failed."""
REPEATABLE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_MEDIA = (b'"image', b'"input_image', b'"audio', b'"input_audio', b'"video', b'"image_embeds')

_Text = Annotated[str, Meta(max_length=4096)]


class _Body(msgspec.Struct):
    """The fields of all routes that matter here."""

    model: _Text | None = None
    prompt: Raw = Raw()
    messages: Raw = Raw()
    input: Raw = Raw()
    tools: Raw = Raw()
    user: _Text | None = None
    prompt_cache_key: _Text | None = None
    cache_salt: _Text | None = None
    previous_response_id: _Text | None = None
    prompt_embeds: Raw = Raw()
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: Raw = Raw()
    chat_template_kwargs: Raw = Raw()
    mm_processor_kwargs: Raw = Raw()
    documents: Raw = Raw()
    reasoning_effort: Raw = Raw()


_decoder = msgspec.json.Decoder(_Body)
_nothing = _Body()


class Facts(NamedTuple):
    """What is known of a request."""

    method: str
    path: str
    body: _Body
    session: str | None
    prompt_tokens: int
    """About."""

    model: str | None
    """As the body names it, or the path of `/v1/models/NAME`."""

    @property
    def is_repeatable(self) -> bool:
        """Whether it may be sent to another engine when one has taken it and failed."""
        return self.method in REPEATABLE_METHODS or (self.method == "POST" and self.path in REPEATABLE_POSTS)


def read_facts(
    method: str, path: str, headers: Mapping[str, str], body: bytes, *, session_header: str = "x-session-id"
) -> Facts:
    """Read a request. Never raises for what a client has sent."""
    decoded = _nothing
    if body and "json" in headers.get("content-type", "").lower():
        try:
            decoded = _decoder.decode(body)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            decoded = _nothing
    model = decoded.model
    if model is None:
        model = _model_elsewhere(path, headers.get("content-type", ""), body)
    session = headers.get(session_header) or decoded.prompt_cache_key or decoded.user
    prompt = decoded.messages or decoded.prompt or decoded.input
    session = session[:MAX_SESSION_CHARACTERS] if session else None
    return Facts(method, path, decoded, session, _tokens(bytes(prompt)), model)


def _model_elsewhere(path: str, content_type: str, body: bytes) -> str | None:
    """The model of a question about a model, and of an upload (audio to be transcribed)."""
    if path.startswith(MODEL):
        return path[len(MODEL) :] or None
    if "multipart/form-data" in content_type:
        found = _MODEL_FIELD.search(body)
        return None if found is None else found[1].decode("utf-8", "replace")
    return None


def _tokens(raw: bytes) -> int:
    """About how many tokens a prompt in JSON has: token ids are counted, text is measured."""
    if raw[:16].lstrip(b"[ \t\r\n")[:1].isdigit():
        return raw.count(b",") + 1
    return len(raw) // BYTES_PER_TOKEN


def text_blocks(facts: Facts, block_bytes: int) -> list[int]:
    """Chained hashes of the prompt's text in whole blocks, for the policy `prefix`.

    Messages are taken as they stand in the JSON: a conversation that grows keeps its beginning, byte by byte. Model,
    tenant salt and tools go before everything, as they do in the engine.
    """
    body = facts.body
    raw = memoryview(body.messages or body.prompt or body.input)
    seed = f"{body.model}\0{body.cache_salt}\0".encode("utf-8", "surrogatepass") + bytes(body.tools)
    parent = xxhash.xxh3_64_intdigest(seed)
    hashes = []
    for start in range(0, min(len(raw) // block_bytes, MAX_BLOCKS) * block_bytes, block_bytes):
        parent = xxhash.xxh3_64_intdigest(raw[start : start + block_bytes], parent)
        hashes.append(parent)
    return hashes


class TokenQuestion(NamedTuple):
    """How to learn a prompt's tokens."""

    tokens: Sequence[int] | None
    """They are in the request."""
    body: bytes
    """Otherwise: what to ask the engine's `/tokenize`."""
    problem: str = ""
    """Otherwise: why they cannot be learnt."""


def token_question(facts: Facts) -> TokenQuestion:
    """What to ask for the tokens of a completion or a chat, as the engine would see them."""
    body = facts.body
    if facts.path not in {COMPLETIONS, CHAT} or facts.method != "POST":
        return TokenQuestion(None, b"", "other_route")
    if body.prompt_embeds:
        return TokenQuestion(None, b"", "prompt_embeds")
    if facts.path == COMPLETIONS:
        return _completion_question(body)
    raw = bytes(body.messages)
    if not raw:
        return TokenQuestion(None, b"", "no_prompt")
    if any(mark in raw for mark in _MEDIA):
        return TokenQuestion(None, b"", "multimodal")
    if body.documents or body.reasoning_effort:
        return TokenQuestion(None, b"", "template_options")
    fields = {name: getattr(body, name) for name in _CHAT_FIELDS}
    given = {name: value for name, value in fields.items() if value is not None and value != Raw()}
    return TokenQuestion(None, msgspec.json.encode(given))


_CHAT_FIELDS = (
    "model",
    "messages",
    "tools",
    "add_special_tokens",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template",
    "chat_template_kwargs",
    "mm_processor_kwargs",
)


def _completion_question(body: _Body) -> TokenQuestion:
    """The first prompt decides: vLLM makes one request per prompt of a list, and the router cannot split them."""
    if not body.prompt:
        return TokenQuestion(None, b"", "no_prompt")
    try:
        prompt = _prompt_decoder.decode(body.prompt)
    except (msgspec.MsgspecError, RecursionError):
        return TokenQuestion(None, b"", "no_prompt")
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        prompt = prompt[0]
    if isinstance(prompt, str):
        asked: dict[str, object] = {"model": body.model, "prompt": prompt}
        if body.add_special_tokens is not None:
            asked["add_special_tokens"] = body.add_special_tokens
        return TokenQuestion(None, msgspec.json.encode(asked))
    tokens = [token for token in prompt if isinstance(token, int)]
    return TokenQuestion(tokens, b"") if tokens else TokenQuestion(None, b"", "no_prompt")


_Token = Annotated[int, Meta(ge=0, lt=2**32)]
_prompt_decoder = msgspec.json.Decoder(str | list[_Token | str | list[_Token]])
