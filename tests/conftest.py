"""How tests run in several processes at the same time, and how Hypothesis runs: the same examples in every run, at
leisure. `pytest --hypothesis-profile=default tests/fuzz` looks elsewhere each time.
"""

from __future__ import annotations

import itertools
import random
import re

import pytest
from hypothesis import settings
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from kvmesh.bench import cluster

settings.register_profile("same-each-time", derandomize=True, deadline=None, database=None)
settings.load_profile("same-each-time")

NETWORK = ("test_chaos.py", "test_healing.py", "test_planted_faults.py")
"""Files whose network namespaces have the same addresses."""


def group_of(nodeid: str) -> str:
    """Tests of one group run one after the other, in one process: those of a file, which share what it has started;
    contract tests by the version of vLLM, which is fetched and read once.
    """
    file, _, name = nodeid.partition("::")
    if file.endswith(NETWORK):
        return "network"
    version = re.search(r"\[(\d+\.\d+\.\d+|installed)", name)
    return version[1] if version is not None and "/contract/" in file else file


class ByGroup(LoadScopeScheduling):
    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> ByGroup | None:
    """With `--dist loadgroup` groups are those of `group_of`."""
    return ByGroup(config, log) if config.getvalue("dist") == "loadgroup" else None


def pytest_configure(config: pytest.Config) -> None:
    """Give each process ports of its own: a port that one has found free, another must not find free as well."""
    worker = getattr(config, "workerinput", None)
    if worker is None:
        return
    ports = cluster.PORTS[int(worker["workerid"].removeprefix("gw")) :: worker["workercount"]]
    cluster._candidates = itertools.cycle(random.sample(ports, len(ports)))
