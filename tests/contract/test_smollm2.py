"""The real SmolLM2, out of the package that carries it, is the model that was published."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from kvmesh.models import ModelError, make_smollm2

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

safetensors = pytest.importorskip("safetensors", reason="reads back what we write")
tokenizers = pytest.importorskip("tokenizers", reason="the `models` extra is not installed")
pytest.importorskip("gguf", reason="the `models` extra is not installed")

from tokenizers import Tokenizer  # noqa: E402


@pytest.fixture(scope="module")
def smollm2_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("models") / "smollm2"
    try:
        make_smollm2(folder)
    except ModelError as error:
        if "pip could not fetch" not in str(error):
            raise
        pytest.skip(f"no package index: {error}")
    yield folder
    shutil.rmtree(folder)  # pytest keeps the folders of three runs: 270 MB each


@pytest.mark.timeout(300)
class TestSmolLM2:
    def test_configuration_and_weights(self, smollm2_folder: Path) -> None:
        config = json.loads((smollm2_folder / "config.json").read_text())
        heads = (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"])
        assert (config["num_hidden_layers"], *heads) == (30, 9, 3, 64)
        found = hashlib.sha256((smollm2_folder / "model.safetensors").read_bytes()).hexdigest()
        assert found == "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b"
        with safetensors.safe_open(smollm2_folder / "model.safetensors", framework="np") as file:
            assert len(file.keys()) == 272
            assert "lm_head.weight" not in file.keys()  # noqa: SIM118 - not a mapping
            assert file.get_slice("model.layers.7.self_attn.k_proj.weight").get_dtype() == "BF16"
        assert config["tie_word_embeddings"] is True

    def test_tokenizer(self, smollm2_folder: Path) -> None:
        tokenizer = Tokenizer.from_file(str(smollm2_folder / "tokenizer.json"))
        text = "Hello, world! 2026 is a leap year? ünïcödé <|im_start|>"
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
        assert ids[-1] == 1  # special tokens are one token
        assert len(tokenizer.encode("123456").ids) == 6  # digits stand alone

    def test_it_is_not_made_twice(self, smollm2_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(subprocess, "run", lambda *_args, **_kwargs: pytest.fail("started pip again"))
        assert make_smollm2(smollm2_folder) == smollm2_folder
