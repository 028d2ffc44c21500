"""Which worker and which manager vLLM gets from our spec."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from vllm.v1.kv_offload.base import CanonicalKVCacheRef, CanonicalKVCaches, CanonicalKVCacheTensor
from vllm.v1.kv_offload.cpu.policies.lru import LRUCachePolicy
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

from kvmesh.errors import UnsupportedError
from kvmesh.vllm import spec as spec_module
from kvmesh.vllm import tier as tier_module
from kvmesh.vllm.host_copy import HostCopyWorker
from kvmesh.vllm.spec import KVMeshSpec
from support.vllm_fakes import FakeNode, configured_extra, make_offloading_config, offload_key

PAGE_BYTES = 1024


@pytest.fixture(autouse=True)
def fake_node(monkeypatch):
    monkeypatch.setattr(tier_module, "NodeHandle", FakeNode)


def make_spec(*, share: bool = True, **config: object) -> KVMeshSpec:
    extra = configured_extra(share=share, pool_size_gb=64 * 1024 / 1024**3)
    return KVMeshSpec(make_offloading_config(extra=extra, page_bytes=PAGE_BYTES, **config))


def make_caches() -> CanonicalKVCaches:
    tensor = torch.zeros(4, PAGE_BYTES, dtype=torch.int8)
    return CanonicalKVCaches([CanonicalKVCacheTensor(tensor, PAGE_BYTES)], [[CanonicalKVCacheRef(0, PAGE_BYTES)]])


def test_the_cpu_platform_gets_the_host_copy_worker():
    """And one only, as vLLM expects of its own."""
    spec = make_spec()
    worker = spec.get_worker(make_caches())
    try:
        assert isinstance(worker, HostCopyWorker)
        assert spec.get_worker(make_caches()) is worker
        assert worker._region.num_chunks == spec.num_chunks == 16
    finally:
        worker.shutdown()


def test_cuda_gets_vllms_own_worker(monkeypatch):
    """Device code stays vLLM's: its `create_worker` is called with the caches, and its result handed on."""
    cuda = SimpleNamespace(is_cpu=lambda: False, is_cuda_alike=lambda: True, is_xpu=lambda: False)
    made, asked = object(), []

    def create_worker(self, kv_caches):
        asked.append(kv_caches)
        return made

    monkeypatch.setattr(spec_module, "current_platform", cuda)
    monkeypatch.setattr("vllm.v1.kv_offload.cpu.spec.current_platform", cuda)
    monkeypatch.setattr(TieringOffloadingSpec, "create_worker", create_worker)
    spec, caches = make_spec(), make_caches()
    assert spec.get_worker(caches) is made
    assert spec.get_worker(caches) is made
    assert asked == [caches]
    assert KVMeshSpec.create_worker is create_worker, "not overridden by us"


def test_the_canonical_layout_is_refused_on_the_cpu_platform():
    """The host-copy worker copies whole pages and cannot reorder heads."""
    with pytest.raises(UnsupportedError, match="remove canonical_layout"):
        make_spec(canonical_layout=True).get_worker(make_caches())


def test_a_worker_that_cannot_be_made_leaves_no_region_behind(monkeypatch):
    regions = []

    def fail(caches, blocks_per_chunk, region):
        regions.append(region)
        raise RuntimeError("no")

    monkeypatch.setattr(spec_module, "HostCopyWorker", fail)
    with pytest.raises(RuntimeError, match=r"^no$"):
        make_spec().get_worker(make_caches())
    assert regions[0].mmap_obj is None
    assert regions[0].fd is None


def test_the_policy_tells_the_tiers_ledger():
    """The manager is vLLM's; an eviction in its policy retracts in our ledger and tells our node."""
    spec = make_spec()
    manager = spec.get_manager()
    try:
        assert spec.get_manager() is manager
        (tier,) = manager.secondary_tiers
        policy = manager.primary_tier._policy
        assert isinstance(policy, LRUCachePolicy)
        tier.ledger.publish(3, offload_key(1))
        policy.clear()
        assert tier.ledger.read(3) is None
        assert tier.node.retracted == [3]
    finally:
        manager.shutdown()
    assert tier.node.closed


def test_without_sharing_there_is_a_pool_and_no_node():
    spec = make_spec(share=False)
    manager = spec.get_manager()
    try:
        assert manager.secondary_tiers == []
        manager.primary_tier._policy.clear()
    finally:
        manager.shutdown()


def test_a_node_that_cannot_start_ends_the_engines_start(monkeypatch):
    """The message is the node's own, and vLLM gives the pool back."""

    class BusyPort(FakeNode):
        def start(self):
            raise UnsupportedError("peer_port", found="8200 in use")

    monkeypatch.setattr(tier_module, "NodeHandle", BusyPort)
    spec = make_spec()
    with pytest.raises(UnsupportedError, match="8200 in use"):
        spec.get_manager()
    assert spec._scheduler_mmap is None
