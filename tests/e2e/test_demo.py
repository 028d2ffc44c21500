"""`kvmesh demo --once --json`: what a script sees of the demonstration."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from kvmesh.bench import demo
from kvmesh.cli.app import app
from kvmesh.models import TINY, ModelError, make_smollm2, make_tiny_llama
from support.prefork import PreforkedInstance

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


def run_demo(folder: Path) -> tuple[int, dict[str, object]]:
    """Run the command; returns its exit status and what it printed."""
    command = [sys.executable, "-m", "kvmesh.cli", "demo", "--once", "--json", "--logs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580, check=False)
    assert done.stdout, done.stderr
    assert not [
        process
        for process in psutil.process_iter(["cmdline"])
        if str(folder) in " ".join(process.info["cmdline"] or ()) and process.pid != os.getpid()
    ], "the demo leaves no process behind"
    return done.returncode, json.loads(done.stdout)


def test_the_demo_on_a_real_model(tmp_path: Path) -> None:
    """SmolLM2 and the seed's prompt: pulled, quicker than cold, and the same text."""
    try:
        make_smollm2()
    except ModelError as error:
        pytest.skip(f"SmolLM2 cannot be had: {error}")
    status, figures = run_demo(tmp_path)
    assert status == 0
    assert figures["text_identical"] is True
    assert figures["pulled_tokens"] == 1024
    assert float(str(figures["peer_ttft_s"])) < float(str(figures["cold_ttft_s"]))


def test_nothing_pulled_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With instances that only publish, the exit status says that nothing was pulled."""
    monkeypatch.setattr(demo, "Instance", PreforkedInstance)
    monkeypatch.setattr(demo.signal, "signal", lambda *_: None)  # this process keeps its own
    model = make_tiny_llama(shape=TINY)
    command = ["demo", "--once", "--json", "--logs", str(tmp_path), "--model", str(model)]
    result = CliRunner().invoke(app, command, env={"KVMESH_RETRIEVE_LOCATIONS": "pool"})
    assert result.exit_code == 1, result.output
    figures = json.loads(result.stdout)
    assert figures["pulled_tokens"] == 0
    assert figures["ok"] is False
