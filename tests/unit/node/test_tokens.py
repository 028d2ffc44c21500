"""Text to tokens, in a process of its own."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from kvmesh.node import tokens as tokens_module
from kvmesh.node.tokens import tokenize
from kvmesh.wire.control import ControlError


def make_tokenizer(folder: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="comes with vLLM")
    words = {"[UNK]": 0, "hello": 1, "world": 2}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(folder / "tokenizer.json"))


async def test_the_tokenizer_of_the_model(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    assert await tokenize(str(tmp_path), "hello world hello moon") == [1, 2, 1, 0]


async def test_without_one() -> None:
    with pytest.raises(ControlError, match="look up tokens or keys"):
        await tokenize("", "hello")


async def test_one_that_is_broken(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ControlError) as caught:
        await tokenize(str(tmp_path), "hello")
    assert caught.value.code == "tokenizer_failed"


async def test_one_that_never_ends_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for the end of its input, as one that hangs would."""
    make_tokenizer(tmp_path)
    started: list[asyncio.subprocess.Process] = []
    make = asyncio.create_subprocess_exec

    async def start(*command: str, **options: object) -> asyncio.subprocess.Process:
        process = await make("sleep", "100", **options)  # type: ignore[arg-type]
        started.append(process)
        return process

    monkeypatch.setattr(tokens_module.asyncio, "create_subprocess_exec", start)
    monkeypatch.setattr(tokens_module, "TIMEOUT_S", 0.05)
    with pytest.raises(ControlError, match="took longer"):
        await tokenize(str(tmp_path), "hello")
    assert await started[0].wait() == -9
