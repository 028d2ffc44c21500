"""`kvmesh bench codec --model`: what the wire codecs do to the KV of a real model, and to its answers.

Two vLLM CPU servers for each codec, no prefix caching, so that the host pool is the only cache. A prompt is computed by
the first one and asked again there, which then computes from its own pool; then the second one answers it with what it
has pulled. The texts of these two are compared: the same computation, on the very bytes or on those that the codec has
made of them. Prompts are the beginnings of modules of Python's library: prose and code that is on every machine.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from kvmesh.bench.cluster import Controller, Instance, complete, instance_config, metric, wait_healthy
from kvmesh.bench.codec_error import int8_error
from kvmesh.config.model import WireCodec
from kvmesh.models import make_smollm2

CODECS: tuple[WireCodec, ...] = ("lossless", "int8")
MODULES = (
    *("argparse", "ast", "bdb", "calendar", "cmd", "codecs", "configparser", "copy", "csv", "dataclasses"),
    *("difflib", "doctest", "enum", "fractions", "functools", "gettext", "heapq", "inspect", "ipaddress", "locale"),
    *("mailbox", "mimetypes", "optparse", "os", "pathlib", "pdb", "pickle", "platform", "pprint", "pydoc"),
)
PROMPT_CHARACTERS = 3000
ANSWER_TOKENS = 32


@dataclass(frozen=True)
class ModelRow:
    """One codec."""

    codec: str
    prompts: int
    pulled_bytes: float
    ratio: float
    """Bytes on the wire per byte in the pool."""
    encode_gb_per_s: float
    """Per second of processor time, of bytes in the pool."""
    decode_gb_per_s: float
    same_texts: int
    """Answers from pulled chunks that were those from the own pool, token for token."""
    same_characters: float
    """How far the texts agree, on average: their common beginning, as a share of the longer one."""
    int8_error: float | None
    """Measured in the lossless run, on the chunks as they are: `int8_error` of the last prompt."""


def measure_model(codec: WireCodec, prompts: int, model: Path | None, say: Callable[[str], None]) -> ModelRow:
    """Raises StartupError when a server does not start."""
    folder_path = model or make_smollm2(progress=say)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvmesh-codec-")))
        controller = Controller(folder)
        stack.callback(controller.stop)
        controller.start()
        wait_healthy(controller)
        instances = []
        for number in (1, 2):
            instance = Instance(
                f"instance-{number}",
                folder_path,
                folder,
                instance_config(number, controller, wire_codec=codec, max_local_cpu_size=2),
                core=number - 1,
                dtype="bfloat16",
                max_model_len=4096,
                arguments=("--no-enable-prefix-caching",),
            )
            stack.callback(instance.stop)
            instance.start()
            instances.append(instance)
        wait_healthy(*instances, say=say)
        row = _ask(codec, prompts, *instances, say=say)
        if codec == "int8":
            return row
        return replace(row, int8_error=int8_error(controller, _prompt(MODULES[prompts - 1]), _head_size(folder_path)))


def _ask(codec: WireCodec, prompts: int, first: Instance, second: Instance, *, say: Callable[[str], None]) -> ModelRow:
    second.wait_peers(1)
    same, agreement = 0, 0.0
    for number, name in enumerate(MODULES[:prompts]):
        prompt = _prompt(name)
        known = metric(second.admin_url, "kvmesh_node_replica_chunks")
        complete(first.url, prompt, max_tokens=1)
        second.wait_visible(int(known) + 1)
        first.wait_idle()  # what it publishes has been announced by then
        exact = complete(first.url, prompt, max_tokens=ANSWER_TOKENS).text
        pulled = complete(second.url, prompt, max_tokens=ANSWER_TOKENS).text
        same += exact == pulled
        agreement += _common(exact, pulled)
        say(f"{codec}: {number + 1} prompts, {same} answers the same")
    raw_bytes = metric(second.admin_url, "kvmesh_node_coded_raw_bytes_total", direction="received")
    wire_bytes = metric(second.admin_url, "kvmesh_node_coded_wire_bytes_total", direction="received")
    decode_s = metric(second.admin_url, "kvmesh_node_coding_seconds_total", direction="received")
    encode_s = metric(first.admin_url, "kvmesh_node_coding_seconds_total", direction="sent")
    return ModelRow(
        codec=codec,
        prompts=prompts,
        pulled_bytes=raw_bytes,
        ratio=wire_bytes / raw_bytes,
        encode_gb_per_s=raw_bytes / encode_s / 1e9,
        decode_gb_per_s=raw_bytes / decode_s / 1e9,
        same_texts=same,
        same_characters=agreement / prompts,
        int8_error=None,
    )


def _prompt(module: str) -> str:
    return Path(str(importlib.import_module(module).__file__)).read_text(encoding="utf-8")[:PROMPT_CHARACTERS]


def _head_size(model: Path) -> int:
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _common(left: str, right: str) -> float:
    longest = max(len(left), len(right))
    length = next((index for index, pair in enumerate(zip(left, right, strict=False)) if pair[0] != pair[1]), None)
    common = min(len(left), len(right)) if length is None else length
    return common / longest if longest else 1.0
