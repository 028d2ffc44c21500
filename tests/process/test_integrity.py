"""Wrong bytes at a holder: a miss, counted, visible to people, and not asked for again until there is reason to."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator

import pytest

from kvmesh.bench.cluster import Controller
from kvmesh.bench.stand_in import StandInEngine, content, make_key
from kvmesh.core.reasons import MissReason
from support.stand_ins import make_config, running_controller, running_engine

pytestmark = [pytest.mark.process, pytest.mark.timeout(120)]

KEYS = [make_key(f"chunk-{number}") for number in range(8)]


@pytest.fixture(scope="module")
def controller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Controller]:
    with running_controller(tmp_path_factory.mktemp("controller")) as running:
        yield running


@pytest.fixture(params=["tcp", "nixl"])
def pair(controller: Controller, request: pytest.FixtureRequest) -> Iterator[tuple[StandInEngine, StandInEngine]]:
    if request.param == "nixl":
        nixl_agent = pytest.importorskip("kvmesh.transfer.nixl_agent")
        if problem := nixl_agent.unavailable():
            pytest.skip(problem)
    names = [f"{name}-{os.urandom(4).hex()}" for name in ("bad", "reader")]
    options = {"transfer_channel": request.param}
    with (
        running_engine(make_config(controller, names[0], **options)) as holder,
        running_engine(make_config(controller, names[1], **options)) as reader,
    ):
        assert holder.wait_peers(1)
        assert reader.wait_peers(1)
        yield holder, reader


def test_a_chunk_gone_bad_is_a_miss_and_its_holder_is_not_asked_again(
    pair: tuple[StandInEngine, StandInEngine], controller: Controller
) -> None:
    holder, reader = pair
    holder.put(KEYS)
    assert reader.wait_visible(KEYS)
    slot = holder._slots[KEYS[3]]
    holder.pool.row(slot)[100] ^= 1  # one bit of the holder's memory
    got = reader.get(KEYS)
    assert 3 <= got.fetched <= 7, "what comes behind it is not waited for"
    assert got.wrong == 0
    assert got.misses[MissReason.CORRUPT] == 1
    wait_until(lambda: not reader.node.is_visible(KEYS[3]))
    assert reader.get(KEYS[3:4]).misses == {MissReason.NOT_PUBLISHED: 1}, "it costs no second request"

    name = holder.node.ready.instance_id  # type: ignore[union-attr]

    def reported() -> int:
        return next(one["corrupt_chunks"] for one in controller.instances() if one["instance_id"] == name)

    wait_until(lambda: reported() == 1)
    lines = [line for line in controller.log().splitlines() if "corrupt_chunks" in line]
    assert len([line for line in lines if f"instance={name}" in line]) == 1

    holder.forget(KEYS[3:4])
    holder.put(KEYS[3:4])
    assert reader.wait_visible(KEYS), "announced anew, it is trusted again"
    assert reader.get_all(KEYS)
    assert bytes(reader.pool.row(reader._slots[KEYS[3]])) == content(KEYS[3], reader.chunk_bytes)


def wait_until(check: Callable[[], bool], timeout_s: float = 20.0) -> None:
    until_s = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < until_s, "waited in vain"
        time.sleep(0.005)
