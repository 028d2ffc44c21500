"""/dev/shm, where vLLM puts the host pool."""

from __future__ import annotations

import os
from collections.abc import Iterator

from kvmesh.doctor.findings import INSTANCE, MACHINE, Finding, ok, problem, skipped
from kvmesh.doctor.situation import Situation
from kvmesh.units import size

CHECK = "shm.size"
FOLDER = "dev/shm"


def check(situation: Situation) -> Iterator[Finding]:
    """Its size and what is free, against the pool."""
    pool_bytes = situation.pool_bytes
    if not pool_bytes:
        yield skipped(CHECK, INSTANCE, "no configuration, so the size of the pool is not known")
        return
    try:
        found = os.statvfs(situation.root / FOLDER)
    except OSError as error:
        yield problem(CHECK, MACHINE, f"/dev/shm cannot be used: {error.strerror}", "mount a tmpfs there")
        return
    total_bytes, free_bytes = found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize
    yield shared_memory(total_bytes, free_bytes, pool_bytes, is_running=situation.running is not None)


def shared_memory(total_bytes: int, free_bytes: int, pool_bytes: int, *, is_running: bool) -> Finding:
    """A pool that does not fit makes the engine die of SIGBUS when it fills. Of a running instance it is there
    already.
    """
    told = f"/dev/shm has {size(total_bytes)}, {size(free_bytes)} of it free; the pool takes {size(pool_bytes)}"
    if pool_bytes > total_bytes:
        advice = "mount -o remount,size=..., --shm-size of the container, or a Memory volume at /dev/shm in Kubernetes"
        return problem(CHECK, MACHINE, told, f"{advice}; or make pool_size_gb (max_local_cpu_size) smaller")
    if not is_running and pool_bytes > free_bytes:
        advice = "end the engines that use it; what killed ones left (vllm_offload_*) goes at the next start"
        return problem(CHECK, MACHINE, told, advice)
    return ok(CHECK, MACHINE, told)
