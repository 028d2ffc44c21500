"""Keys that belong to others: LMCache's that mean nothing here, and those vLLM itself reads from the extra config.

Both are told to the user instead of being dropped in silence: a setting that is ignored without a word is the most
common reason for a cache that does nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmesh.config.values import show

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvmesh.config.resolved import KVMeshConfig

LMCACHE_KEYS: Mapping[str, tuple[str, ...]] = {
    "other storage behind or beside the pool": (
        "audit_actual_remote_url",
        "cufile_buffer_size",
        "enable_nixl_storage",
        "external_backends",
        "gds_backend",
        "gds_buffer_size",
        "gds_path",
        "gds_path_sharding",
        "local_disk",
        "local_disk_path_sharding",
        "maru_path",
        "maru_pool_size",
        "max_local_disk_size",
        "nixl_backend",
        "nixl_buffer_device",
        "nixl_buffer_size",
        "nixl_path",
        "nixl_pool_size",
        "nixl_presence_cache",
        "nixl_presence_cache_only",
        "nixl_use_hugepages",
        "remote_serde",
        "remote_storage_plugins",
        "remote_url",
        "storage_plugins",
        "store_location",
        "use_gds",
        "weka_path",
    ),
    "prefill and decode on separate instances": (
        "enable_pd",
        "enable_xpyd",
        "nixl_peer_alloc_port",
        "nixl_peer_host",
        "nixl_peer_init_port",
        "nixl_peer_port",
        "nixl_proxy_host",
        "nixl_proxy_port",
        "nixl_receiver_host",
        "nixl_receiver_port",
        "nixl_role",
        "pd_allocation_timeout_sec",
        "pd_backend_mode",
        "pd_bidirectional",
        "pd_buffer_device",
        "pd_buffer_size",
        "pd_condition_poll_interval_sec",
        "pd_max_prefill_len",
        "pd_peer_alloc_port",
        "pd_peer_host",
        "pd_peer_init_port",
        "pd_peer_query_port",
        "pd_proxy_host",
        "pd_proxy_port",
        "pd_role",
        "pd_shutdown_timeout_sec",
        "pd_skip_proxy_notification",
    ),
    "blending and layer-wise loading": (
        "blend_check_layers",
        "blend_min_tokens",
        "blend_recompute_ratios",
        "blend_special_str",
        "blend_thresholds",
        "enable_blending",
        "enable_hidden_state_cache",
        "hidden_state_layers",
        "hidden_states_retrieve_mode",
        "max_hidden_state_cpu_size",
        "use_gpu_connector_v3",
        "use_layerwise",
    ),
    "lookup and waiting: lookups are local here": (
        "blocking_timeout_secs",
        "enable_scheduler_bypass_lookup",
        "external_lookup_client",
        "hit_miss_ratio",
        "lmcache_worker_heartbeat_delay_time",
        "lmcache_worker_ids",
        "lookup_backoff_time",
        "lookup_server_worker_ids",
        "p2p_socket_recv_timeout_ms",
        "p2p_socket_send_timeout_ms",
        "pin_check_interval_sec",
        "pin_timeout_sec",
        "priority_limit",
    ),
    "keys of chunks: vLLM's own hashes are used": ("pre_caching_hash_algorithm", "save_unfull_chunk"),
    "memory of the pool: vLLM allocates it": (
        "cost_aware_ewma_alpha",
        "cost_aware_half_life_seconds",
        "enable_lazy_memory_allocator",
        "lazy_memory_expand_trigger_ratio",
        "lazy_memory_initial_ratio",
        "lazy_memory_safe_size",
        "lazy_memory_step_ratio",
        "local_cpu_use_hugepages",
        "numa_mode",
        "gpu_to_numa_mapping",
        "py_enable_gc",
        "reserve_local_cpu_size",
    ),
    "other servers, plugins and statistics": (
        "app_id",
        "chunk_statistics_auto_exit_target_unique_chunks",
        "chunk_statistics_auto_exit_timeout_hours",
        "chunk_statistics_auto_start_statistics",
        "chunk_statistics_strategy",
        "enable_chunk_statistics",
        "enable_kv_events",
        "internal_api_server_enabled",
        "internal_api_server_host",
        "internal_api_server_include_index_list",
        "internal_api_server_port_start",
        "internal_api_server_socket_path_prefix",
        "mp_host",
        "mp_port",
        "plugin_locations",
        "remote_config_url",
        "runtime_plugin_locations",
        "script_allowed_imports",
    ),
}
"""Keys of LMCache that are known and have no effect here, by subject."""

_LMCACHE_NAMES = frozenset(name for names in LMCACHE_KEYS.values() for name in names)
_LMCACHE_PREFIXES = ("histogram_bucket_", "remote_storage_plugin.", "storage_plugin.", "mooncake_")

VLLM_KEYS = frozenset(
    {
        "backpressure",
        "block_size",
        "blocks_per_chunk",
        "cache_policy_module_path",
        "canonical_layout",
        "cpu_bytes_to_use",
        "enable_telemetry",
        "eviction_policy",
        "kv_events_config",
        "max_tracker_size",
        "offload_prompt_only",
        "secondary_tiers",
        "self_describing_kv_events",
        "tier_poll_interval_s",
        "spec_module_path",
        "spec_name",
        "store_threshold",
    }
)
"""Keys of `kv_connector_extra_config` that vLLM's OffloadingConnector reads."""


def is_lmcache_key(name: str) -> bool:
    """Whether `name` is a key of LMCache that means nothing here."""
    return name in _LMCACHE_NAMES or name.startswith(_LMCACHE_PREFIXES)


def lmcache_warning(names: list[str]) -> str:
    """The one warning for all LMCache keys without a meaning here."""
    return f"ignored, because these LMCache keys have no meaning here: {', '.join(sorted(set(names)))}"


def contradictions(config: KVMeshConfig, vllm: Mapping[str, object]) -> list[str]:
    """What vLLM's own extra keys say against ours. Ours hold: the connector fills vLLM's keys from them."""
    same_meaning: dict[str, tuple[str, object, object]] = {
        "cpu_bytes_to_use": ("pool_size_gb", config.pool_size_bytes, f"{config.pool_size_gb} (x 1024**3 bytes)"),
        "block_size": ("chunk_tokens", config.chunk_tokens, config.chunk_tokens),
        "eviction_policy": ("cache_policy", config.cache_policy, config.cache_policy),
        "offload_prompt_only": (
            "save_decode_cache",
            not config.save_decode_cache,
            _BOOL_TEXT[config.save_decode_cache],
        ),
    }
    said = []
    for name, value in vllm.items():
        if name in same_meaning:
            ours, equal_to, shown = same_meaning[name]
            agrees = value.lower() == equal_to if isinstance(value, str) else value == equal_to
            if not agrees and not _is_ours(value):
                said.append(f"extra {name} = {show(value)} is not used: {ours} = {shown} decides")
        elif name == "blocks_per_chunk":
            said.append(f"extra {name} = {show(value)} is not used: chunk_tokens = {config.chunk_tokens} decides")
        elif name in _FILLED_BY_CONNECTOR and not _is_ours(value):
            said.append(f"extra {name} = {show(value)} is not used: KVMeshConnector brings its own")
    return said


_BOOL_TEXT = {True: "true", False: "false"}
_FILLED_BY_CONNECTOR = ("spec_name", "spec_module_path", "cache_policy_module_path")


def _is_ours(value: object) -> bool:
    """Whether the connector itself put the value there (a worker sees the extra config after it was filled)."""
    return isinstance(value, str) and "kvmesh" in value.lower()
