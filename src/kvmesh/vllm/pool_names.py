"""The pool's name in /dev/shm must not outlive its engine: a pool of 100 GB that stays behind takes the host's memory
with it.

vLLM 0.32 gives the name up when an engine shuts down in good order, which a killed engine never does. We remove the
name as soon as everybody has mapped the file; the memory then goes away with the last process that maps it, whatever
ends it. What engines left behind that died before that point is removed at the next start.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from kvmesh.vllm.compat import SharedOffloadRegion, init_logger

logger = init_logger("vllm.kvmesh.pool")

FOLDER = Path("/dev/shm")  # noqa: S108  (where vLLM puts its pools)
PATTERN = "vllm_offload_*.mmap"
STALE_AGE_S = 600.0
"""Younger files may belong to an engine that is starting; filling a large pool takes minutes."""


def unlink_name(region: SharedOffloadRegion) -> None:
    """Remove the region's name. The scheduler maps the pool after all workers, so it calls this."""
    with contextlib.suppress(FileNotFoundError, AttributeError):
        Path(region.mmap_path).unlink()
    region._creator = False  # noqa: SLF001  (nothing left for vLLM to unlink)


def leave_name_to_scheduler(region: SharedOffloadRegion | None) -> None:
    """In a worker: the scheduler will have removed the name by the time that this region is cleaned up."""
    if region is not None:
        region._creator = False  # noqa: SLF001  (as above)


def forget_name_if_gone(region: SharedOffloadRegion) -> None:
    """Before a worker's clean-up: keep vLLM from complaining that the name it made has been removed."""
    path = getattr(region, "mmap_path", None)
    if path is not None and not Path(path).exists():
        region._creator = False  # noqa: SLF001  (as above)


def remove_stale_pools(folder: Path = FOLDER, *, now_s: float | None = None) -> list[Path]:
    """Remove pools of ours (same user) that no process maps and that are not new; return them. Called while an engine
    starts.
    """
    now_s = time.time() if now_s is None else now_s
    candidates = []
    for path in folder.glob(PATTERN):
        with contextlib.suppress(OSError):
            found = path.stat()
            if found.st_uid == os.getuid() and now_s - found.st_mtime > STALE_AGE_S:
                candidates.append(path)
    if not candidates:
        return []
    mapped = _mapped_files()
    removed = []
    for path in candidates:
        if str(path) in mapped:
            continue
        with contextlib.suppress(OSError):
            size_gb = path.stat().st_size / 1e9
            path.unlink()
            removed.append(path)
            logger.warning(
                "removed the host pool %s (%.1f GB), left behind by an engine that was killed", path, size_gb
            )
    return removed


def _mapped_files() -> set[str]:
    """Paths mapped by any process that we may look at."""
    paths = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            for line in maps.read_text(errors="replace").splitlines():
                start = line.find("/")
                if start >= 0:
                    paths.add(line[start:])
    return paths
