from __future__ import annotations

import pytest
from support.vllm_fakes import clear_configuration


@pytest.fixture(autouse=True)
def no_configuration(monkeypatch):
    clear_configuration(monkeypatch)
