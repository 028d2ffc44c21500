"""A small swarm around a real controller: everybody joins, hears of everybody else's events, and nobody is lost."""

from __future__ import annotations

import contextlib
import functools

import pytest

from kvmesh.bench.swarm import Swarm, SwarmPlan, percentile
from kvmesh.bench.swarm_controller import ControllerLink, ControllerUrls, tag_of
from kvmesh.wire import directory as wire
from process.controller_nodes import running_controller, wait_for
from support.keys import environment_key

pytestmark = pytest.mark.process


def test_swarm_joins_and_is_heard():
    """Two processes, 40 instances of two formats, some hundred events: no gap, nobody dropped, delays measured."""
    plan = SwarmPlan(instances=40, chunks=50, formats=2, processes=2, heartbeat_interval_s=0.5)
    with running_controller() as controller:
        ports = controller.ports
        key = environment_key()
        urls = ControllerUrls(
            f"tcp://127.0.0.1:{ports['pull']}",
            f"tcp://127.0.0.1:{ports['reply']}",
            None if key is None else key.get_secret_value(),
        )
        with contextlib.closing(Swarm(plan, functools.partial(ControllerLink, urls))) as swarm:
            swarm.start()
            swarm.join()
            wait_for(lambda: controller.get("/api/v1/totals")["entries"] == 40 * 50)
            swarm.publish(400.0)
            seen = wait_for(lambda: (one := swarm.statistics()).changes_heard > 400 and one)
            assert seen.gaps == 0
            assert len(seen.delays_s) > 100
            assert 0 < percentile(seen.delays_s, 0.5) < 10
            totals = controller.get("/api/v1/totals")
            assert (totals["instances"], totals["formats"]) == (40, 2)
        wait_for(lambda: not controller.get("/api/v1/totals")["instances"])


@pytest.mark.parametrize(
    "message", [wire.Leave("a", "0" * 16), wire.HeartbeatAck("0" * 16, known=True), wire.Batch([])]
)
def test_kind_is_read_off_the_encoding(message):
    """Without decoding: that is what lets one process hear for hundreds of instances."""
    assert tag_of(wire.encode(message)) == type(message).__name__
    assert tag_of(b"") == ""
