"""The command line's processes, and what they leave behind."""

from __future__ import annotations

import subprocess
import sys

import psutil
import pytest

from process.controller_nodes import wait_for

pytestmark = [pytest.mark.process, pytest.mark.timeout(120)]


def test_a_benchmark_that_is_told_to_end_leaves_no_process_behind() -> None:
    """Its servers take gigabytes and whole cores."""
    command = [sys.executable, "-m", "kvmesh.cli", "bench", "idle", "--seconds", "100"]
    with subprocess.Popen(command, start_new_session=True) as process:
        try:
            itself = psutil.Process(process.pid)
            wait_for(lambda: len(itself.children(recursive=True)) >= 3, 60)
            started = itself.children(recursive=True)
            process.terminate()
            assert process.wait(60) != 0
            _, alive = psutil.wait_procs(started, 20)
            assert not alive
        finally:
            process.kill()
