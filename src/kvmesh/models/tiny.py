"""Llama models of random weights, the same bytes for the same seed on every machine: for tests and benchmarks.

The weights are drawn from the raw output of a PCG64 bit generator, whose stream numpy keeps stable (NEP 19), by
operations that IEEE 754 rounds in one way only. There is one stream per tensor, named by seed and tensor.

The scales are chosen so that greedy text reacts to the prompt: attention is peaked on few tokens and weighs as much as
the residual stream, so another KV cache mostly gives another text. Mostly: one more token before a text that repeats
itself changed nothing. Use prompts of random words, and compare KV bytes where a wrong chunk must not go unseen.
Special tokens have zero rows in the output matrix: greedy decoding never ends early.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from kvmesh.errors import ModelError
from kvmesh.models.folder import Tensor, Weights, cache_dir, ensure_folder, write_json, write_safetensors

if TYPE_CHECKING:
    from pathlib import Path

    from tokenizers import Tokenizer

    from kvmesh.models.folder import JSON

RECIPE_VERSION = 1  # raise it when anything here changes what is written

SPECIAL_TOKENS: Final = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MAX_TOKENS: Final = 32768

CHAT_TEMPLATE: Final = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class TinyShape:
    """The sizes of a Llama model; `head_dim` is independent of `hidden / heads`."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int = 1024

    def kv_bytes_per_token(self, item_bytes: int = 2) -> int:
        """Return the bytes of keys and values of one token; `item_bytes` is 2 for bfloat16, 4 for float32."""
        return self.layers * 2 * self.kv_heads * self.head_dim * item_bytes


TINY: Final = TinyShape(layers=2, hidden=64, intermediate=128, heads=4, kv_heads=2, head_dim=32)
"""Boots and answers as fast as can be: 512 bytes of KV per token in bfloat16."""

BENCH: Final = TinyShape(layers=8, hidden=256, intermediate=512, heads=8, kv_heads=8, head_dim=128)
"""Much KV for little arithmetic, nearer to a large model on a GPU: 32,768 bytes of KV per token in bfloat16."""

THIN: Final = TinyShape(layers=8, hidden=256, intermediate=512, heads=8, kv_heads=4, head_dim=64)
"""As BENCH with a quarter of its KV: 8,192 bytes per token in bfloat16, like models with few KV heads."""

# Attention scores of standard deviation gain^2 = 2.5 leave about n / exp(2.5^2) of n tokens with weight: 8 of 4,000.
# Their mean is small, so its way back into the residual stream is amplified, by less the more layers add up there.
# The best of a few settings tried, on one seed and two prompts of random tokens (300, and 3,000 or 4,000): at least
# 30 different tokens among 32, and another text when 16 tokens in the middle of the prompt are changed.
_QK_GAIN: Final = math.sqrt(2.5)
_ATTENTION_GAIN_OF_TWO_LAYERS: Final = 2.5
_OUTPUT_GAIN: Final = 3.0


def make_tiny_llama(out_dir: Path | None = None, *, seed: int = 0, shape: TinyShape = TINY) -> Path:
    """Make a random Llama model folder (float32) and return its path; at once when it is there already.

    Args:
        out_dir: The folder to make; by default one in the cache directory, named by seed and shape.
        seed: Another seed gives another model of the same shape, which may share no KV with the first.
        shape: Sizes; `TINY` or `BENCH` for most purposes.

    Raises:
        ModelError: `out_dir` holds something else, or the shape asks for a vocabulary that the tokenizer cannot fill.
    """
    sizes: dict[str, JSON] = asdict(shape)
    recipe: dict[str, JSON] = {"model": "tiny-llama", "version": RECIPE_VERSION, "seed": seed, "shape": sizes}
    name = "tiny-llama-" + "-".join(str(size) for size in (*sizes.values(), f"seed{seed}"))

    def build(folder: Path) -> None:
        write_safetensors(folder / "model.safetensors", _tensors(shape, seed), bf16=False)
        write_json(folder / "config.json", _config(shape))
        write_json(folder / "generation_config.json", _token_ids())
        write_json(folder / "tokenizer_config.json", _tokenizer_config())
        _train_tokenizer(shape.vocab).save(str(folder / "tokenizer.json"))

    return ensure_folder(out_dir or cache_dir() / name, recipe, build)


def _tensors(shape: TinyShape, seed: int) -> list[Tensor]:
    hidden, inner = shape.hidden, shape.intermediate
    attention_gain = _ATTENTION_GAIN_OF_TWO_LAYERS * math.sqrt(2 / shape.layers)
    q_rows, kv_rows = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim

    def ones(name: str) -> Tensor:
        return Tensor(name, (hidden,), lambda: np.ones(hidden, dtype=np.float32))

    def matrix(name: str, rows: int, columns: int, gain: float) -> Tensor:
        """Give a matrix that turns inputs of unit size into outputs of size `gain`."""
        return Tensor(name, (rows, columns), lambda: _uniform(seed, name, (rows, columns), gain / math.sqrt(columns)))

    tensors = [
        Tensor("model.embed_tokens.weight", (shape.vocab, hidden), lambda: _embedding(seed, shape)),
        Tensor("lm_head.weight", (shape.vocab, hidden), lambda: _output_matrix(seed, shape)),
        ones("model.norm.weight"),
    ]
    for index in range(shape.layers):
        layer = f"model.layers.{index}"
        tensors += [
            ones(f"{layer}.input_layernorm.weight"),
            ones(f"{layer}.post_attention_layernorm.weight"),
            matrix(f"{layer}.self_attn.q_proj.weight", q_rows, hidden, _QK_GAIN),
            matrix(f"{layer}.self_attn.k_proj.weight", kv_rows, hidden, _QK_GAIN),
            matrix(f"{layer}.self_attn.v_proj.weight", kv_rows, hidden, 1.0),
            matrix(f"{layer}.self_attn.o_proj.weight", hidden, q_rows, attention_gain),
            matrix(f"{layer}.mlp.gate_proj.weight", inner, hidden, 1.0),
            matrix(f"{layer}.mlp.up_proj.weight", inner, hidden, 1.0),
            matrix(f"{layer}.mlp.down_proj.weight", hidden, inner, 1.0),
        ]
    return tensors


def _embedding(seed: int, shape: TinyShape) -> Weights:
    return _uniform(seed, "model.embed_tokens.weight", (shape.vocab, shape.hidden), 1.0)


def _output_matrix(seed: int, shape: TinyShape) -> Weights:
    values = _uniform(seed, "lm_head.weight", (shape.vocab, shape.hidden), _OUTPUT_GAIN / math.sqrt(shape.hidden))
    values[: len(SPECIAL_TOKENS)] = 0.0
    return values


def _uniform(seed: int, name: str, shape: tuple[int, int], deviation: float) -> Weights:
    """Draw a matrix of uniform values with standard deviation `deviation`: exact 24-bit fractions times one float32."""
    stream = np.random.PCG64(np.random.SeedSequence([seed, zlib.crc32(name.encode())]))
    count = shape[0] * shape[1]
    words = stream.random_raw((count + 1) // 2).astype("<u8").view("<u4")[:count]
    centred = (words >> np.uint32(8)).astype(np.int32) - np.int32(1 << 23)
    unit = centred.astype(np.float32) / np.float32(1 << 23)  # in [-1, 1), exactly
    return (unit * np.float32(deviation * math.sqrt(3.0))).reshape(shape)


def _config(shape: TinyShape) -> dict[str, JSON]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "float32",
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": MAX_TOKENS,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        **_token_ids(),
    }


def _token_ids() -> dict[str, JSON]:
    return {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # places in SPECIAL_TOKENS


def _tokenizer_config() -> dict[str, JSON]:
    end_of_text, start, end = SPECIAL_TOKENS
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": start,
        "eos_token": end,
        "pad_token": end_of_text,
        "unk_token": end_of_text,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_TOKENS,
        "chat_template": CHAT_TEMPLATE,
    }


def _train_tokenizer(vocab: int) -> Tokenizer:
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: PLC0415 - optional extra
    except ImportError as error:
        raise ModelError(f"cannot make a tokenizer: {error}. Install it with: pip install 'kvmesh[models]'") from error
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sentences(), trainer)
    if tokenizer.get_vocab_size() != vocab:
        raise ModelError(f"the tokenizer's text gives {tokenizer.get_vocab_size()} tokens; the shape asks for {vocab}")
    return tokenizer


_WORDS: Final = """
the a of to and in is it that for was on are with as at be this have from or one had by not but what all were when we
there can an your which their said if do will each about how up out them then she many some so these would other into
has more her two like him see time could no make than first been its who now people my made over did down only way
find use may water long little very after word called just where most know get through back much before go good new
write our used me man too any day same right look think also around another came come work three must because does
part even place well such here take why things help put years different away again off went old number great tell men
say small every found still between name should home big give air line set own under read last never us left end along
while might next sound below saw something thought both few those always looked show large often together asked house
world going want school important until form food keep children feet land side without boy once animals life enough
took sometimes four head above kind began almost live page got earth need far hand high year mother light parts
country father let night following picture being study second eyes soon times story boys since white days ever paper
hard near sentence better best across during today others however sure means knew try told young miles sun ways thing
whole hear example heard several change answer room sea against top turned learn point city play toward five using
himself usually memory cache prefix token request server engine chunk network transfer holder reader question letter
river morning machine window reason language science history teacher document
""".split()  # noqa: SIM905 - a list literal of 400 words is no easier to read
_ENDINGS: Final = ("", "", "", "s", "ed", "ing", "er", "ly", "ness", "ful", "able")


def _sentences() -> list[str]:
    """Compose sentences from common words by plain arithmetic: the same text everywhere."""
    sentences = []
    state = 1
    for _ in range(4000):
        words = []
        for _ in range(9):
            state = (state * 1103515245 + 12345) % (1 << 31)  # the generator of the C standard's example
            draw = state >> 8
            words.append(_WORDS[draw % len(_WORDS)] + _ENDINGS[draw // len(_WORDS) % len(_ENDINGS)])
        sentences.append(" ".join(words).capitalize() + ". ")
    return sentences
