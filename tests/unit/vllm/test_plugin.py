"""How vLLM finds us."""

from __future__ import annotations

import importlib.metadata
from types import SimpleNamespace

import pytest
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

from kvmesh.vllm.plugin import CONNECTOR_NAME, register

CONFIG = SimpleNamespace(kv_connector=CONNECTOR_NAME, kv_connector_module_path=None)


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    monkeypatch.setattr(KVConnectorFactory, "_registry", dict(KVConnectorFactory._registry))


def test_registering_twice_is_registering_once():
    """Plugins run in several processes, and in some of them more than once."""
    register()
    register()
    assert KVConnectorFactory.get_connector_class(CONFIG).__name__ == CONNECTOR_NAME


def test_the_package_declares_the_entry_point():
    """`pip install kvmesh` is all that `--kv-transfer-config` needs."""
    (entry,) = importlib.metadata.entry_points(group="vllm.general_plugins", name="kvmesh")
    assert entry.load() is register


def test_vllm_takes_the_connector_for_a_best_effort_cache():
    """Hybrid models stay possible, and KV that could not be saved is no failed request."""
    register()
    assert KVConnectorFactory.supports_hma_config(CONFIG)
    assert KVConnectorFactory.get_connector_class(CONFIG).requires_kv_delivery.fget(None) is False
