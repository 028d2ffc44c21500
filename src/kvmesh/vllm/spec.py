"""`KVMeshSpec`: which manager and which worker vLLM's offloading uses.

On GPUs everything is vLLM's own (`TieringOffloadingSpec`). On the CPU platform, where vLLM's worker refuses, blocks are
copied by `HostCopyWorker`.
"""

from __future__ import annotations

from kvmesh.errors import UnsupportedError
from kvmesh.vllm.compat import (
    CanonicalKVCaches,
    OffloadingManager,
    OffloadingWorker,
    SharedOffloadRegion,
    TieringOffloadingSpec,
    current_platform,
)
from kvmesh.vllm.host_copy import HostCopyWorker
from kvmesh.vllm.policy import _Publishing
from kvmesh.vllm.pool_names import leave_name_to_scheduler, remove_stale_pools, unlink_name
from kvmesh.vllm.tier import PeerTier


class KVMeshSpec(TieringOffloadingSpec):
    """vLLM's tiering spec with our tier attached to our policy."""

    _worker: OffloadingWorker | None

    def get_manager(self) -> OffloadingManager:
        """Make the manager (scheduler process) and let its policy tell the tier's ledger what is evicted."""
        first = self._manager is None
        if first:
            remove_stale_pools()
        manager = super().get_manager()
        if first:
            unlink_name(self._scheduler_mmap)
            policy = manager.primary_tier._policy  # noqa: SLF001 - there is no other way to it
            for tier in manager.secondary_tiers:
                if isinstance(tier, PeerTier) and isinstance(policy, _Publishing):
                    policy.attach(tier.ledger, tier.on_retract, tier.node)
                    tier.attach(manager, policy)
        return manager

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        """The worker that copies between device blocks and the pool (worker process)."""
        if not current_platform.is_cpu():
            worker = super().get_worker(kv_caches)
            leave_name_to_scheduler(getattr(worker, "_mmap_region", None))
            return worker
        if self._worker is None:
            self._worker = self._make_host_copy_worker(kv_caches)
        return self._worker

    def _make_host_copy_worker(self, kv_caches: CanonicalKVCaches) -> HostCopyWorker:
        if self.config.canonical_layout:
            raise UnsupportedError(
                "canonical_layout",
                expected="the direct layout on the CPU platform",
                found="canonical_layout: true in kv_connector_extra_config",
                hint="remove canonical_layout",
            )
        region = SharedOffloadRegion(
            engine_id=self._engine_id,
            num_chunks=self.num_chunks,
            rank=0 if self.replicated_layout else self.config.parallel.rank,
            kv_bytes_per_chunk=self.kv_bytes_per_chunk,
            cpu_page_size=self.cpu_page_size_per_worker,
        )
        try:
            return HostCopyWorker(kv_caches, self.blocks_per_chunk, region)
        except Exception:
            region.cleanup()
            raise
