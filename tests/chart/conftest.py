"""Helm and Kubernetes' schemas, where they have been fetched."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import pytest

from support.helm import TOOLS, Helm, find_tool


@pytest.fixture(scope="session", params=["helm3", "helm4"])
def helm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Helm:
    """Both versions."""
    return Helm(find_tool(request.param), tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="session")
def any_helm(tmp_path_factory: pytest.TempPathFactory) -> Helm:
    """One version, for what is decided by templates alone."""
    return Helm(find_tool("helm3"), tmp_path_factory.mktemp("helm"))


@pytest.fixture(scope="session")
def schemas() -> ModuleType:
    """The package with Kubernetes' schemas."""
    packages = TOOLS / "packages"
    if not packages.is_dir():
        pytest.skip("no kubernetes-validate: make chart-check fetches it")
    sys.path.append(str(packages))
    return importlib.import_module("kubernetes_validate")
