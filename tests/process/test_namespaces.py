"""Namespaces of benchmarks that were killed do not spoil the next ones."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kvmesh.bench.chaos.network import unavailable
from kvmesh.bench.namespaces import name_of, remove_left, run

pytestmark = pytest.mark.process

LEAVE_ONE = """
from kvmesh.bench.namespaces import name_of, run
run("ip", "netns", "add", name_of("left"))
print(name_of("left"))
"""


def test_those_of_the_dead_are_removed_and_those_of_the_living_stay() -> None:
    if (reason := unavailable()) is not None:
        pytest.skip(reason)
    command = [sys.executable, "-c", LEAVE_ONE]
    left = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    ours = name_of("ours")
    run("ip", "netns", "add", ours)
    try:
        assert left in run("ip", "netns", "list").split()
        remove_left()
        names = run("ip", "netns", "list").split()
        assert left not in names
        assert ours in names
    finally:
        run("ip", "netns", "del", ours)
