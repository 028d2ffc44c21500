"""Commands run in this process, against a small HTTP server."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import pytest
from click.testing import Result
from typer.testing import CliRunner

from kvmesh.cli.app import app
from support.fake_controller import FakeController, fake_controller

Run = Callable[..., Result]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in ("KVMESH_CONTROLLER", "KVMESH_CONTROLLER_CA", "KVMESH_CLUSTER_KEY", "KVMESH_CONFIG_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("LMCACHE_CONFIG_FILE", raising=False)


@pytest.fixture
def controller() -> Iterator[FakeController]:
    with fake_controller() as running:
        yield running


@pytest.fixture
def run(controller: FakeController) -> Run:
    """`run("status", "--json")` with the fake controller's address in the environment."""

    def invoke(*arguments: str, text: str = "", **environ: str) -> Result:
        env = {"KVMESH_CONTROLLER": controller.address, "COLUMNS": "200", **environ}
        return CliRunner().invoke(app, arguments, input=text, env=env)

    return invoke


@pytest.fixture
def run_json(run: Run) -> Callable[..., object]:
    def invoke(*arguments: str, **options: str) -> object:
        result = run(*arguments, "--json", **options)
        return json.loads(result.stdout)

    return invoke
