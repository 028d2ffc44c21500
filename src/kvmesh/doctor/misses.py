"""What requests have missed, by reason: the controller's summary of the last hour."""

from __future__ import annotations

from collections.abc import Iterator

from kvmesh.client.explanations import MissesOf, Summary
from kvmesh.doctor.findings import CONTROLLER, Finding, ok, skipped, warning
from kvmesh.doctor.situation import Situation
from kvmesh.units import count, share

NOTABLE = 0.01
"""Share of the chunks looked up below which a reason is no matter."""
ORDINARY = frozenset({"not_published", "below_one_chunk", "below_minimum", "no_peers", "recently_failed", "truncated"})
"""Nobody has computed it before, or too little of it, or it follows from another miss: no fault of anything."""


def check(situation: Situation) -> Iterator[Finding]:
    """One finding for each reason that cost a notable share."""
    if situation.cluster is None:
        return
    summary = situation.cluster.summary
    if summary is None:
        yield skipped("misses.reasons", CONTROLLER, "the controller has no summary of misses, or not in time")
        return
    notable = [one for one in summary.misses if one.reason not in ORDINARY and one.chunks > NOTABLE * summary.chunks]
    for missed in notable:
        yield _finding(missed, summary)
    if not notable:
        looked_up = f"{count(summary.chunks)} chunks of {count(summary.requests)} requests"
        yield ok("misses.reasons", CONTROLLER, f"no fault cost a notable share of {looked_up} in the last hour")


def _finding(missed: MissesOf, summary: Summary) -> Finding:
    part = share(missed.chunks / summary.chunks)
    told = f"{count(missed.chunks)} of {count(summary.chunks)} chunks of the last hour ({part}) missed"
    advice = missed.change or "kvmesh explain --summary tells more"
    return warning(f"misses.{missed.reason}", CONTROLLER, f"{told}: {missed.reason}. {missed.text}".strip(), advice)
