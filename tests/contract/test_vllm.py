"""What kvmesh relies on in vLLM, and that every supported version has it.

Three looks at each version: the names and calls in the tables below, read off its sources without importing anything;
our overrides against the methods they override; and our own unit tests of the adapter, run over that version's Python
code (its compiled parts are not needed there).

The installed version is always checked. The others are fetched once into the user's cache; where that is not possible
their tests are skipped, with the reason.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.version import Version

from kvmesh.vllm.versions import SUPPORTED_BELOW, SUPPORTED_FROM
from support.vllm_sources import Sources, UnavailableError, cached_sources, is_abstract, signature_of

ROOT = Path(__file__).resolve().parents[2]
OURS = Sources(ROOT / "src")
VERSIONS = ("0.31.0", "installed", "0.33.0")

CONNECTOR = "vllm.distributed.kv_transfer.kv_connector"
OFFLOAD = "vllm.v1.kv_offload"

# -- the tables --------------------------------------------------------------------------------------------------------

CALLS = {
    # module: calls as we make them; `_` is any value
    f"{CONNECTOR}.factory": ["KVConnectorFactory.register_connector(cls, _, _, _)"],
    f"{CONNECTOR}.v1.offloading_connector": [
        "OffloadingConnector(_, _, _)",
        "OffloadingConnector.build_prom_metrics(cls, _, _, _, _)",
        "OffloadingConnector.get_required_kvcache_layout(cls, _)",
    ],
    f"{CONNECTOR}.v1.offloading.metrics": [
        "OffloadingConnectorStats()",
        "OffloadingConnectorStats.set_gauge(self, _, _)",
        "OffloadingConnectorStats.increase_counter(self, _, _)",
        "OffloadingConnectorStats.increase_counter(self, _, _, _)",
        "OffloadingConnectorStats.observe_histogram(self, _, _)",
    ],
    "vllm.sampling_params": ["SamplingParams(max_tokens=_)"],
    "vllm.v1.request": [
        """Request(request_id=_, prompt_token_ids=_, sampling_params=_, pooling_params=_, cache_salt=_,
        block_hasher=_)"""
    ],
    f"{OFFLOAD}.cpu.manager": [
        "CPUOffloadingManager.complete_load(self, _, _)",
        "CPUOffloadingManager._free_chunk(self, _)",
    ],
    f"{OFFLOAD}.tiering.manager": [
        "CPUPrimaryTierOffloadingManager.prepare_read(self, _, _)",
        "TieringOffloadingManager.lookup(self, _, _)",
        "TieringOffloadingManager.on_new_request(self, _)",
        "TieringOffloadingManager.on_request_finished(self, _)",
    ],
    f"{OFFLOAD}.base": [
        "OffloadingEvent(keys=_, medium=_, removed=_)",
        "make_offload_key(_, _)",
        "ReqContext(req_id=_)",
        "ReqContext.set_offload_key_position(self, _, _)",
        "OffloadingCounterMetadata(documentation=_, labelnames=_)",
        "OffloadingGaugeMetadata(documentation=_)",
        "OffloadingHistogramMetadata(documentation=_, buckets=_)",
        "ReqContext.get_state(self, _)",
        "ReqContext.set_state(self, _)",
        "RequestOffloadingContext()",
        "TransferResult(_, _, _, _)",
    ],
    f"{OFFLOAD}.cpu.shared_offload_region": [
        "SharedOffloadRegion(engine_id=_, num_chunks=_, rank=_, kv_bytes_per_chunk=_, cpu_page_size=_)",
        "SharedOffloadRegion.create_next_worker_view(self, _)",
        "SharedOffloadRegion.cleanup(self)",
    ],
    f"{OFFLOAD}.tiering.base": [
        "JobResult(_, _, transfer_time=_, transfer_bytes=_)",
        "JobResult(_, success=_, successful_keys=_, transfer_time=_, transfer_bytes=_)",
        "SecondaryTierManager(_, _, _, _)",
    ],
    f"{OFFLOAD}.tiering.spec": [
        "TieringOffloadingSpec(_)",
        "TieringOffloadingSpec.get_manager(self)",
        "TieringOffloadingSpec.get_worker(self, _)",
    ],
}

ATTRIBUTES = {
    # module: class and what we read of it
    "vllm.config.kv_transfer": {"KVTransferConfig": "kv_connector_extra_config"},
    "vllm.config.load": {"LoadConfig": "load_format"},
    "vllm.config.model": {"ModelConfig": "model revision dtype seed hf_config"},
    "vllm.config.parallel": {"ParallelConfig": "data_parallel_size data_parallel_index nnodes_within_dp"},
    "vllm.config.cache": {"CacheConfig": "prefix_caching_hash_algo"},
    "vllm.config": {"VllmConfig": "kv_transfer_config load_config model_config parallel_config cache_config"},
    "vllm.platforms.interface": {"Platform": "device_type is_cpu"},
    f"{CONNECTOR}.factory": {"KVConnectorFactory": "_registry"},
    f"{CONNECTOR}.v1.offloading_connector": {"OffloadingConnector": "connector_scheduler"},
    f"{CONNECTOR}.v1.offloading.scheduler": {"OffloadingConnectorScheduler": "manager"},
    "vllm.v1.request": {
        "Request": "request_id num_prompt_tokens prompt_token_ids cache_salt lora_request mm_features block_hashes"
    },
    "vllm.lora.request": {"LoRARequest": "lora_name"},
    f"{CONNECTOR}.v1.base": {"KVConnectorRole": "SCHEDULER WORKER"},
    f"{OFFLOAD}.base": {
        "CanonicalKVCaches": "tensors group_data_refs",
        "CanonicalKVCacheTensor": "tensor page_size_bytes",
        "CanonicalKVCacheRef": "tensor_idx",
        "GPULoadStoreSpec": "block_ids group_sizes block_indices",
        "LookupResult": "HIT MISS",
        "ReqContext": "req_id _offload_key_positions get_offload_key_position",
    },
    f"{OFFLOAD}.config": {
        "OffloadingConfig": "model groups cache parallel canonical_layout kv_cache_layout extra_config",
        "OffloadingModelConfig": "dtype",
        "OffloadingGroupConfig": "group_id layer_names tokens_per_block",
        "OffloadingCacheConfig": "blocks_per_chunk tokens_per_hash",
        "OffloadingParallelConfig": """rank tp_size pp_size pcp_size dcp_size
            data_parallel_size data_parallel_index is_parallelism_agnostic""",
    },
    f"{OFFLOAD}.cpu.common": {"CPULoadStoreSpec": "chunk_ids"},
    f"{OFFLOAD}.cpu.manager": {"CPUOffloadingManager": "_policy _num_chunks _num_evictable_cache_chunks events medium"},
    f"{OFFLOAD}.cpu.policies.lru": {"LRUCachePolicy": ""},
    f"{OFFLOAD}.cpu.policies.arc": {"ARCCachePolicy": ""},
    "vllm.v1.engine": {"EngineCoreRequestType": "WAKEUP"},
    "vllm.v1.engine.core": {"EngineCoreProc": "input_queue request_block_hasher"},
    f"{OFFLOAD}.cpu.policies.base": {"ChunkStatus": "_fields_"},
    f"{OFFLOAD}.cpu.shared_offload_region": {"SharedOffloadRegion": "mmap_path _creator"},
    f"{OFFLOAD}.tiering.base": {"TransferJob": "job_id keys chunk_ids req_context"},
    f"{OFFLOAD}.tiering.manager": {"TieringOffloadingManager": "primary_tier secondary_tiers"},
    f"{OFFLOAD}.tiering.spec": {
        "TieringOffloadingSpec": """_manager _worker _scheduler_mmap _engine_id config extra_config num_chunks
            kv_bytes_per_chunk cpu_page_size_per_worker blocks_per_chunk replicated_layout""",
    },
}

HOOKS = {
    # our class: the class it extends, and the methods that vLLM is expected to call
    ("kvmesh.vllm.connector", "KVMeshConnector"): (
        (f"{CONNECTOR}.v1.offloading_connector", "OffloadingConnector"),
        "build_prom_metrics get_required_kvcache_layout on_new_request get_num_new_matched_tokens",
    ),
    ("kvmesh.vllm.spec", "KVMeshSpec"): (
        (f"{OFFLOAD}.tiering.spec", "TieringOffloadingSpec"),
        "get_manager get_worker",
    ),
    ("kvmesh.vllm.host_copy", "HostCopyWorker"): (
        (f"{OFFLOAD}.base", "OffloadingWorker"),
        "submit_store submit_load get_finished wait shutdown",
    ),
    ("kvmesh.vllm.policy", "_Publishing"): (
        (f"{OFFLOAD}.cpu.policies.base", "CachePolicy"),
        "insert touch remove evict clear",
    ),
    ("kvmesh.vllm.tier", "PeerTier"): (
        (f"{OFFLOAD}.tiering.base", "SecondaryTierManager"),
        """lookup submit_load submit_store get_finished_jobs has_pending_work drain_jobs shutdown on_new_request
        on_request_finished serve_external_requests build_metric_definitions get_stats""",
    ),
}

LEFT_TO_MIXED_IN_POLICY = {"get"}
"""Abstract methods that `_Publishing` leaves to the policy that it is mixed into."""

# -- the checks --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=VERSIONS)
def tree(request) -> Path:
    """The folder on the import path under which this version of vLLM lies."""
    if request.param != "installed":
        try:
            return cached_sources(request.param)
        except UnavailableError as error:
            pytest.skip(f"the sources of vLLM {request.param} cannot be had here: {error}")
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("vLLM is not installed")
    return Path(spec.origin).parents[1]


@pytest.fixture(scope="module")
def sources(tree) -> Sources:
    return Sources(tree)


pytestmark = pytest.mark.timeout(900)  # the first use of a version fetches it


def test_every_name_that_compat_imports_exists(sources):
    """`kvmesh.vllm.compat` holds all imports of vLLM's internals. The one in its last `try` came with 0.32."""
    body = ast.parse((ROOT / "src/kvmesh/vllm/compat.py").read_text()).body
    required = next(node for node in body if isinstance(node, ast.Try)).body
    names = [
        (node.module, alias.name)
        for node in required
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    ]
    assert len(names) > 20
    assert [f"{module}.{name}" for module, name in names if not sources.has(module, name)] == []


def test_vllm_is_imported_by_compat_alone():
    """So compat's imports and the tables above are all there is. Registration is an exception, for it must stay light;
    a benchmark uses what vLLM offers to everybody.
    """
    importing = {
        (path.relative_to(ROOT / "src").as_posix(), node.module)
        for path in (ROOT / "src").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm"
    }
    internal = {path for path, module in importing if module not in {"vllm", "vllm.config"}}
    assert internal <= {"kvmesh/vllm/compat.py", "kvmesh/vllm/plugin.py"}
    assert {path for path, _ in importing} - internal <= {"kvmesh/bench/vllm_path_engine.py"}


def test_calls_are_taken(sources):
    """The signatures accept the calls as the table writes them."""
    problems = []
    for module, calls in CALLS.items():
        for call in calls:
            node = ast.parse(call, mode="eval").body
            assert isinstance(node, ast.Call)
            try:
                signature = sources.signature(module, ast.unparse(node.func))
                signature.bind(*node.args, **{each.arg: None for each in node.keywords if each.arg})
            except (LookupError, TypeError) as error:
                problems.append(f"{call}: {error}")
    assert not problems


def test_attributes_are_there(sources):
    problems = []
    for module, classes in ATTRIBUTES.items():
        for name, read in classes.items():
            missing = set(read.split()) - sources.attributes(module, name)
            problems += [f"{module}.{name} has no {each}" for each in sorted(missing)]
    assert not problems


@pytest.mark.parametrize(("ours", "hook"), HOOKS.items(), ids=[name for _, name in HOOKS])
def test_overrides_take_what_they_are_given(sources, ours, hook):
    """Each hook exists, ours overrides it, and ours can be called in every way in which vLLM's can.

    Nothing abstract is left either: a version that asked for more would make our class impossible to construct.
    """
    base, expected = hook
    theirs, mine = sources.methods(*base), OURS.methods(*ours)
    problems = [f"nothing calls {name} any more" for name in set(expected.split()) - set(theirs)]
    problems += [f"{name} is not overridden" for name in set(expected.split()) - set(mine)]
    abstract = {name for name, node in theirs.items() if is_abstract(node)}
    elsewhere = LEFT_TO_MIXED_IN_POLICY if ours[1] == "_Publishing" else set()
    problems += [f"{name} is abstract" for name in abstract - set(mine) - elsewhere]
    for name in (set(mine) & set(theirs)) - {"__init__"}:
        parameters = list(signature_of(theirs[name]).parameters.values())
        by_name = {each.name for each in parameters if each.default is None or each.kind is each.KEYWORD_ONLY}
        required = [each.name for each in parameters if each.name not in by_name]
        signature = signature_of(mine[name])
        try:
            signature.bind(*required)
            signature.bind(*required, **dict.fromkeys(by_name))
        except TypeError as error:
            problems.append(f"{name}{signature} cannot be called as {name}{inspect.Signature(parameters)}: {error}")
    assert not problems


def test_the_tiers_constructor_takes_what_vllms_factory_passes(sources):
    (factory,) = [
        node
        for node in ast.walk(
            sources.methods(f"{OFFLOAD}.tiering.factory", "SecondaryTierFactory")["create_secondary_tier"]
        )
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "tier_cls"
    ]
    names = [each.arg for each in factory.keywords if each.arg]
    signature_of(OURS.methods("kvmesh.vllm.tier", "PeerTier")["__init__"]).bind(None, **dict.fromkeys(names))


@pytest.mark.parametrize("method", ["get_manager", "create_worker"])
def test_the_pool_is_one_file_that_stays_open(sources, method):
    """A region may be split over files of which all but one are closed (0.33); the one that tiers see must not be."""
    made = [
        node
        for node in ast.walk(sources.methods(f"{OFFLOAD}.tiering.spec", "TieringOffloadingSpec")[method])
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "SharedOffloadRegion"
    ]
    assert [sorted(str(each.arg) for each in call.keywords) for call in made] == [
        ["cpu_page_size", "engine_id", "kv_bytes_per_chunk", "num_chunks", "rank"]
    ]


@pytest.mark.parametrize("tree", [version for version in VERSIONS if version != "installed"], indirect=True)
def test_the_adapters_unit_tests_pass_over_this_version(tree, request, tmp_path):
    """The tests of `tests/unit/vllm` in a process of their own, with this version first on the import path."""
    version = request.node.callspec.params["tree"]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "tests/unit/vllm",
        "-p",
        "no:cacheprovider",
        f"--basetemp={tmp_path}/own",
    ]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(tree), str(ROOT / "src")))},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert f"vllm {version} from {tree}" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.returncode == 0, done.stdout[-6000:]


def test_the_range_that_is_accepted_is_the_range_that_is_checked():
    assert Version(VERSIONS[0]) == SUPPORTED_FROM
    assert Version(VERSIONS[-1]) < SUPPORTED_BELOW <= Version("0.34")
