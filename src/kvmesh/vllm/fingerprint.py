"""The format of this engine's KV, read off vLLM's configuration and the model's files.

The digest of the weights makes two names for one model equal and one name for two models different. It reads the
model's configuration, every safetensors header and some kilobytes sampled over each file: tens of milliseconds, at
start-up only.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from pathlib import Path
from typing import Any, TypedDict

import torch

from kvmesh.core.format import Format, with_int8
from kvmesh.errors import UnsupportedError
from kvmesh.vllm.compat import OffloadingConfig, VllmConfig, current_platform, init_logger, installed_version

logger = init_logger("vllm.kvmesh.fingerprint")

SAMPLES_PER_FILE = 64
SAMPLE_BYTES = 4096
MAX_HEADER_BYTES = 100 * 1024 * 1024


class ModelFacts(TypedDict):
    """What the format needs and only `VllmConfig` knows. Plain values: it travels in vLLM's extra configuration."""

    model_name: str
    model_weights: str
    model_dtype: str
    hash_algorithm: str
    hash_seed: str
    tokenizer: str
    """Folder with a tokenizer.json; empty when there is none on this host. No part of the format."""
    hidden_size: int
    """Of the text model; 0 where it has none."""
    head_size: int
    """Elements of one token's key in one head; 0 where that says nothing."""


def model_facts(vllm_config: VllmConfig) -> ModelFacts:
    """Read the model's identity. File access; called once while the engine starts."""
    model = vllm_config.model_config
    algorithm = str(vllm_config.cache_config.prefix_caching_hash_algo)
    local = Path(model.model)
    return ModelFacts(
        model_name=local.resolve().name if local.is_dir() else str(model.model),
        model_weights=_weights_digest(vllm_config) + _options(model),
        model_dtype=str(model.dtype).removeprefix("torch."),
        hash_algorithm=algorithm,
        # With PYTHONHASHSEED set, vLLM seeds the first block hash with it; without, the seed is fixed.
        hash_seed=os.environ.get("PYTHONHASHSEED", ""),
        tokenizer=_tokenizer_folder(vllm_config),
        hidden_size=int(getattr(getattr(model, "hf_text_config", None), "hidden_size", None) or 0),
        head_size=_head_size(model),
    )


def _tokenizer_folder(vllm_config: VllmConfig) -> str:
    model = vllm_config.model_config
    name = getattr(model, "tokenizer", None) or model.model
    folder = _model_folder(str(name), getattr(model, "tokenizer_revision", None))
    return str(folder) if folder is not None and (folder / "tokenizer.json").is_file() else ""


def _head_size(model: object) -> int:
    try:
        return int(model.get_head_size())  # type: ignore[attr-defined]  # vLLM's types are unknown to the check
    except (AttributeError, TypeError, ValueError, ZeroDivisionError):  # models that have none, each in its way
        return 0


def attention(facts: ModelFacts) -> float:
    """What attention adds to a token's work, per token before it: layers * hidden size / parameters, where a layer of a
    dense transformer has about 12 * hidden size**2 parameters.
    """
    hidden_size = facts.get("hidden_size", 0)
    return 1 / (12 * hidden_size) if hidden_size else 0.0


def make_format(facts: ModelFacts, config: OffloadingConfig, *, chunk_bytes: int) -> Format:
    """Put together what two instances must agree on. `chunk_bytes` is the size of a slot over all ranks."""
    parallel = config.parallel
    tokens_per_block = config.groups[0].tokens_per_block
    kv_dtype = config.model.dtype
    if kv_dtype != facts["model_dtype"]:
        kv_dtype = f"{kv_dtype} (model {facts['model_dtype']})"
    sizes = f"tp{parallel.tp_size} pp{parallel.pp_size} pcp{parallel.pcp_size} dcp{parallel.dcp_size}"
    layout = "canonical" if config.canonical_layout else (config.kv_cache_layout or "default")
    version = installed_version()
    return Format(
        model_name=facts["model_name"],
        model_weights=facts["model_weights"],
        kv_dtype=kv_dtype,
        kv_layout=f"{layout} {current_platform.device_type} vllm-{version.major}.{version.minor}",
        block_tokens=tokens_per_block,
        chunk_tokens=tokens_per_block * config.cache.blocks_per_chunk,
        chunk_bytes=chunk_bytes,
        groups="; ".join(
            f"{group.group_id}: {len(group.layer_names)} layers x {group.tokens_per_block} tokens"
            for group in config.groups
        ),
        hash_algorithm=facts["hash_algorithm"],
        hash_seed=facts["hash_seed"],
        parallel_layout="any" if config.canonical_layout and parallel.is_parallelism_agnostic else sizes,
        instruction_set=_instruction_set(),
    )


def make_int8_format(facts: ModelFacts, config: OffloadingConfig, *, chunk_bytes: int) -> Format:
    """The format of an engine whose chunks travel as int8, one scale for each token and head. Raises UnsupportedError
    for models for which kvmesh does not know where those lie.
    """
    plain = make_format(facts, config, chunk_bytes=chunk_bytes)
    try:
        if len(config.groups) > 1:
            raise ValueError(f"{len(config.groups)} KV cache groups, whose elements may differ")
        return with_int8(plain, facts.get("head_size", 0))
    except ValueError as error:
        raise UnsupportedError(
            "wire_codec int8",
            expected="one KV cache group of 16 or 32 bit floats, in whole heads",
            found=str(error),
            hint="set wire_codec to lossless, auto or none",
        ) from None


def _instruction_set() -> str:
    """The CPU attention packs KV blocks by what the processor can do; elsewhere the layout does not depend on it."""
    if not current_platform.is_cpu():
        return ""
    amx = torch.cpu.get_capabilities().get("amx_tile", False)
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}{' AMX' if amx else ''}"


def _weights_digest(vllm_config: VllmConfig) -> str:
    model = vllm_config.model_config
    load_format = str(vllm_config.load_config.load_format)
    if "dummy" in load_format:
        return f"dummy weights, seed {model.seed}, config {_config_digest(model.hf_config.to_json_string())}"
    folder = _model_folder(str(model.model), model.revision)
    if folder is None:
        logger.warning(
            "the files of model %s are not on this host, so its weights cannot be compared with other instances'; "
            "name and revision %s are",
            model.model,
            model.revision,
        )
        return f"by name only, revision {model.revision or 'default'}"
    return weights_digest(folder)


def _options(model: Any) -> str:
    """What the engine's options make of the model's files: equal weights with another rotary embedding, another
    configuration or quantized while they are loaded make KV that is not interchangeable.
    """
    found = []
    changed = [name for name in ("hf_overrides", "hf_config_path") if getattr(model, name, None)]
    if changed:
        found.append(f"{' and '.join(changed)}, config {_effective_config(model.hf_config)}")
    quantization = getattr(model, "quantization", None)
    if quantization and not getattr(getattr(model, "hf_config", None), "quantization_config", None):
        found.append(f"quantization {quantization}")
    if _has_long_rope(model):
        found.append("long rotary embedding (max_model_len)")
    return "".join(f", {one}" for one in found)


def _has_long_rope(model: Any) -> bool:
    """Models with longrope have two sets of factors, and vLLM takes the long one when max_model_len asks for it."""
    config = getattr(model, "hf_text_config", None)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(rope, dict) or rope.get("rope_type", rope.get("type")) != "longrope":
        return False
    original = rope.get("original_max_position_embeddings")
    original = original or getattr(config, "original_max_position_embeddings", None)
    longest = getattr(model, "max_model_len", None)
    return isinstance(original, int) and isinstance(longest, int) and longest > original


def _effective_config(hf_config: Any) -> str:
    """Digest of the configuration as vLLM has made it, wherever it came from."""
    fields = json.loads(hf_config.to_json_string())
    for origin in ("_name_or_path", "transformers_version"):
        fields.pop(origin, None)
    return _config_digest(json.dumps(fields, sort_keys=True))


def _config_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _model_folder(model: str, revision: str | None) -> Path | None:
    local = Path(model)
    if local.is_dir():
        return local
    try:
        from huggingface_hub import snapshot_download  # comes with vLLM, not with kvmesh

        return Path(snapshot_download(model, revision=revision, local_files_only=True))
    except Exception as error:  # whatever the hub client raises: the files are not here
        logger.debug("no local snapshot of %s: %r", model, error)
        return None


def weights_digest(folder: Path) -> str:
    """Digest of config.json, and of the headers and sampled bytes of all safetensors files; 32 hexadecimal digits.

    Folders without safetensors (pickled or GGUF weights) are digested by size and samples of every weight file.
    """
    digest = hashlib.sha256()
    config = folder / "config.json"
    if config.exists():
        digest.update(config.read_bytes())
    files = sorted(folder.glob("*.safetensors")) or sorted(
        [*folder.glob("*.bin"), *folder.glob("*.gguf"), *folder.glob("*.pt")]
    )
    for path in files:
        digest.update(path.name.encode())
        _sample(path, digest)
    return digest.hexdigest()[:32]


def _sample(path: Path, digest: hashlib._Hash) -> None:
    size = path.stat().st_size
    digest.update(size.to_bytes(8, "little"))
    with path.open("rb") as file:
        if path.suffix == ".safetensors":
            header_bytes = int.from_bytes(file.read(8), "little")
            digest.update(file.read(min(header_bytes, MAX_HEADER_BYTES)))
        for index in range(SAMPLES_PER_FILE):
            file.seek(max(0, size - SAMPLE_BYTES) * index // (SAMPLES_PER_FILE - 1))
            digest.update(file.read(SAMPLE_BYTES))
