"""Unsupported versions stop the engine at start-up, in one sentence."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import pytest
import vllm.version
from packaging.version import Version

from kvmesh.errors import VersionError
from kvmesh.vllm import compat


@pytest.mark.parametrize("version", ["0.31.0", "0.31.0rc2", "0.32.0+cpu", "0.32.1.dev7+gabc", "0.33.4"])
def test_supported_versions(version):
    compat.check_version(Version(version))


@pytest.mark.parametrize("version", ["0.30.9", "0.34.0", "0.34.0.dev1", "1.0", "0.0.1"])
def test_other_versions_are_refused(version):
    with pytest.raises(VersionError, match=r"vLLM: expected a version from 0.31 to 0.33, found " + version):
        compat.check_version(Version(version))


def test_sources_that_were_never_built_have_no_version(monkeypatch):
    """It then calls itself "dev"; nobody can say whether that is supported."""
    monkeypatch.setattr(vllm.version, "__version__", "dev")
    with pytest.raises(VersionError, match="found 'dev'"):
        compat.installed_version()


def test_an_internal_that_moved_is_named(monkeypatch):
    """A build within the range may still lack something; the message says what, not a traceback."""
    monkeypatch.setitem(sys.modules, "vllm.v1.kv_offload.tiering.spec", ModuleType("vllm.v1.kv_offload.tiering.spec"))
    spec = importlib.util.find_spec("kvmesh.vllm.compat")
    fresh = importlib.util.module_from_spec(spec)
    with pytest.raises(VersionError, match=r"without vllm\.v1\.kv_offload\.tiering\.spec") as caught:
        spec.loader.exec_module(fresh)
    assert "TieringOffloadingSpec" in str(caught.value.__cause__)
