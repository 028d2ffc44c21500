"""What every model folder has in common: it appears whole or not at all, and says what it was made from."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvmesh.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

MARKER = "kvmesh-model.json"
"""Names the recipe that made a folder, and the size of each file. A folder without it is never touched."""

JSON = str | int | float | bool | None | list["JSON"] | dict[str, "JSON"]
Weights = NDArray[np.float32]


class Tensor(NamedTuple):
    """One tensor to be written. `load` is called once, when its turn comes, so that only one is in memory."""

    name: str
    shape: tuple[int, ...]
    load: Callable[[], Weights]


def silent(_message: str) -> None:
    """Report progress to nobody."""


def cache_dir() -> Path:
    """Return where model folders go when nobody names a place: `$XDG_CACHE_HOME/kvmesh/models`."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "kvmesh" / "models"


def ensure_folder(out_dir: Path, recipe: Mapping[str, JSON], build: Callable[[Path], None]) -> Path:
    """Make `out_dir` what `recipe` describes, unless it already is.

    `build` fills a new folder beside `out_dir`, which then takes its place by a rename: whoever reads `out_dir` sees a
    whole model or none, and of two processes that build at the same time one result is kept.

    Raises:
        ModelError: `out_dir` holds something that this module did not make.
    """
    out_dir = out_dir.absolute()
    if _is_made_from(out_dir, recipe):
        return out_dir
    _refuse_foreign(out_dir)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}-", dir=out_dir.parent))
    try:
        new = scratch / "new"
        new.mkdir()  # not mkdtemp's 0700: the model is nobody's secret
        build(new)
        sizes: dict[str, JSON] = {path.name: path.stat().st_size for path in sorted(new.iterdir())}
        write_json(new / MARKER, {"recipe": dict(recipe), "files": sizes})
        _put_in_place(new, out_dir, recipe, old=scratch / "old")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return out_dir


def write_json(path: Path, value: Mapping[str, JSON]) -> None:
    """Write `value` in a form that depends on nothing but the value."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def write_safetensors(path: Path, tensors: Sequence[Tensor], *, bf16: bool) -> None:
    """Write tensors as float32, or rounded to bfloat16, in the safetensors format.

    The format is a length (u64, little endian), a JSON header, and the data in the order of the header's offsets.
    Written here because the library's writers know no bfloat16 without torch and want all tensors in memory at once.
    """
    ordered = sorted(tensors, key=lambda tensor: tensor.name)
    item_bytes = 2 if bf16 else 4
    header: dict[str, JSON] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in ordered:
        start, end = end, end + item_bytes * int(np.prod(tensor.shape))
        shape: list[JSON] = list(tensor.shape)
        header[tensor.name] = {"dtype": "BF16" if bf16 else "F32", "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the data starts on a multiple of 8 bytes
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)))
        file.write(encoded)
        for tensor in ordered:
            values = tensor.load()
            if values.shape != tensor.shape:
                raise ModelError(f"tensor {tensor.name} has shape {values.shape}, expected {tensor.shape}")
            little_endian = to_bf16_bits(values) if bf16 else values.astype("<f4")
            file.write(np.ascontiguousarray(little_endian).data)


def to_bf16_bits(values: Weights) -> NDArray[np.uint16]:
    """Round finite float32 values to bfloat16 (nearest, ties to even) and return their bits."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (rounded >> np.uint32(16)).astype("<u2")


def _is_made_from(out_dir: Path, recipe: Mapping[str, JSON]) -> bool:
    try:
        marker = json.loads((out_dir / MARKER).read_text(encoding="utf-8"))
        if marker["recipe"] != recipe:
            return False
        return all((out_dir / name).stat().st_size == size for name, size in marker["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False  # absent or damaged: it will be made anew


def _refuse_foreign(out_dir: Path) -> None:
    if not out_dir.exists() or (out_dir / MARKER).is_file():
        return
    if out_dir.is_dir() and not any(out_dir.iterdir()):
        return
    raise ModelError(f"{out_dir} exists and was not made by kvmesh (no {MARKER} in it): name a new or empty folder")


def _put_in_place(new: Path, out_dir: Path, recipe: Mapping[str, JSON], *, old: Path) -> None:
    if _is_made_from(out_dir, recipe):
        return  # another process was faster, with the same result
    with contextlib.suppress(FileNotFoundError):
        out_dir.rename(old)
    try:
        new.rename(out_dir)
    except OSError:
        if not _is_made_from(out_dir, recipe):  # as above, since the first look
            raise
