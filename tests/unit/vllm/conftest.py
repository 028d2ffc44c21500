from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from support.vllm_fakes import clear_configuration


def pytest_report_header() -> str:
    """Which vLLM these tests ran over: `tests/contract` runs them over others than the installed one."""
    import vllm.version  # noqa: PLC0415 - tests without vLLM are collected too

    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    return f"vllm {vllm.version.__version__} from {Path(spec.origin).parents[1]}"


@pytest.fixture(autouse=True)
def no_configuration(monkeypatch):
    clear_configuration(monkeypatch)
