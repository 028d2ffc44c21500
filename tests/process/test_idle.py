"""What an idle cluster costs: the limits that the README names."""

from __future__ import annotations

import pytest

from kvmesh.bench.idle import measure_idle

pytestmark = [pytest.mark.process, pytest.mark.alone, pytest.mark.timeout(180)]

LIMIT_PERCENT = 2.0


@pytest.mark.parametrize(
    ("channel", "node_mb"),
    [pytest.param("tcp", 150, id="tcp"), pytest.param("nixl", 350, id="nixl", marks=pytest.mark.nixl)],
)
def test_an_idle_cluster_costs_next_to_nothing(channel: str, node_mb: float) -> None:
    """A controller and two nodes: under 2 % of a core in all (of CPU time), and memory within its limits."""
    rows = measure_idle(5.0, channel, windows=3, enough_percent=LIMIT_PERCENT)
    assert sum(row.cpu_percent for row in rows) < LIMIT_PERCENT, rows
    controller, *nodes = rows
    assert controller.memory_mb < 150
    assert len(nodes) == 2
    assert all(row.memory_mb < node_mb for row in nodes), rows
