"""GGUF to Hugging Face's layout, for models of the Llama architecture with a byte-level BPE tokenizer.

GGUF keeps the same numbers under other names, and stores the rows of the query and key projections so that the two
halves of a rotary pair are neighbours; Hugging Face's Llama keeps all first halves before all second ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeVar

import gguf
import numpy as np
from gguf.quants import dequantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from kvmesh.errors import ModelError
from kvmesh.models.folder import Tensor, Weights, write_json, write_safetensors

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from kvmesh.models.folder import JSON

_TOP: Final = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK: Final = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL_TOKEN: Final = 3  # GGUF's token type of special tokens

_Value = TypeVar("_Value", str, int, float, bool, list)  # type: ignore[type-arg]


def convert(gguf_file: Path, folder: Path, *, progress: Callable[[str], None]) -> None:
    """Write the model in `gguf_file` into `folder`, weights in bfloat16.

    Raises:
        ModelError: The file is not a Llama model with a tokenizer that we know how to rebuild.
    """
    progress(f"reading {gguf_file.stat().st_size / 1e6:.0f} MB of GGUF")
    source = _Source(gguf_file)
    tensors = source.tensors()
    progress(f"converting {len(tensors)} tensors to bfloat16")
    write_safetensors(folder / "model.safetensors", tensors, bf16=True)
    write_json(folder / "config.json", source.config(tied=all(tensor.name != "lm_head.weight" for tensor in tensors)))
    write_json(folder / "generation_config.json", source.generation_config())
    progress("writing the tokenizer")
    source.tokenizer().save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", source.tokenizer_config())


def hf_name(name: str) -> str:
    """Translate a tensor's GGUF name, as in `blk.3.attn_q.weight`, to Hugging Face's."""
    stem, _, kind = name.rpartition(".")
    if kind == "weight" and stem in _TOP:
        return f"{_TOP[stem]}.weight"
    parts = stem.split(".")
    if kind == "weight" and len(parts) == 3 and parts[0] == "blk" and parts[2] in _BLOCK:
        return f"model.layers.{parts[1]}.{_BLOCK[parts[2]]}.weight"
    raise ModelError(f"tensor {name!r} has no place in a Llama model")


def split_rotary_halves(rows: Weights, heads: int) -> Weights:
    """Reorder the rows of a query or key projection from GGUF's order to Hugging Face's.

    Within each head of d rows, GGUF's rows 2j and 2j+1 are the pair that Hugging Face keeps at j and j + d/2.
    """
    count, width = rows.shape
    pairs = rows.reshape(heads, count // heads // 2, 2, width)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(count, width)


class _Source:
    """An open GGUF file and what its fields mean."""

    def __init__(self, gguf_file: Path) -> None:
        self._reader = gguf.GGUFReader(gguf_file)
        self._expect("general.architecture", "llama")
        self._expect("tokenizer.ggml.model", "gpt2")  # byte-level BPE
        self._expect("tokenizer.ggml.pre", "smollm")  # splits digits, then words as GPT-2 does
        self.heads = self._field("llama.attention.head_count", int)
        self.kv_heads = self._field("llama.attention.head_count_kv", int)
        self._tokens: list[str] = self._field("tokenizer.ggml.tokens", list)

    def tensors(self) -> list[Tensor]:
        return [self._tensor(stored) for stored in self._reader.tensors]

    def config(self, *, tied: bool) -> dict[str, JSON]:
        hidden = self._field("llama.embedding_length", int)
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "torch_dtype": "bfloat16",
            "vocab_size": len(self._tokens),
            "hidden_size": hidden,
            "intermediate_size": self._field("llama.feed_forward_length", int),
            "num_hidden_layers": self._field("llama.block_count", int),
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self._field("llama.rope.dimension_count", int),
            "hidden_act": "silu",
            "rms_norm_eps": self._field("llama.attention.layer_norm_rms_epsilon", float),
            "rope_theta": self._field("llama.rope.freq_base", float),
            "max_position_embeddings": self._field("llama.context_length", int),
            "tie_word_embeddings": tied,
            "attention_bias": False,
            "mlp_bias": False,
            **self.generation_config(),
        }

    def generation_config(self) -> dict[str, JSON]:
        return {
            "bos_token_id": self._field("tokenizer.ggml.bos_token_id", int),
            "eos_token_id": self._field("tokenizer.ggml.eos_token_id", int),
            "pad_token_id": self._field("tokenizer.ggml.padding_token_id", int),
        }

    def tokenizer(self) -> Tokenizer:
        merges = [(left, right) for left, _, right in (m.partition(" ") for m in self._merges())]
        tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(self._tokens)}, merges=merges))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        tokenizer.decoder = decoders.ByteLevel()
        types: list[int] = self._field("tokenizer.ggml.token_type", list)
        special = [token for token, kind in zip(self._tokens, types, strict=True) if kind == _CONTROL_TOKEN]
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
        return tokenizer

    def tokenizer_config(self) -> dict[str, JSON]:
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self._token("bos"),
            "eos_token": self._token("eos"),
            "pad_token": self._token("padding"),
            "unk_token": self._token("unknown"),
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": self._field("llama.context_length", int),
            "chat_template": self._field("tokenizer.chat_template", str),
        }

    def _tensor(self, stored: gguf.ReaderTensor) -> Tensor:
        shape = tuple(int(size) for size in reversed(stored.shape))  # GGUF names the fastest dimension first
        heads = {"attn_q.weight": self.heads, "attn_k.weight": self.kv_heads}.get(stored.name.split(".", 2)[-1])

        def load() -> Weights:
            values: Weights = dequantize(stored.data, stored.tensor_type).astype(np.float32).reshape(shape)
            return values if heads is None else split_rotary_halves(values, heads)

        return Tensor(hf_name(stored.name), shape, load)

    def _token(self, role: str) -> str:
        return self._tokens[self._field(f"tokenizer.ggml.{role}_token_id", int)]

    def _merges(self) -> list[str]:
        merges: list[str] = self._field("tokenizer.ggml.merges", list)
        return merges

    def _expect(self, key: str, wanted: str) -> None:
        found = self._field(key, str)
        if found != wanted:
            raise ModelError(f"the GGUF file has {key} = {found!r}; only {wanted!r} can be converted")

    def _field(self, key: str, kind: type[_Value]) -> _Value:
        field = self._reader.fields.get(key)
        value: object = None if field is None else field.contents()
        if not isinstance(value, kind):
            raise ModelError(f"the GGUF file has {key} = {value!r}; expected a value of type {kind.__name__}")
        return value
