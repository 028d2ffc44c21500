"""What our connector makes of vLLM's configuration, and what it refuses."""

from __future__ import annotations

import copy
import functools
from types import SimpleNamespace

import prometheus_client
import pytest
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.v1.kv_offload.factory import OffloadingSpecFactory

from kvmesh.core.gate import Prefill, Verdict
from kvmesh.core.reasons import MissReason
from kvmesh.errors import ConfigError, UnsupportedError
from kvmesh.node.fetch_jobs import FinishedJob
from kvmesh.node.state import NodeState
from kvmesh.vllm import connector
from kvmesh.vllm.connector import FACTS_KEY, KVMeshConnector, configure, tier_config
from kvmesh.vllm.tier_metrics import FETCHED_CHUNKS, LOOKUPS, TierMetrics
from support.vllm_fakes import DIRECTORY, FACTS, make_kv_cache_config, make_offloading_config, make_vllm_config


def extra_of(vllm_config):
    return vllm_config.kv_transfer_config.kv_connector_extra_config


def test_our_keys_become_vllms(monkeypatch):
    """The user writes our YAML; vLLM reads its own keys."""
    monkeypatch.setenv("KVMESH_POOL_SIZE_GB", "0.5")
    ours = {"chunk_size": 64, "cache_policy": "arc", "save_decode_cache": True}
    vllm_config = make_vllm_config(extra=ours)
    assert configure(vllm_config).chunk_tokens == 64
    assert extra_of(vllm_config) == {
        **DIRECTORY,
        **ours,
        "block_size": 64,
        "cache_policy_module_path": "kvmesh.vllm.policy",
        "cpu_bytes_to_use": 1 << 29,
        "eviction_policy": "KVMeshARC",
        "offload_prompt_only": False,
        "secondary_tiers": [{"type": "PeerTier", "module_path": "kvmesh.vllm.tier"}],
        "spec_module_path": "kvmesh.vllm.spec",
        "spec_name": "KVMeshSpec",
    }


def test_filling_twice_changes_nothing():
    """The class is asked before the connector is made, in several processes; each may be first."""
    vllm_config = make_vllm_config()
    first = configure(vllm_config)
    once = copy.deepcopy(extra_of(vllm_config))
    assert configure(vllm_config) == first
    assert extra_of(vllm_config) == once


def test_without_sharing_there_is_no_tier_below_the_pool():
    vllm_config = make_vllm_config(extra={"share": False})
    configure(vllm_config)
    assert extra_of(vllm_config)["secondary_tiers"] == []


def test_without_a_pool_there_is_nothing_to_connect():
    """`local_cpu: false` without sharing would give vLLM a pool of zero bytes; the message says what to leave away."""
    with pytest.raises(ConfigError, match=r"pool_enabled.*kv-transfer-config"):
        configure(make_vllm_config(extra={"share": False, "local_cpu": False}))


def test_vllm_finds_our_classes_by_what_we_fill_in():
    vllm_config = make_vllm_config()
    configure(vllm_config)
    assert OffloadingSpecFactory.get_spec_cls(extra_of(vllm_config)).__name__ == "KVMeshSpec"


def test_an_unknown_key_is_named():
    with pytest.raises(ConfigError, match="chunk_sise"):
        configure(make_vllm_config(extra={"chunk_sise": 64}))


@pytest.mark.parametrize("role", [KVConnectorRole.SCHEDULER, KVConnectorRole.WORKER])
def test_a_chunk_size_that_is_no_multiple_of_the_block_size_is_named(role, monkeypatch):
    """The message carries the user's key and where it was set, not only vLLM's name for it."""
    monkeypatch.setenv("KVMESH_CHUNK_TOKENS", "40")
    with pytest.raises(ConfigError) as caught:
        KVMeshConnector(make_vllm_config(), role, make_kv_cache_config())
    (problem,) = caught.value.problems
    assert (problem.key, problem.found, problem.where) == ("chunk_tokens", "40", "env KVMESH_CHUNK_TOKENS")
    assert "multiple" in problem.hint


def test_groups_with_different_block_sizes_are_refused():
    """One chunk size cannot suit them; vLLM says so with an assertion, we with the key."""
    with pytest.raises(ConfigError, match=r"chunk_tokens.*all KV cache groups"):
        KVMeshConnector(make_vllm_config(), KVConnectorRole.WORKER, make_kv_cache_config(block_tokens=(16, 32)))


def test_other_errors_of_vllm_pass_unchanged(monkeypatch):
    def fail(*_: object) -> None:
        raise ValueError("something else")

    monkeypatch.setattr(connector.OffloadingConnector, "__init__", fail)
    with pytest.raises(ValueError, match=r"^something else$"):
        KVMeshConnector(make_vllm_config(), KVConnectorRole.WORKER, make_kv_cache_config())


@pytest.mark.parametrize("role", [KVConnectorRole.SCHEDULER, KVConnectorRole.WORKER])
def test_one_instance_on_several_hosts_is_refused(role):
    """Its workers have no common pool."""
    with pytest.raises(UnsupportedError, match="2 hosts per instance"):
        KVMeshConnector(make_vllm_config(nnodes_within_dp=2), role, make_kv_cache_config())


def make_bare(self) -> None:
    """As vLLM leaves a connector, without anything behind it."""
    self.connector_scheduler = None


class TestRecords:
    """The connector tells its tier of requests, and explanations never cost one."""

    @pytest.fixture
    def tier(self, monkeypatch):
        tier = SimpleNamespace(met=[], told=[])
        tier.meet = tier.met.append
        tier.tell = lambda *told: tier.told.append(told)
        monkeypatch.setattr(connector.OffloadingConnector, "__init__", lambda self, *_: make_bare(self))
        monkeypatch.setattr(connector.OffloadingConnector, "on_new_request", lambda self, request: None)
        monkeypatch.setattr(connector, "_find_tier", lambda _: tier)
        return tier

    @pytest.fixture
    def made(self, tier, monkeypatch):
        answers = [(None, False), (512, True), (0, False)]
        base = connector.OffloadingConnector
        monkeypatch.setattr(base, "get_num_new_matched_tokens", lambda *_: answers.pop(0))
        return KVMeshConnector(make_vllm_config(), KVConnectorRole.WORKER, make_kv_cache_config())

    def test_a_request_is_told_of_when_vllm_has_settled(self, made, tier):
        made.on_new_request("request")
        assert [made.get_num_new_matched_tokens("request", 256) for _ in range(2)] == [(None, False), (512, True)]
        assert (tier.met, tier.told) == (["request"], [("request", 256, 512)])

    def test_an_error_in_there_is_logged_once_and_costs_nothing(self, made, tier, monkeypatch):
        logged = []
        monkeypatch.setattr(connector.logger, "exception", logged.append)
        tier.meet = tier.tell = None  # calling it raises
        made.on_new_request("request")
        assert [made.get_num_new_matched_tokens("request", 0)[0] for _ in range(3)] == [None, 512, 0]
        assert len(logged) == 1


def test_only_the_scheduler_reads_the_model(monkeypatch):
    """Workers need no fingerprint; the scheduler leaves it where the tier finds it."""
    monkeypatch.setattr(connector.OffloadingConnector, "__init__", lambda self, *_: make_bare(self))
    monkeypatch.setattr(connector.fingerprint, "model_facts", lambda _: FACTS)
    for role, facts in ((KVConnectorRole.WORKER, None), (KVConnectorRole.SCHEDULER, FACTS)):
        vllm_config = make_vllm_config()
        KVMeshConnector(vllm_config, role, make_kv_cache_config())
        assert extra_of(vllm_config).get(FACTS_KEY) == facts


def test_each_data_parallel_rank_is_an_instance():
    """The rank is in the id and in the ports, in the connector and in the tier."""
    keys = {"instance_id": "a", "peer_port": 8200}
    config = configure(make_vllm_config(extra=dict(keys), data_parallel_size=2, data_parallel_index=1))
    assert (config.instance_id, config.peer_port) == ("a-dp1", 8201)


def test_the_tier_reads_the_same_configuration():
    """What the connector left in vLLM's extra configuration does not disturb ours."""
    vllm_config = make_vllm_config(extra={"instance_id": "a", "chunk_size": 64})
    configured = configure(vllm_config)
    extra_of(vllm_config)[FACTS_KEY] = dict(FACTS)

    spec = SimpleNamespace(extra_config=extra_of(vllm_config), config=make_offloading_config())
    assert tier_config(spec) == configured


def test_our_metrics_appear_beside_vllms():
    """The exporter of vLLM takes the tier's definitions and its numbers."""
    registry = prometheus_client.CollectorRegistry()
    metric_types = {
        kind: functools.partial(kind, registry=registry)
        for kind in (prometheus_client.Counter, prometheus_client.Gauge, prometheus_client.Histogram)
    }
    exporter = KVMeshConnector.build_prom_metrics(make_vllm_config(), metric_types, ["model_name"], {0: ["tiny"]})

    node = SimpleNamespace(state=NodeState(True, True, True, 2), restarts=0, changes=0, visible_count=lambda: 7)
    metrics = TierMetrics()
    metrics.looked_up(None)
    metrics.looked_up(MissReason.NOT_PUBLISHED)
    metrics.fetched(FinishedJob(1, [None, MissReason.EVICTED], 4096, 0.25, ["b"]))
    prefill = Prefill()
    prefill.computed(0, 1000, 0.5)
    metrics.decided(Verdict.SLOWER)
    exporter.observe(metrics.take(node, prefill).data)

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(name, {"model_name": "tiny", **labels})

    assert value(f"{LOOKUPS}_total", result="hit", reason="") == 1
    assert value(f"{LOOKUPS}_total", result="miss", reason="not_published") == 1
    assert value(f"{FETCHED_CHUNKS}_total") == 1
    assert value("kvmesh_fetched_bytes_total") == 4096
    assert value("kvmesh_fetch_missed_chunks_total", reason="evicted") == 1
    assert value("kvmesh_fetch_seconds_sum") == 0.25
    assert value("kvmesh_visible_chunks") == 7
    assert value("kvmesh_peers") == 2
    assert value("kvmesh_node_up") == 1
    assert value("kvmesh_gate_decisions_total", verdict="slower") == 1
    assert value("kvmesh_prefill_tokens_per_second") == 2000


def test_layout_is_asked_of_vllm():
    """The class method works on a configuration that nobody has filled yet."""
    vllm_config = make_vllm_config()
    assert KVMeshConnector.get_required_kvcache_layout(vllm_config) is not None
    assert "spec_name" in extra_of(vllm_config)
