"""The node's answers to the controller's questions about requests (`kvmesh.wire.control`). Runs on the node's loop."""

from __future__ import annotations

from kvmesh.node.control import Control
from kvmesh.node.request_log import Kept, RequestLog
from kvmesh.wire import control


def answer_questions(questions: Control, requests: RequestLog) -> None:
    """Let `questions` be answered out of `requests`."""

    async def list_requests(question: control.ListRequests) -> control.RequestList:
        return control.RequestList(requests=requests.recent(question.limit))

    async def explain(question: control.ExplainRequest) -> control.Explained:
        return control.Explained(found=[_with_probe(kept) for kept in requests.find(question.request)])

    async def why_missed(question: control.WhyMissed) -> control.Missed:
        return control.Missed(summary=requests.summary(question.hours))

    async def have_seen(question: control.HaveSeen) -> control.Seen:
        probe = question.probe
        return control.Seen(
            salted=requests.is_salted_elsewhere(probe.tokens_hash, probe.first_key, probe.separated_by),
            asked_s=requests.asked_s(probe.missed_key),
        )

    questions.add(control.ListRequests, list_requests)
    questions.add(control.ExplainRequest, explain)
    questions.add(control.WhyMissed, why_missed)
    questions.add(control.HaveSeen, have_seen)


def _with_probe(kept: Kept) -> control.ExplainedRequest:
    one = kept.explanation
    nothing_found = not (one.found.device or one.found.own_pool or one.found.peer)
    return control.ExplainedRequest(
        explanation=one,
        probe=control.Probe(
            tokens_hash=kept.tokens_hash if nothing_found else b"",
            first_key=kept.first_key,
            missed_key=bytes.fromhex(one.first_missed_key),
            separated_by=one.separated_by,
        ),
    )
