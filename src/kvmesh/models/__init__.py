"""Model folders that need no download from a hub: a small real one and random ones of fixed bytes.

`make_smollm2` converts SmolLM2-135M-Instruct out of a Python package: sensible text, for demonstrations.
`make_tiny_llama` writes random weights that are the same bytes on every machine: for tests and benchmarks.

Both give a folder in Hugging Face's layout (`config.json`, `model.safetensors`, `tokenizer.json`, chat template). It
appears whole or not at all, and is left alone when it is already what was asked for.
"""

from kvmesh.errors import ModelError
from kvmesh.models.folder import cache_dir
from kvmesh.models.smollm2 import make_smollm2
from kvmesh.models.tiny import BENCH, THIN, TINY, TinyShape, make_tiny_llama

__all__ = ["BENCH", "THIN", "TINY", "ModelError", "TinyShape", "cache_dir", "make_smollm2", "make_tiny_llama"]
