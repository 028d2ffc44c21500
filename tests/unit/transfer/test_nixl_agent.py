from __future__ import annotations

import os
import subprocess
import sys

import pytest

from kvmesh.transfer.nixl_agent import prepare_environment, unavailable

nixl = pytest.mark.nixl


@pytest.fixture
def environment(monkeypatch):
    for name in [name for name in os.environ if name.startswith("UCX_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    return os.environ


@pytest.mark.parametrize(
    ("host", "devices"), [("127.0.0.1", "lo"), ("localhost", "lo"), ("::1", "lo"), ("10.0.0.1", None), ("node-a", None)]
)
def test_a_node_on_loopback_keeps_ucx_there(environment, host, devices):
    prepare_environment(host)
    assert environment.get("UCX_NET_DEVICES") == devices
    assert environment["UCX_TCP_KEEPIDLE"] == "2s"


def test_what_the_operator_has_set_stays(environment):
    environment.update(UCX_NET_DEVICES="mlx5_0:1", UCX_TCP_KEEPIDLE="9s", UCX_TLS="rc")
    prepare_environment("127.0.0.1")
    assert (environment["UCX_NET_DEVICES"], environment["UCX_TCP_KEEPIDLE"]) == ("mlx5_0:1", "9s")
    assert environment["UCX_TLS"] == "rc"


@nixl
@pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
def test_loading_nixl_does_not_load_torch():
    """It would take seconds and 200 MB; afterwards torch can be imported as ever."""
    program = """
import sys
from kvmesh.transfer.nixl_agent import load
load()
assert "torch" not in sys.modules
assert not any("TorchRefuser" in repr(finder) for finder in sys.meta_path)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_missing_nixl_is_explained():
    """Every package that was tried is named, with what to do."""
    program = """
import sys
for name in ("nixl", "nixl_cu12", "nixl_cu13"):
    sys.modules[name] = None
from kvmesh.transfer.nixl_agent import unavailable
problem = unavailable()
assert "nixl._api" in problem and "nixl_cu12._api" in problem and "kvmesh[nixl]" in problem, problem
"""
    subprocess.run([sys.executable, "-c", program], check=True)
