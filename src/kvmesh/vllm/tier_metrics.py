"""The tier's metrics, shown on vLLM's own `/metrics`. Names and labels are documented in docs/metrics.md."""

from __future__ import annotations

from kvmesh.core.gate import Prefill, Verdict
from kvmesh.core.reasons import MissReason
from kvmesh.node.fetch_jobs import FinishedJob
from kvmesh.node.handle import NodeHandle
from kvmesh.vllm.compat import (
    OffloadingConnectorStats,
    OffloadingCounterMetadata,
    OffloadingGaugeMetadata,
    OffloadingHistogramMetadata,
    OffloadingMetricMetadata,
)

LOOKUPS = "kvmesh_lookup_chunks"
FETCHED_CHUNKS = "kvmesh_fetched_chunks"
FETCHED_BYTES = "kvmesh_fetched_bytes"
MISSED_CHUNKS = "kvmesh_fetch_missed_chunks"
FETCH_SECONDS = "kvmesh_fetch_seconds"
VISIBLE_CHUNKS = "kvmesh_visible_chunks"
PEERS = "kvmesh_peers"
NODE_UP = "kvmesh_node_up"
NODE_RESTARTS = "kvmesh_node_restarts"

GATE_DECISIONS = "kvmesh_gate_decisions"
PREFILL_RATE = "kvmesh_prefill_tokens_per_second"
QUEUE_SECONDS = "kvmesh_queue_delay_seconds"

SECONDS_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


def metric_definitions() -> dict[str, OffloadingMetricMetadata]:
    """What vLLM needs to know of them, in its API server and its engine."""
    return {
        LOOKUPS: OffloadingCounterMetadata(
            documentation="Chunks looked up at peers, once per request and chunk, by result and reason.",
            labelnames=("result", "reason"),
        ),
        FETCHED_CHUNKS: OffloadingCounterMetadata(documentation="Chunks fetched from peers."),
        FETCHED_BYTES: OffloadingCounterMetadata(documentation="Bytes fetched from peers."),
        MISSED_CHUNKS: OffloadingCounterMetadata(
            documentation="Chunks asked for in a fetch that did not come, by reason.", labelnames=("reason",)
        ),
        FETCH_SECONDS: OffloadingHistogramMetadata(
            documentation="Duration of fetches, in seconds.", buckets=SECONDS_BUCKETS
        ),
        VISIBLE_CHUNKS: OffloadingGaugeMetadata(documentation="Chunks that other instances are known to hold."),
        PEERS: OffloadingGaugeMetadata(documentation="Other instances whose KV is interchangeable with ours."),
        GATE_DECISIONS: OffloadingCounterMetadata(
            documentation="Requests for which fetching was weighed against computing, by verdict.",
            labelnames=("verdict",),
        ),
        PREFILL_RATE: OffloadingGaugeMetadata(
            documentation="How fast this engine computes prompts, as measured; 0 before the first measurement."
        ),
        QUEUE_SECONDS: OffloadingGaugeMetadata(documentation="How long requests wait to be scheduled, as measured."),
        NODE_UP: OffloadingGaugeMetadata(documentation="1 while the node process of this engine is running."),
        NODE_RESTARTS: OffloadingGaugeMetadata(documentation="How often the node process was started again."),
    }


class TierMetrics:
    """Counts on the scheduler thread; handed to vLLM after each step, and only what has changed.

    vLLM asks after every step, when the model has just driven everything else out of the processor's caches: what costs
    then is each object that is touched. So a step in which nothing happened touches three numbers.
    """

    def __init__(self) -> None:
        self._lookups: dict[MissReason | None, int] = {}
        self._finished: list[FinishedJob] = []
        self._decisions: dict[Verdict, int] = {}
        self._gauges: dict[str, float] = {}
        """As they were handed over last."""
        self._has_counted = False
        self._node_changes = self._observations = -1

    def looked_up(self, reason: MissReason | None) -> None:
        """Count one lookup; None is a hit."""
        self._lookups[reason] = self._lookups.get(reason, 0) + 1
        self._has_counted = True

    def fetched(self, finished: FinishedJob) -> None:
        self._finished.append(finished)
        self._has_counted = True

    def decided(self, verdict: Verdict) -> None:
        """Count one decision of the gate."""
        self._decisions[verdict] = self._decisions.get(verdict, 0) + 1
        self._has_counted = True

    def take(self, node: NodeHandle, prefill: Prefill) -> OffloadingConnectorStats | None:
        """What happened since the last call, in vLLM's form; None when nothing did."""
        has_moved = node.changes != self._node_changes or prefill.observations != self._observations
        if not self._has_counted and not has_moved:
            return None
        stats = OffloadingConnectorStats()
        if has_moved:
            self._set_gauges(stats, node, prefill)
        if self._has_counted:
            self._set_counters(stats)
        return None if stats.is_empty() else stats

    def _set_gauges(self, stats: OffloadingConnectorStats, node: NodeHandle, prefill: Prefill) -> None:
        # The numbers of changes first: what changes from here on is seen by the next call.
        self._node_changes, self._observations = node.changes, prefill.observations
        state = node.state
        gauges: dict[str, float] = {
            VISIBLE_CHUNKS: node.visible_count(),
            PEERS: state.peers,
            NODE_UP: int(state.alive),
            NODE_RESTARTS: node.restarts,
            PREFILL_RATE: round(prefill.tokens_per_s or 0.0, 1),
            QUEUE_SECONDS: round(prefill.queue_s, 4),
        }
        for name, value in gauges.items():
            if value != self._gauges.get(name):
                stats.set_gauge(name, value)
        self._gauges = gauges

    def _set_counters(self, stats: OffloadingConnectorStats) -> None:
        self._has_counted = False
        for reason, count in self._lookups.items():
            labels = ("hit", "") if reason is None else ("miss", reason.value)
            stats.increase_counter(LOOKUPS, count, labels)
        self._lookups.clear()
        for verdict, count in self._decisions.items():
            stats.increase_counter(GATE_DECISIONS, count, (verdict.value,))
        self._decisions.clear()
        for finished in self._finished:
            self._count(stats, finished)
        self._finished.clear()

    @staticmethod
    def _count(stats: OffloadingConnectorStats, finished: FinishedJob) -> None:
        stats.increase_counter(FETCHED_CHUNKS, finished.reasons.count(None))
        stats.increase_counter(FETCHED_BYTES, finished.fetched_bytes)
        stats.observe_histogram(FETCH_SECONDS, finished.seconds)
        for reason in finished.reasons:
            if reason is not None:
                stats.increase_counter(MISSED_CHUNKS, 1, (reason.value,))
