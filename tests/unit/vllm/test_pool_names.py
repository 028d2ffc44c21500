"""Pools do not outlive their engines, and pools in use keep what they need."""

from __future__ import annotations

import mmap
import os
import time
import uuid
from pathlib import Path

import pytest
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion

from kvmesh.vllm.pool_names import STALE_AGE_S, forget_name_if_gone, remove_stale_pools, unlink_name


@pytest.fixture
def region():
    region = SharedOffloadRegion(
        engine_id=f"test-{uuid.uuid4().hex}",
        num_chunks=2,
        rank=None,
        kv_bytes_per_chunk=mmap.PAGESIZE,
        cpu_page_size=mmap.PAGESIZE,
    )
    yield region
    region.cleanup()
    assert not Path(region.mmap_path).exists()


def test_without_its_name_the_pool_works_on(region):
    unlink_name(region)
    assert not Path(region.mmap_path).exists()
    region.base_tensor[0] = 7
    assert region.base_tensor[0] == 7
    unlink_name(region)


def test_a_worker_does_not_look_for_a_name_that_is_gone(region, monkeypatch):
    """Otherwise vLLM logs a traceback at every orderly end."""
    Path(region.mmap_path).unlink()
    forget_name_if_gone(region)
    monkeypatch.setattr(os, "unlink", lambda path: pytest.fail(f"unlinks {path}"))


def make_pool(folder: Path, name: str, age_s: float) -> Path:
    path = folder / f"vllm_offload_{name}.mmap"
    path.write_bytes(bytes(mmap.PAGESIZE))
    then_s = time.time() - age_s
    os.utime(path, (then_s, then_s))
    return path


def test_only_old_pools_that_nobody_maps_are_removed(tmp_path):
    """A young one may belong to an engine that is starting, a mapped one to an engine that is running."""
    old = make_pool(tmp_path, "old", 2 * STALE_AGE_S)
    mapped = make_pool(tmp_path, "mapped", 2 * STALE_AGE_S)
    young = make_pool(tmp_path, "young", 1)
    other = tmp_path / "something.mmap"
    other.write_bytes(b"")
    os.utime(other, (0, 0))
    with mapped.open("r+b") as file, mmap.mmap(file.fileno(), mmap.PAGESIZE):
        assert remove_stale_pools(tmp_path) == [old]
    assert mapped.exists()
    assert young.exists()
    assert other.exists()


def test_pools_of_other_users_are_left_alone(tmp_path, monkeypatch):
    make_pool(tmp_path, "theirs", 2 * STALE_AGE_S)
    monkeypatch.setattr(os, "getuid", lambda: 12345678)
    assert remove_stale_pools(tmp_path) == []
