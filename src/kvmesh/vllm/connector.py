"""`KVMeshConnector`: vLLM's OffloadingConnector, configured by our YAML.

All the connector does is to fill in vLLM's own offloading configuration: our spec, our tier, our policy, and the size
of the pool. `--kv-transfer-config '{"kv_connector":"KVMeshConnector","kv_role":"kv_both"}'` is all a user writes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from kvmesh.config import KVMeshConfig, load_config
from kvmesh.errors import ConfigError, ConfigProblem, UnsupportedError
from kvmesh.vllm import fingerprint
from kvmesh.vllm.compat import (
    KVCacheConfig,
    KVConnectorPromMetrics,
    KVConnectorRole,
    OffloadingConnector,
    TieringOffloadingSpec,
    VllmConfig,
    init_logger,
)
from kvmesh.vllm.policy import POLICIES

if TYPE_CHECKING:
    from kvmesh.vllm.tier import PeerTier

logger = init_logger("vllm.kvmesh.connector")

FACTS_KEY = "kvmesh_model_facts"
"""Where the connector leaves, in vLLM's extra configuration, what only it can see of the model
(`fingerprint.ModelFacts`).
"""
_SPEC_NAME = "KVMeshSpec"


class KVMeshConnector(OffloadingConnector):
    """Best-effort KV cache sharing between engines. Made once in the engine's scheduler and once in every worker."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        config = configure(vllm_config)
        _refuse_several_hosts(vllm_config)
        if role == KVConnectorRole.SCHEDULER:
            _extra(vllm_config)[FACTS_KEY] = fingerprint.model_facts(vllm_config)
        try:
            super().__init__(vllm_config, role, kv_cache_config)
        except (ValueError, AssertionError) as error:
            if "block_size" not in str(error):
                raise
            raise ConfigError(
                [
                    ConfigProblem(
                        "chunk_tokens",
                        where=config.sources.get("chunk_tokens", ""),
                        found=str(config.chunk_tokens),
                        expected="a multiple of vLLM's block size that suits all KV cache groups",
                        hint=str(error).partition(", or set")[0],
                    )
                ]
            ) from error
        self._tier = _find_tier(self.connector_scheduler)
        self._failed_to_explain = False

    def on_new_request(self, request: Any) -> None:
        super().on_new_request(request)
        if self._tier is not None:
            with self._explaining():
                self._tier.meet(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """As vLLM's; once it is settled, the request's record goes to the node."""
        found: tuple[int | None, bool] = super().get_num_new_matched_tokens(request, num_computed_tokens)
        if self._tier is not None and found[0] is not None:
            with self._explaining():
                self._tier.tell(request, num_computed_tokens, found[0])
        return found

    @contextlib.contextmanager
    def _explaining(self) -> Iterator[None]:
        """What serves explanations must never cost a request."""
        try:
            yield
        except Exception:
            if not self._failed_to_explain:
                logger.exception("A request could not be told of; this is logged once")
            self._failed_to_explain = True

    @classmethod
    def build_prom_metrics(cls, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> KVConnectorPromMetrics:
        configure(vllm_config)
        return super().build_prom_metrics(vllm_config, *args, **kwargs)

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: VllmConfig) -> str | None:
        configure(vllm_config)
        layout: str | None = super().get_required_kvcache_layout(vllm_config)
        return layout


def configure(vllm_config: VllmConfig) -> KVMeshConfig:
    """Fill vLLM's offloading configuration from ours; returns ours. Raises ConfigError. Idempotent."""
    extra = _extra(vllm_config)
    parallel = vllm_config.parallel_config
    config = _resolve(extra, parallel.data_parallel_size, parallel.data_parallel_index)
    if extra.get("spec_name") != _SPEC_NAME:  # the first time, in the first process; the others get the filled one
        for warning in config.warnings:
            logger.warning("%s", warning)
    if not config.pool_enabled:
        raise ConfigError(
            [
                ConfigProblem(
                    "pool_enabled",
                    where=config.sources.get("pool_enabled", ""),
                    expected="true: the host pool is what this connector works with",
                    found="false",
                    hint="leave --kv-transfer-config away to run without kvmesh",
                )
            ]
        )
    extra.update(
        {
            "spec_name": _SPEC_NAME,
            "spec_module_path": "kvmesh.vllm.spec",
            "cpu_bytes_to_use": config.pool_size_bytes,
            "block_size": config.chunk_tokens,
            "eviction_policy": POLICIES[config.cache_policy],
            "cache_policy_module_path": "kvmesh.vllm.policy",
            "offload_prompt_only": not config.save_decode_cache,
            "secondary_tiers": [{"type": "PeerTier", "module_path": "kvmesh.vllm.tier"}] if config.share else [],
        }
    )
    return config


def tier_config(offloading_spec: TieringOffloadingSpec) -> KVMeshConfig:
    """The configuration as the tier of this engine needs it."""
    parallel = offloading_spec.config.parallel
    return _resolve(offloading_spec.extra_config, parallel.data_parallel_size, parallel.data_parallel_index)


def _find_tier(scheduler: Any) -> PeerTier | None:
    """The tier of this engine; None in a worker, and without sharing."""
    from kvmesh.vllm.tier import PeerTier

    tiers = () if scheduler is None else scheduler.manager.secondary_tiers
    return next((tier for tier in tiers if isinstance(tier, PeerTier)), None)


def _resolve(extra: Mapping[str, Any], data_parallel_size: int, data_parallel_index: int) -> KVMeshConfig:
    config = load_config(extra={key: value for key, value in extra.items() if key != FACTS_KEY})
    return config.for_data_parallel_rank(data_parallel_index) if data_parallel_size > 1 else config


def _extra(vllm_config: VllmConfig) -> dict[str, Any]:
    extra: dict[str, Any] = vllm_config.kv_transfer_config.kv_connector_extra_config
    return extra


def _refuse_several_hosts(vllm_config: VllmConfig) -> None:
    """The workers of one instance must share one pool, so they must live on one host."""
    parallel = vllm_config.parallel_config
    hosts = getattr(parallel, "nnodes_within_dp", 1)
    if hosts > 1:
        raise UnsupportedError(
            "one instance on several hosts",
            expected="all workers of an instance on one host, over one host pool",
            found=f"{hosts} hosts per instance",
            hint="use tensor parallelism within a host and data parallelism across hosts",
        )
