"""What the router reads in a request, and that nothing a client sends can stop it."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmesh.router.request import CHAT, COMPLETIONS, read_facts, text_blocks, token_question

JSON = {"content-type": "application/json"}


def facts(path: str, body: object, **headers: str):
    return read_facts("POST", path, {**JSON, **headers}, json.dumps(body).encode())


def test_model_session_and_length() -> None:
    """The header names the session before the body does; a prompt's length is estimated."""
    found = facts(COMPLETIONS, {"model": "m", "prompt": "x" * 400, "user": "u"})
    assert (found.model, found.session, found.prompt_tokens) == ("m", "u", 100)
    assert facts(CHAT, {"user": "u", "prompt_cache_key": "k"}).session == "k"
    assert facts(CHAT, {"user": "u"}, **{"x-session-id": "s"}).session == "s"
    assert facts(COMPLETIONS, {"prompt": [[1, 2, 3]]}).prompt_tokens == 3
    assert facts(COMPLETIONS, {}).session is None
    assert read_facts("GET", "/v1/models/org/name", {}, b"").model == "org/name"
    form = b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhisper\r\n--x--\r\n'
    upload = read_facts("POST", "/v1/audio/transcriptions", {"content-type": "multipart/form-data; boundary=x"}, form)
    assert (upload.model, upload.is_repeatable) == ("whisper", True)


@pytest.mark.parametrize(
    ("method", "path", "repeatable"),
    [
        ("POST", CHAT, True),
        ("POST", "/v1/responses", False),
        ("POST", "/v1/files", False),
        ("GET", "/anything", True),
        ("DELETE", "/v1/responses/1", False),
    ],
)
def test_what_may_be_sent_twice(method: str, path: str, repeatable: bool) -> None:
    """Inference without a state, and reading."""
    assert read_facts(method, path, {}, b"").is_repeatable is repeatable


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_read(body: bytes) -> None:
    """Nothing is raised, and blocks and questions can still be asked for."""
    found = read_facts("POST", CHAT, JSON, body)
    text_blocks(found, 16)
    token_question(found)


_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(["model", "prompt", "messages", "user", "tools", "cache_salt"]), _values))
def test_any_json_is_read(body: dict[str, object]) -> None:
    """Fields of wrong types are the engine's business."""
    for path in (CHAT, COMPLETIONS):
        found = facts(path, body)
        text_blocks(found, 16)
        token_question(found)


def test_conversations_keep_their_blocks() -> None:
    """A further turn adds blocks and changes none; another tenant, model or tool changes all."""
    messages = [{"role": "user", "content": "word " * 100}]
    longer = [*messages, {"role": "assistant", "content": "answer " * 50}, {"role": "user", "content": "more"}]
    short, long = (text_blocks(facts(CHAT, {"model": "m", "messages": one}), 64) for one in (messages, longer))
    assert len(short) > 5
    assert long[: len(short)] == short
    others = (
        {"model": "n"},
        {"model": "m", "cache_salt": "s"},
        {"model": "m", "tools": [{"type": "function", "function": {"name": "f"}}]},
    )
    for other in others:
        assert not set(text_blocks(facts(CHAT, {"messages": messages, **other}), 64)) & set(short)


def test_questions_about_tokens() -> None:
    """Ids are taken as they are; text and chats are asked as they came; the rest says why not."""
    assert token_question(facts(COMPLETIONS, {"prompt": [5, 6]})).tokens == [5, 6]
    assert token_question(facts(COMPLETIONS, {"prompt": [[5, 6], [7]]})).tokens == [5, 6]
    asked = json.loads(token_question(facts(COMPLETIONS, {"model": "m", "prompt": ["a", "b"]})).body)
    assert asked == {"model": "m", "prompt": "a"}
    chat = {
        "model": "m",
        "messages": [{"role": "user", "content": "hi"}],
        "tools": [{"x": 1}],
        "add_generation_prompt": False,
        "chat_template_kwargs": {"thinking": True},
    }
    assert json.loads(token_question(facts(CHAT, {**chat, "temperature": 0})).body) == chat
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]
    assert token_question(facts(CHAT, {"messages": image})).problem == "multimodal"
    assert token_question(facts(CHAT, {})).problem == "no_prompt"
    assert token_question(facts("/v1/embeddings", {"input": "x"})).problem == "other_route"
    assert token_question(facts(COMPLETIONS, {"prompt": "x", "prompt_embeds": "abc"})).problem == "prompt_embeds"
