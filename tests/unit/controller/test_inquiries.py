"""What the controller makes of the nodes' answers about requests."""

from __future__ import annotations

import msgspec
import pytest

from kvmesh.controller.inquiries import MAX_WITNESSES, Inquiries
from kvmesh.controller.instances import Peer
from kvmesh.controller.registry import Registry
from kvmesh.core.reasons import MissReason
from kvmesh.wire import control
from kvmesh.wire import directory as wire
from kvmesh.wire.causes import make_cause
from kvmesh.wire.control import ControlError
from kvmesh.wire.explain import Explanation, Found, MissShare, MissSummary, Span
from unit.controller.makers import make_format, make_keys, make_member

KEY = make_keys(1)[0]


def explanation(instance_id="a", request_id="cmpl-r-0-1", reason=MissReason.NOT_PUBLISHED, **changed):
    cause = make_cause(reason, 4, 0)
    plain = Explanation(
        request_id=request_id,
        instance_id=instance_id,
        incarnation="0" * 16,
        age_s=2.0,
        wait_s=0.0,
        prompt_tokens=1024,
        chunk_tokens=256,
        chunks=4,
        tail_tokens=0,
        found=Found(nowhere=4),
        summary="",
        spans=[Span(first_chunk=0, chunks=4, where="nowhere", reason=reason)],
        causes=[cause],
        first_missed_key=KEY.hex(),
    )
    return msgspec.structs.replace(plain, **changed)


class Nodes:
    """Stands for `Asks`: answers by instance and question; who has none is gone."""

    def __init__(self) -> None:
        self.replies: dict[tuple[str, type], control.Reply] = {}
        self.asked: list[tuple[str, control.Question]] = []

    async def ask_for(self, expected, instance_id, question, timeout_s):
        self.asked.append((instance_id, question))
        reply = self.replies.get((instance_id, type(question)))
        if reply is None:
            raise ControlError("deadline", f"{instance_id} is silent")
        assert isinstance(reply, expected)
        return reply

    def explain(self, one, instance_id="a", **probe):
        found = control.ExplainedRequest(explanation=one, probe=control.Probe(missed_key=KEY, **probe))
        self.replies[instance_id, control.ExplainRequest] = control.Explained(found=[found])

    def see(self, instance_id, **seen):
        self.replies[instance_id, control.HaveSeen] = control.Seen(**({"salted": False} | seen))


@pytest.fixture
def registry():
    return Registry(incarnation="c" * 16, heartbeat_interval_s=1.0, instance_timeout_s=3.0)


@pytest.fixture
def join(registry):
    """Makes a member that holds keys."""

    def add(instance_id, keys=(), **changed):
        member = make_member(instance_id, **changed)
        peer = Peer("reply", instance_id.encode())
        registry.on_request(wire.Register(member), peer, 0.0)
        snapshot = wire.Snapshot(instance_id, member.incarnation, 0, list(keys), first=True, last=True)
        registry.on_event(snapshot, wire.encode(snapshot), 0.0)
        return member

    return add


@pytest.fixture
def nodes():
    return Nodes()


@pytest.fixture
def inquiries(registry, nodes):
    return Inquiries(registry, nodes)


async def first_cause(inquiries):
    (one,), _ = await inquiries.explain(["a"], "r")
    assert one.spans[0].reason is one.causes[0].reason
    assert one.causes[0].chunks == 4
    assert one.causes[0].reason.value in one.summary or not one.summary
    return one.causes[0]


async def test_the_best_match_comes_first_then_the_newest(inquiries, nodes, join):
    for name, request, age_s in (("a", "cmpl-r-0-1", 9.0), ("b", "cmpl-r-0-2", 1.0), ("c", "r", 50.0)):
        join(name)
        nodes.explain(explanation(name, request, MissReason.POOL_FULL, age_s=age_s), name)
    found, unanswered = await inquiries.explain(["a", "b", "c", "gone"], "r")
    assert [one.request_id for one in found] == ["r", "cmpl-r-0-2", "cmpl-r-0-1"]
    assert [(one.instance_id, one.error.code) for one in unanswered] == [("gone", "deadline")]


async def test_a_chunk_that_is_held_in_another_format(inquiries, nodes, join):
    """Of the same model; the differing field is named. Nobody else has to be asked then."""
    join("a")
    join("foreign", [KEY], format=make_format(model_name="another"))
    join("b", [KEY], format=make_format(kv_dtype="fp8"))
    nodes.explain(explanation())
    cause = await first_cause(inquiries)
    assert (cause.reason, cause.instance_id) == (MissReason.FORMAT_MISMATCH, "b")
    assert [pair.field for pair in cause.fields] == ["kv_dtype"]
    assert len(nodes.asked) == 1


async def test_witnesses_of_another_salt(inquiries, nodes, join):
    for name in "abc":
        join(name)
    nodes.explain(explanation(), tokens_hash=b"t")
    nodes.see("c", salted=True)  # b is silent
    assert (await first_cause(inquiries)).reason is MissReason.TENANT_SALT


async def test_witnesses_of_an_earlier_request(inquiries, nodes, join):
    """Who was asked before this request; later ones say nothing."""
    for name in "abc":
        join(name)
    nodes.explain(explanation(age_s=2.0))
    nodes.see("b", asked_s=1.0)
    nodes.see("c", asked_s=2.5)
    cause = await first_cause(inquiries)
    assert (cause.reason, cause.detail) == (MissReason.NOT_PUBLISHED, {"asked_at": "c", "asked_s": 0.5})


async def test_without_witnesses_it_stays(inquiries, nodes, join):
    for name in "ab":
        join(name)
    nodes.explain(explanation())
    assert (await first_cause(inquiries)).detail == {}


async def test_not_everybody_is_a_witness(inquiries, nodes, join):
    join("a")
    for number in range(MAX_WITNESSES + 5):
        join(f"m{number}")
    nodes.explain(explanation())
    await first_cause(inquiries)
    assert len(nodes.asked) == 1 + MAX_WITNESSES


@pytest.mark.parametrize("reason", [MissReason.EVICTED, MissReason.POOL_FULL, MissReason.BELOW_ONE_CHUNK])
async def test_what_the_node_knows_needs_nobody_else(inquiries, nodes, join, reason):
    join("a")
    join("b", [KEY], format=make_format(kv_dtype="fp8"))
    nodes.explain(explanation(reason=reason))
    assert (await first_cause(inquiries)).reason is reason


@pytest.mark.parametrize("changed", [{"instance_id": "stranger"}, {"first_missed_key": ""}, {"causes": []}])
async def test_an_answer_that_fits_nothing_is_shown_as_it_is(inquiries, nodes, join, changed):
    join("a")
    join("b", [KEY], format=make_format(kv_dtype="fp8"))
    one = explanation(**changed)
    nodes.explain(one)
    assert (await inquiries.explain(["a"], "r"))[0] == [one]


async def test_a_key_that_is_none_costs_nothing(inquiries, nodes, join):
    """A node of another version, or a lying one."""
    join("a")
    join("b", [KEY], format=make_format(kv_dtype="fp8"))
    nodes.explain(explanation(first_missed_key="zz"))
    assert (await first_cause(inquiries)).reason is MissReason.NOT_PUBLISHED


async def test_summaries_of_those_that_answer(inquiries, nodes):
    share = MissShare(reason=MissReason.STALE, chunks=2, requests=1)
    summary = MissSummary(instance_id="a", seconds=9.0, requests=1, chunks=4, found=Found(nowhere=2), misses=[share])
    nodes.replies["a", control.WhyMissed] = control.Missed(summary=summary)
    found, unanswered = await inquiries.why_missed(["a", "b"], 1.0)
    assert found == [summary]
    assert [one.instance_id for one in unanswered] == ["b"]
