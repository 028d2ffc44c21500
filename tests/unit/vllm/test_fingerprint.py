"""The format: equal for what is interchangeable, different for what is not."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvmesh.core.format import differences
from kvmesh.errors import UnsupportedError
from kvmesh.vllm import fingerprint
from kvmesh.vllm.fingerprint import (
    SAMPLE_BYTES,
    SAMPLES_PER_FILE,
    make_format,
    make_int8_format,
    model_facts,
    weights_digest,
)
from support.vllm_fakes import FACTS, make_offloading_config, make_vllm_config

HEADER = json.dumps({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
BODY_BYTES = 1 << 20
FILE_BYTES = 8 + len(HEADER) + BODY_BYTES


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"hidden_size": 64}')
    body = bytes(index * 31 % 251 for index in range(BODY_BYTES))
    (folder / "model.safetensors").write_bytes(len(HEADER).to_bytes(8, "little") + HEADER + body)
    return folder


def flip(path: Path, offset: int) -> None:
    """Change one byte."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_a_copied_folder_has_the_same_digest(model, tmp_path):
    """Neither the path nor the times of the files matter."""
    copy = Path(shutil.copytree(model, tmp_path / "elsewhere"))
    assert weights_digest(copy) == weights_digest(model)
    assert len(weights_digest(model)) == 32


@pytest.mark.parametrize(
    ("name", "offset"),
    [
        ("config.json", 5),
        ("model.safetensors", 10),  # header
        ("model.safetensors", -1),  # the end is always sampled
        ("model.safetensors", 8 + len(HEADER)),  # and so is the start
        ("model.safetensors", (FILE_BYTES - SAMPLE_BYTES) * 30 // (SAMPLES_PER_FILE - 1)),  # one of the samples between
    ],
)
def test_one_byte_makes_another_digest(model, name, offset):
    before = weights_digest(model)
    flip(model / name, offset)
    assert weights_digest(model) != before


def test_length_and_file_name_count(model):
    before = weights_digest(model)
    (model / "model.safetensors").rename(model / "model-00001.safetensors")
    renamed = weights_digest(model)
    with (model / "model-00001.safetensors").open("ab") as file:
        file.write(b"\0")
    assert len({before, renamed, weights_digest(model)}) == 3


def test_other_weight_files_are_read_when_there_are_no_safetensors(model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    before = weights_digest(model)
    flip(model / "pytorch_model.bin", -1)
    assert weights_digest(model) != before


def test_a_header_that_lies_about_its_length_is_harmless(model):
    """A damaged or hostile file costs at most the bound, and never an error at start-up."""
    (model / "model.safetensors").write_bytes(b"\xff" * 8 + b"short")
    assert len(weights_digest(model)) == 32
    (model / "model.safetensors").write_bytes(b"")
    assert len(weights_digest(model)) == 32


def test_facts_of_a_local_folder(model, monkeypatch):
    """The folder's name stands for the model, its files for the weights."""
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    config = make_vllm_config()
    config.model_config.model = str(model)
    config.load_config.load_format = "auto"
    assert model_facts(config) == {
        "model_name": "model",
        "model_weights": weights_digest(model),
        "model_dtype": "float32",
        "hash_algorithm": "sha256",
        "hash_seed": "7",
        "tokenizer": "",
        "hidden_size": 0,
        "head_size": 0,
    }


def test_facts_of_dummy_weights_follow_seed_and_configuration(monkeypatch):
    """Random weights are equal when made from the same seed for the same configuration."""
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    config = make_vllm_config()
    first = model_facts(config)
    config.model_config.seed = 1
    second = model_facts(config)
    config.model_config.hf_config = SimpleNamespace(to_json_string=lambda: '{"layers": 3}')
    third = model_facts(config)
    assert len({facts["model_weights"] for facts in (first, second, third)}) == 3
    assert first["hash_seed"] == ""


def test_a_model_that_is_not_here_goes_by_name_and_revision(monkeypatch):
    monkeypatch.setattr(fingerprint, "_model_folder", lambda model, revision: None)
    config = make_vllm_config()
    config.load_config.load_format = "auto"
    config.model_config.revision = "abc"
    assert model_facts(config)["model_weights"] == "by name only, revision abc"


def _other_config(hf_config: object) -> object:
    return hf_config


LONGROPE = {"rope_type": "longrope", "original_max_position_embeddings": 4096}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"hf_overrides": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}}, "hf_overrides"),
        ({"hf_overrides": _other_config}, "hf_overrides"),
        ({"hf_config_path": "/models/another"}, "hf_config_path"),
        ({"quantization": "fp8"}, "quantization fp8"),
        ({"hf_text_config": SimpleNamespace(rope_parameters=LONGROPE), "max_model_len": 8192}, "long rotary"),
    ],
)
def test_options_that_change_what_the_files_say_count(model, options, told):
    """Equal files with another rotary embedding make other KV: text of one instance must not reach the other."""
    config = make_vllm_config()
    config.model_config.model = str(model)
    config.load_config.load_format = "auto"
    plain = model_facts(config)
    for name, value in options.items():
        setattr(config.model_config, name, value)
    facts = model_facts(config)
    assert told in facts["model_weights"]
    (difference,) = differences(
        *(make_format(one, make_offloading_config(), chunk_bytes=4096) for one in (plain, facts))
    )
    assert difference.field == "model_weights"
    assert model_facts(config) == facts


@pytest.mark.parametrize("option", [{"hf_overrides": _other_config}, {"hf_config_path": "/models/a/config"}])
def test_it_is_the_configuration_that_counts_not_the_name_of_what_made_it(model, option):
    """Functions and folders of one name may say different things; the same thing may lie in different folders."""

    def told(effective: dict[str, object]) -> str:
        config = make_vllm_config()
        config.model_config.model = str(model)
        config.load_config.load_format = "auto"
        config.model_config.hf_config = SimpleNamespace(to_json_string=lambda: json.dumps(effective))
        for name, value in option.items():
            setattr(config.model_config, name, value)
        return model_facts(config)["model_weights"]

    assert told({"rope_theta": 10_000}) != told({"rope_theta": 500_000})
    assert told({"layers": 2, "_name_or_path": "/a"}) == told({"_name_or_path": "/b", "layers": 2})


@pytest.mark.parametrize(
    "options",
    [
        {"hf_overrides": {}, "quantization": None, "hf_config_path": None},
        {"quantization": "gptq_marlin", "hf_config": SimpleNamespace(quantization_config={"bits": 4})},
        {"hf_text_config": SimpleNamespace(rope_scaling=LONGROPE), "max_model_len": 4096},
    ],
)
def test_options_that_change_nothing_do_not_keep_instances_apart(model, options):
    """Such as the name of the kernel for weights that are quantized in their files."""
    config = make_vllm_config()
    config.model_config.model = str(model)
    config.load_config.load_format = "auto"
    for name, value in options.items():
        setattr(config.model_config, name, value)
    assert model_facts(config)["model_weights"] == weights_digest(model)


def test_the_format_says_what_the_bytes_depend_on():
    made = make_format(FACTS, make_offloading_config(), chunk_bytes=4096)
    assert made.model_name == "tiny"
    assert made.kv_dtype == "float32"
    assert (made.block_tokens, made.chunk_tokens, made.chunk_bytes) == (16, 64, 4096)
    assert made.groups == "0: 2 layers x 16 tokens"
    assert made.parallel_layout == "tp1 pp1 pcp1 dcp1"
    assert made.kv_layout.startswith("LBHNC cpu vllm-0.")
    assert made.instruction_set, "the CPU platform packs blocks by instruction set"


def test_the_tensor_parallel_size_counts_unless_rows_do_not_depend_on_it():
    def of(**config: object):
        return make_format(FACTS, make_offloading_config(**config), chunk_bytes=4096)

    assert [each.field for each in differences(of(), of(tp_size=2))] == ["parallel_layout"]
    portable = {"canonical_layout": True, "agnostic": True}
    assert differences(of(**portable), of(tp_size=2, **portable)) == []


def test_another_kv_dtype_and_another_model_dtype_are_told_apart():
    """The KV may be stored in a type of its own; then both types count."""
    plain = make_format(FACTS, make_offloading_config(), chunk_bytes=4096)
    other = make_format({**FACTS, "model_dtype": "bfloat16"}, make_offloading_config(), chunk_bytes=4096)
    (difference,) = differences(plain, other)
    assert (difference.field, difference.theirs) == ("kv_dtype", "float32 (model bfloat16)")


def test_int8_makes_a_format_of_its_own():
    """One field differs from that of exact instances; models for which int8 is not defined stop the engine."""
    facts = {**FACTS, "head_size": 64}
    plain = make_format(facts, make_offloading_config(), chunk_bytes=4096)
    int8 = make_int8_format(facts, make_offloading_config(), chunk_bytes=4096)
    (difference,) = differences(plain, int8)
    assert (difference.field, difference.theirs) == ("kv_dtype", "float32, int8 per 64 in transfer")
    for unknown, chunk_bytes in ((FACTS, 4096), ({**FACTS, "head_size": 80}, 4096)):
        with pytest.raises(UnsupportedError, match="wire_codec int8"):
            make_int8_format(unknown, make_offloading_config(), chunk_bytes=chunk_bytes)
    config = make_offloading_config()
    two_groups = dataclasses.replace(config, groups=config.groups * 2)
    with pytest.raises(UnsupportedError, match="2 KV cache groups"):
        make_int8_format(facts, two_groups, chunk_bytes=4096)


def test_gpus_have_no_instruction_set_in_the_format(monkeypatch):
    cuda = SimpleNamespace(is_cpu=lambda: False, device_type="cuda")
    monkeypatch.setattr(fingerprint, "current_platform", cuda)
    made = make_format(FACTS, make_offloading_config(), chunk_bytes=4096)
    assert made.instruction_set == ""
    assert " cuda " in made.kv_layout
