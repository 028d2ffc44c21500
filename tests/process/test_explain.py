"""Explain over real nodes and a real controller: plant a cause, ask for the request, find the cause named."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from kvmesh.bench.cluster import Controller
from kvmesh.bench.stand_in import StandInEngine, make_key, stand_in_format
from kvmesh.core.reasons import MissReason
from kvmesh.wire import link
from process.controller_nodes import wait_for
from support.stand_ins import CHUNK_BYTES, make_config, running_controller, running_engine

pytestmark = [pytest.mark.process, pytest.mark.timeout(120)]

CHUNK_TOKENS = stand_in_format(CHUNK_BYTES).chunk_tokens
JSON = dict[str, Any]


def keys(name: str, count: int = 4) -> list[bytes]:
    return [make_key(f"{name}-{number}") for number in range(count)]


@pytest.fixture(scope="module")
def controller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Controller]:
    with running_controller(tmp_path_factory.mktemp("controller")) as running:
        yield running


@pytest.fixture(scope="module")
def holder(controller: Controller) -> Iterator[StandInEngine]:
    with running_engine(make_config(controller, "holder", admin_port=0)) as engine:
        yield engine


@pytest.fixture(scope="module")
def reader(controller: Controller, holder: StandInEngine) -> Iterator[StandInEngine]:
    with running_engine(make_config(controller, "reader", admin_port=0)) as engine:
        assert engine.wait_peers(1)
        yield engine


def get(url: str, path: str, **params: str | float) -> JSON:
    return httpx.get(f"{url}{path}", params=params, timeout=20).raise_for_status().json()  # type: ignore[no-any-return]


def explain(controller: Controller, request_id: str, reason: str = "") -> JSON:
    """The best explanation of a request, as soon as there is one. With a reason: once that is the first cause."""

    def find() -> JSON | None:
        answer = httpx.get(f"{controller.url}/api/v1/explain/{request_id}", timeout=20)
        if answer.status_code == 404:
            return None
        one: JSON = answer.raise_for_status().json()["explanations"][0]
        return one if not reason or (one["causes"] and one["causes"][0]["reason"] == reason) else None

    return wait_for(find)


def admin(engine: StandInEngine) -> str:
    assert engine.node.ready is not None
    return f"http://127.0.0.1:{engine.node.ready.admin_port}"


def tell(engine: StandInEngine, request_id: str, wanted: list[bytes], **fields: Any) -> None:
    """A request that only looks."""
    engine.node.record(
        link.RequestRecord(
            request_id=request_id,
            prompt_tokens=fields.pop("prompt_tokens", len(wanted) * CHUNK_TOKENS),
            keys=wanted,
            misses=[link.Miss(wanted[0], engine.node.state.why_invisible())] if wanted else [],
            **fields,
        )
    )


def test_what_was_found_where(controller: Controller, holder: StandInEngine, reader: StandInEngine) -> None:
    """Two in the own pool, four from the peer, two that nobody has; asked for by the name that the client knows."""
    wanted = keys("found", 8)
    holder.put(wanted[:6])
    assert reader.wait_visible(wanted[:6])
    reader.put(wanted[:2])
    assert reader.get(wanted, request_id="cmpl-abc-0-1f2e3d4c").fetched == 4
    one = explain(controller, "abc")
    assert one["found"] == {"device": 0, "own_pool": 2, "peer": 4, "nowhere": 2}
    assert (one["instance_id"], one["prompt_tokens"]) == ("reader", 8 * CHUNK_TOKENS)
    assert [(span["chunks"], span["where"], span["instance_id"]) for span in one["spans"]][:2] == [
        (2, "own_pool", ""),
        (4, "peer", "holder"),
    ]
    assert one["causes"][0]["reason"] == "not_published"
    assert one["fetches"][0]["holders"] == ["holder"]
    assert one["peers"][0]["breaker"] == "closed"
    (own,) = get(admin(reader), "/explain/abc")["explanations"]
    assert own | {"age_s": 0} == one | {"age_s": 0}, "the node's own port says the same"


def test_evicted(controller: Controller, holder: StandInEngine, reader: StandInEngine) -> None:
    """Before the directory heard of it, and after."""
    wanted = keys("evicted")
    holder.put(wanted)
    assert reader.wait_visible(wanted)
    holder.forget(wanted[2:])
    reader.get(wanted, request_id="early")
    early = explain(controller, "early", "evicted")
    assert (early["found"]["peer"], early["causes"][0]["instance_id"]) == (2, "holder")
    wait_for(lambda: not reader.node.is_visible(wanted[3]))
    reader.get(wanted, request_id="late")
    late = explain(controller, "late", "evicted")
    assert "Instance holder lost it" in late["causes"][0]["text"]


def test_the_deadline(controller: Controller, holder: StandInEngine, reader: StandInEngine) -> None:
    wanted = keys("deadline")
    holder.put(wanted)
    assert reader.wait_visible(wanted)
    reader.get(wanted, timeout_s=1e-6, request_id="hasty")
    assert explain(controller, "hasty", "deadline")["causes"][0]["chunks"] == 4


def test_a_peer_at_an_address_that_nobody_reaches(
    controller: Controller, holder: StandInEngine, reader: StandInEngine
) -> None:
    """The address is named; so is the breaker, when the next request meets it."""
    wanted = keys("unreachable")
    with running_engine(make_config(controller, "astray", advertise_host="127.0.0.2")) as astray:
        astray.put(wanted)
        assert reader.wait_visible(wanted)
        reader.get(wanted, request_id="unreachable")
        cause = explain(controller, "unreachable", "peer_unreachable")["causes"][0]
        assert "127.0.0.2" in cause["detail"]["address"]
        assert "advertise_host" in cause["change"]
        reader.get(wanted, request_id="broken")
        one = explain(controller, "broken", "breaker_open")
        assert one["peers"][0]["instance_id"] == "astray"
    assert reader.wait_peers(1)
    tell(reader, "gone", wanted)
    assert "Its last holder, instance astray" in explain(controller, "gone", "not_published")["causes"][0]["text"]


def test_another_format(controller: Controller, holder: StandInEngine, reader: StandInEngine) -> None:
    """An instance of the same model holds the very chunk, in another dtype. Only the controller can know."""
    wanted = keys("foreign")
    other = stand_in_format(CHUNK_BYTES, kv_dtype="fp8")
    with running_engine(make_config(controller, "stranger"), kv_format=other) as stranger:
        stranger.put(wanted)
        wait_for(lambda: "stranger" in str(get(controller.url, "/api/v1/lookup", keys=wanted[0].hex())))
        reader.get(wanted, request_id="foreign")
        (cause,) = explain(controller, "foreign", "format_mismatch")["causes"]
        assert (cause["instance_id"], cause["chunks"]) == ("stranger", 4)
        assert cause["fields"] == [{"field": "kv_dtype", "ours": "bytes", "theirs": "fp8"}]
        stranger.get(wanted[:1] + keys("alone"), request_id="alone")
        own = explain(controller, "alone", "format_mismatch")["causes"][0]
        assert own["instance_id"] in {"holder", "reader"}, "it has no peers at all, and says why"


def test_another_tenant_on_another_instance(
    controller: Controller, holder: StandInEngine, reader: StandInEngine
) -> None:
    """The two share no key; that the text is the same is known by its hash alone."""
    tell(holder, "tenant-a", keys("salt-a"), tokens_hash=b"text", separated_by=["cache_salt"])
    assert explain(controller, "tenant-a", "not_published")
    tell(reader, "tenant-b", keys("salt-b"), tokens_hash=b"text", separated_by=["cache_salt"])
    one = explain(controller, "tenant-b", "tenant_salt")
    assert (one["causes"][0]["instance_id"], one["causes"][0]["chunks"]) == ("holder", 4)
    assert "tokens_hash" not in str(one)


def test_too_early(controller: Controller, holder: StandInEngine, reader: StandInEngine) -> None:
    """Another instance was asked for the same chunk before: it is computing it."""
    tell(holder, "first", keys("early"))
    assert explain(controller, "first", "not_published")
    tell(reader, "second", keys("early"))
    cause = explain(controller, "second", "not_published")["causes"][0]
    assert cause["detail"]["asked_at"] == "holder"


def test_below_one_chunk(controller: Controller, reader: StandInEngine) -> None:
    tell(reader, "short", [], prompt_tokens=5)
    assert "It has 5 tokens" in explain(controller, "short", "below_one_chunk")["causes"][0]["text"]


def test_what_happened_while_the_node_was_down_is_told_to_the_next(
    controller: Controller, reader: StandInEngine
) -> None:
    assert reader.node.pid is not None
    restarts = reader.node.restarts
    os.kill(reader.node.pid, signal.SIGKILL)
    wait_for(lambda: not reader.node.state.alive)
    reader.get(keys("down"), request_id="down")
    assert reader.wait_node(restarts=restarts + 1)
    assert explain(controller, "down", "node_down")
    assert reader.wait_peers(1)


def test_no_directory() -> None:
    """Without a controller the node's own port explains."""
    with running_engine(make_config(None, "alone", admin_port=0)) as alone:
        alone.get(keys("alone"), request_id="alone")

        def find() -> JSON | None:
            answer = httpx.get(f"{admin(alone)}/explain/alone")
            return None if answer.status_code == 404 else answer.json()

        one = wait_for(find)["explanations"][0]
        assert one["causes"][0]["reason"] == "no_directory"
        summary = get(admin(alone), "/explain/summary")
        assert [(share["reason"], share["chunks"]) for share in summary["misses"]] == [("no_directory", 4)]
        assert get(admin(alone), "/hit-rates")["since_start"]["achieved"] == 0.0


def test_summary_list_and_errors(controller: Controller, holder: StandInEngine, reader: StandInEngine) -> None:
    answer = get(controller.url, "/api/v1/explain/summary", hours=1)
    assert {one["instance_id"] for one in answer["instances"]} == {"holder", "reader"}
    assert answer["unanswered"] == []
    shares = {share["reason"]: share for share in answer["cluster"]["misses"]}
    assert MissReason.NODE_DOWN.value in shares
    assert sum(share["share"] for share in shares.values()) == pytest.approx(1.0)
    assert all(share["change"] for share in shares.values())
    listed = get(controller.url, "/api/v1/explain", limit=1, instance="reader")["requests"]
    assert len(listed) == 1
    for path, code in (("/explain/nobody", "unknown_request"), ("/explain?instance=x", "unknown_instance")):
        refused = httpx.get(f"{controller.url}/api/v1{path}")
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, code)
        assert refused.json()["error"]["hint"]


def test_hit_rates(controller: Controller, holder: StandInEngine, reader: StandInEngine) -> None:
    """Eight chunks asked for on both: half of the lookups could have been hits, as soon as both have reported."""
    wanted = keys("rates", 8)

    def chunks() -> int:
        return int(get(controller.url, "/api/v1/hit-rates")["cluster"]["since_start"]["chunks"])

    before = chunks()
    tell(holder, "rates-1", wanted)
    tell(reader, "rates-2", wanted)
    wait_for(lambda: chunks() >= before + 16)

    def recent() -> dict[str, Any]:
        found: dict[str, Any] = get(controller.url, "/api/v1/hit-rates", minutes=60)["cluster"]["recent"]
        return found

    # Reports of what other tests asked may have been under way, and be what came just now.
    wait_for(lambda: max(recent()[name] for name in ("achievable_alone", "achieved")) < recent()["achievable"])
    answer = get(controller.url, "/api/v1/hit-rates", minutes=60)
    by_name = {one["instance_id"]: one["recent"] for one in answer["instances"]}
    assert set(by_name) == {"holder", "reader"}
    cluster = answer["cluster"]["recent"]
    assert 0.0 < cluster["achieved"] < cluster["achievable"] < 1.0
    assert cluster["achievable_error"] == 0.0, "so few keys are all in the sample"
    metrics = httpx.get(f"{controller.url}/metrics").text
    assert "kvmesh_controller_achievable_hit_rate 0." in metrics
    assert "kvmesh_node_prompt_chunks_total" in httpx.get(f"{admin(reader)}/metrics").text
