"""Hit rates, achieved and achievable, per instance and for the cluster. Pure: time is passed in.

Nodes report how their lookups went and a sample of the keys they were asked for (`UseReport`). One sample per format,
united over its members, tells who was the first to ask for a chunk: what nobody had asked for before, no cache could
have had (`kvmesh.core.sketch`). Reports of different nodes come in any order, so which of two instances was the first
is off by a heartbeat at most; the cluster's figure does not depend on it.
"""

from __future__ import annotations

from collections import OrderedDict

from kvmesh.core.sketch import SeenSketch, unpack_hashes
from kvmesh.core.usage import Usage, UsageLog
from kvmesh.wire.directory import UseReport

SAMPLE_KEYS = 65_536
"""Per format: about 6 MB, and 0.4 % of error."""
MAX_FORMATS = 16
MINUTES = 60


class HitRates:
    """What the members have reported."""

    def __init__(self, sample_keys: int = SAMPLE_KEYS) -> None:
        self._sample_keys = sample_keys
        self._samples: OrderedDict[str, SeenSketch] = OrderedDict()
        """By format id, the least recently used first."""
        self._logs: dict[str, UsageLog] = {}
        self._last: dict[str, UseReport] = {}
        """Last report by instance id."""
        self.cluster = UsageLog(MINUTES)

    def add(self, report: UseReport, format_id: str, now_s: float) -> Usage:
        """Take a member's report; returns what is new in it. The first one of a life tells where its counters stand:
        what was before this controller's time counts as known, not as used.
        """
        hashes = unpack_hashes(report.hashes)
        before = self._last.get(report.instance_id)
        is_first = before is None or before.incarnation != report.incarnation
        self._last[report.instance_id] = report
        usage = Usage() if before is None or is_first else _difference(before, report)
        sample = self._sample(format_id)
        sample.lower(report.threshold + 1)
        for hashed in hashes:
            weight = sample.add(hashed)
            if weight and not is_first:
                usage.note_new(weight)
        self._logs.setdefault(report.instance_id, UsageLog(MINUTES)).add(usage, now_s)
        self.cluster.add(usage, now_s)
        return usage

    def forget(self, instance_id: str) -> None:
        """The instance is no member any more. What it did stays in the cluster's sums."""
        self._logs.pop(instance_id, None)
        self._last.pop(instance_id, None)

    def of(self, instance_id: str) -> UsageLog | None:
        """One member's log; None before its first report."""
        return self._logs.get(instance_id)

    def instances(self) -> list[str]:
        """Members that have reported, by name."""
        return sorted(self._logs)

    def sampled_keys(self) -> int:
        """Keys in all samples, for metrics."""
        return sum(map(len, self._samples.values()))

    def _sample(self, format_id: str) -> SeenSketch:
        sample = self._samples.get(format_id)
        if sample is None:
            sample = self._samples[format_id] = SeenSketch(self._sample_keys)
            if len(self._samples) > MAX_FORMATS:
                self._samples.popitem(last=False)
        self._samples.move_to_end(format_id)
        return sample


def _difference(before: UseReport, after: UseReport) -> Usage:
    """What has happened between two reports of one life; never negative, whatever a member says."""
    chunks = max(0, after.chunks - before.chunks)
    return Usage(
        requests=max(0, after.requests - before.requests),
        chunks=chunks,
        device_chunks=max(0, after.device_chunks - before.device_chunks),
        own_chunks=max(0, after.own_chunks - before.own_chunks),
        peer_chunks=max(0, after.peer_chunks - before.peer_chunks),
        new_alone=max(0.0, after.new_alone - before.new_alone),
    )
