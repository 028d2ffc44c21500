"""Every vLLM internal that kvmesh uses, imported in this one module and nowhere else.

Supported: vLLM 0.31 to 0.33; `tests/contract` checks each of them. A version outside the range, or one inside whose
internals have moved, stops the engine at start-up with one sentence instead of an ImportError from somewhere.
"""

from __future__ import annotations

from packaging.version import InvalidVersion, Version

from kvmesh.errors import VersionError
from kvmesh.vllm.versions import check_version


def installed_version() -> Version:
    """The version of the installed vLLM, whichever distribution brought it. Raises VersionError when it has none."""
    from vllm.version import __version__

    try:
        return Version(__version__)
    except InvalidVersion as error:  # "dev": sources that were never built
        hint = "install a released vLLM of a supported version"
        raise VersionError("vLLM", expected="a version number", found=repr(__version__), hint=hint) from error


check_version(installed_version())

try:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
    from vllm.logger import init_logger
    from vllm.platforms import current_platform
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine import EngineCoreRequestType
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.kv_offload.base import (
        CanonicalKVCaches,
        GPULoadStoreSpec,
        LookupResult,
        OffloadingCounterMetadata,
        OffloadingEvent,
        OffloadingGaugeMetadata,
        OffloadingHistogramMetadata,
        OffloadingManager,
        OffloadingMetricMetadata,
        OffloadingWorker,
        OffloadKey,
        ReqContext,
        RequestOffloadingContext,
        ScheduleEndContext,
        TransferResult,
        make_offload_key,
    )
    from vllm.v1.kv_offload.config import OffloadingConfig
    from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec
    from vllm.v1.kv_offload.cpu.policies.arc import ARCCachePolicy
    from vllm.v1.kv_offload.cpu.policies.base import CachePolicy, ChunkStatus
    from vllm.v1.kv_offload.cpu.policies.lru import LRUCachePolicy
    from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
    from vllm.v1.kv_offload.tiering.base import JobResult, ParentManager, SecondaryTierManager, TransferJob
    from vllm.v1.kv_offload.tiering.manager import TieringOffloadingManager
    from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec
    from vllm.v1.request import Request
except ImportError as error:
    raise VersionError(
        "vLLM",
        expected="the offloading interfaces of vLLM 0.31 to 0.33",
        found=f"{installed_version()} without {error.name or error}",
        hint="install a released vLLM of a supported version",
    ) from error

try:  # since 0.32
    from vllm.v1.metrics.cache_hit_source import CacheHitSource

    HIT_SOURCE: object | None = CacheHitSource.P2P
except ImportError:
    HIT_SOURCE = None

__all__ = [
    "HIT_SOURCE",
    "ARCCachePolicy",
    "CPULoadStoreSpec",
    "CachePolicy",
    "CanonicalKVCaches",
    "ChunkStatus",
    "EngineCoreRequestType",
    "GPULoadStoreSpec",
    "JobResult",
    "KVCacheConfig",
    "KVConnectorFactory",
    "KVConnectorPromMetrics",
    "KVConnectorRole",
    "LRUCachePolicy",
    "LookupResult",
    "OffloadKey",
    "OffloadingConfig",
    "OffloadingConnector",
    "OffloadingConnectorStats",
    "OffloadingCounterMetadata",
    "OffloadingEvent",
    "OffloadingGaugeMetadata",
    "OffloadingHistogramMetadata",
    "OffloadingManager",
    "OffloadingMetricMetadata",
    "OffloadingWorker",
    "ParentManager",
    "ReqContext",
    "Request",
    "RequestOffloadingContext",
    "SamplingParams",
    "ScheduleEndContext",
    "SecondaryTierManager",
    "SharedOffloadRegion",
    "TieringOffloadingManager",
    "TieringOffloadingSpec",
    "TransferJob",
    "TransferResult",
    "VllmConfig",
    "check_version",
    "current_platform",
    "init_logger",
    "installed_version",
    "make_offload_key",
]
