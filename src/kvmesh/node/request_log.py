"""What the node remembers of its engine's recent requests: explanations, reasons by the minute, and the use of chunks.

Everything here is bounded: a ring of explanations, fetches of requests that have not been told of yet, a day of
minutes, one sample of keys. Runs on the node's event loop; the engine never waits for it.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import msgspec

from kvmesh.core.reasons import MissReason
from kvmesh.core.sketch import SeenSketch, hash_all, pack_hashes
from kvmesh.core.usage import BUCKET_S, Usage, UsageLog
from kvmesh.node.explainer import Came, Explained, Explainer, FetchNote, Neighbourhood
from kvmesh.node.fetcher import JobResult
from kvmesh.wire import explain as told
from kvmesh.wire.directory import UseReport
from kvmesh.wire.link import RequestRecord

MAX_REQUESTS = 1_000
MAX_UNTOLD_FETCHES = 1_000
MAX_FETCHES_OF_ONE = 8
SAMPLE_KEYS = 16_384
"""Of the sketch: about 1.5 MB, and 0.8 % of error."""
MAX_FRESH = SAMPLE_KEYS
REASON_MINUTES = int(told.MAX_HOURS * 60)


class Kept(NamedTuple):
    """One explained request."""

    at_s: float
    explanation: told.Explanation
    tokens_hash: bytes
    first_key: bytes


class _Minute(NamedTuple):
    number: int
    usage: Usage
    chunks: Counter[MissReason]
    decided: Counter[MissReason]


class RequestLog:
    """The node's memory of requests."""

    def __init__(
        self, around: Neighbourhood, *, chunk_tokens: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._around = around
        self._explainer = Explainer(around, chunk_tokens=chunk_tokens)
        self._clock = clock
        self._started_s = clock()
        self._recent: deque[Kept] = deque(maxlen=MAX_REQUESTS)
        """Oldest first."""
        self._fetches: OrderedDict[str, list[FetchNote]] = OrderedDict()
        """Fetches of requests that the engine has not told of yet."""
        self._minutes: deque[_Minute] = deque(maxlen=REASON_MINUTES)
        self.usage = UsageLog()
        self._sketch = SeenSketch(SAMPLE_KEYS)
        self._fresh: list[int] = []
        """Sampled since the last report."""
        self._whole = True
        """The next report has to carry the whole sample."""
        self._reported = Usage()
        self.lost_records = 0
        """Requests that the engine could not tell of, as it says."""

    # -- taking --------------------------------------------------------------------------------------------------------

    def fetched(self, request_id: str, transport: str, chunk_bytes: int, result: JobResult) -> None:
        """A fetch of this request has ended."""
        known = self._fetches.setdefault(request_id[: told.MAX_ID], [])
        self._fetches.move_to_end(request_id[: told.MAX_ID])
        if len(known) < MAX_FETCHES_OF_ONE:
            known.append(_note(transport, chunk_bytes, result))
        while len(self._fetches) > MAX_UNTOLD_FETCHES:
            self._fetches.popitem(last=False)

    def take(self, record: RequestRecord) -> told.Explanation:
        """The engine tells of a request: explain it and count it."""
        now_s = self._clock()
        self.lost_records = record.lost_before
        explained = self._explainer.explain(record, self._fetches.pop(record.request_id, ()), now_s)
        self._count(explained, record, now_s)
        first_key = record.keys[0] if record.keys else b""
        if record.tokens_hash and first_key:
            self._around.memory.note_text(record.tokens_hash, first_key, record.separated_by)
        self._around.memory.asked(explained.missed_keys, now_s)
        self._recent.append(Kept(now_s, explained.explanation, record.tokens_hash, first_key))
        return explained.explanation

    def _count(self, explained: Explained, record: RequestRecord, now_s: float) -> None:
        explanation = explained.explanation
        if explanation.ended_early:
            return
        found = explanation.found
        usage = Usage(
            requests=1,
            chunks=explanation.chunks,
            device_chunks=found.device,
            own_chunks=found.own_pool,
            peer_chunks=found.peer,
        )
        for hashed in hash_all(record.keys[: explanation.chunks]):
            weight = self._sketch.add(hashed)
            if weight:
                usage.note_new(weight)
                self._fresh.append(hashed)
        if len(self._fresh) > MAX_FRESH:
            self._fresh.clear()
            self._whole = True
        self.usage.add(usage, now_s)
        minute = self._minute(now_s)
        minute.usage.add(usage)
        minute.chunks.update(explained.misses)
        if explained.decided is not None:
            minute.decided[explained.decided] += 1

    def _minute(self, now_s: float) -> _Minute:
        number = int(now_s // BUCKET_S)
        if not self._minutes or self._minutes[-1].number != number:
            self._minutes.append(_Minute(number, Usage(), Counter(), Counter()))
        return self._minutes[-1]

    # -- telling -------------------------------------------------------------------------------------------------------

    def recent(self, limit: int) -> list[told.RecentRequest]:
        """The last requests, newest first."""
        now_s = self._clock()
        newest = list(self._recent)[::-1][: max(0, min(limit, told.MAX_RECENT))]
        return [_line(kept, now_s) for kept in newest]

    def find(self, request: str) -> list[Kept]:
        """Requests that `request` names, the best match first, then the newest (`kvmesh.wire.explain.matches`)."""
        found = [(told.matches(request, kept.explanation.request_id), kept) for kept in self._recent]
        named = sorted((pair for pair in found if pair[0]), key=lambda pair: (-pair[0], -pair[1].at_s))
        now_s = self._clock()
        return [kept._replace(explanation=_aged(kept, now_s)) for _, kept in named[: told.MAX_MATCHES]]

    def summary(self, hours: float) -> told.MissSummary:
        """Why this instance missed in the last hours, to the minute."""
        now_s = self._clock()
        seconds = min(hours * 3600, now_s - self._started_s)
        first = int((now_s - hours * 3600) // BUCKET_S) + 1
        usage, chunks, decided = Usage(), Counter[MissReason](), Counter[MissReason]()
        for minute in self._minutes:
            if minute.number >= first:
                usage.add(minute.usage)
                chunks.update(minute.chunks)
                decided.update(minute.decided)
        reasons = sorted({*chunks, *decided}, key=lambda reason: (-chunks[reason], -decided[reason], reason.value))
        member = self._around.member
        return told.MissSummary(
            instance_id=member.instance_id if member else "",
            seconds=seconds,
            requests=usage.requests,
            chunks=usage.chunks,
            found=told.Found(
                device=usage.device_chunks,
                own_pool=usage.own_chunks,
                peer=usage.peer_chunks,
                nowhere=usage.chunks - usage.device_chunks - usage.own_chunks - usage.peer_chunks,
            ),
            misses=[
                told.MissShare(reason=reason, chunks=chunks[reason], requests=decided[reason]) for reason in reasons
            ],
            lost_records=self.lost_records,
        )

    def is_salted_elsewhere(self, tokens_hash: bytes, first_key: bytes, separated_by: Sequence[str]) -> bool:
        """Whether this instance has met the same tokens under another `cache_salt`."""
        return self._around.memory.is_salted_elsewhere(tokens_hash, first_key, separated_by)

    def asked_s(self, key: bytes) -> float | None:
        """How long ago this instance was asked for the key in vain; None when it was not, as far as remembered."""
        at_s = self._around.memory.asked_at_s(key) if key else None
        return None if at_s is None else max(0.0, self._clock() - at_s)

    # -- for the directory ---------------------------------------------------------------------------------------------

    def start_over(self) -> None:
        """The directory has forgotten us or may have: the next report carries the whole sample."""
        self._whole = True

    def take_report(self, instance_id: str, incarnation: str) -> UseReport | None:
        """What has happened since the last report; None when nothing has."""
        total = self.usage.total
        if not self._whole and total == self._reported:
            return None
        hashes = self._sketch.hashes() if self._whole else self._fresh
        report = UseReport(
            instance_id=instance_id,
            incarnation=incarnation,
            requests=total.requests,
            chunks=total.chunks,
            device_chunks=total.device_chunks,
            own_chunks=total.own_chunks,
            peer_chunks=total.peer_chunks,
            threshold=self._sketch.threshold - 1,
            hashes=pack_hashes(hashes),
            new_alone=total.new_chunks,
        )
        self._fresh, self._whole, self._reported = [], False, replace(total)
        return report


def _note(transport: str, chunk_bytes: int, result: JobResult) -> FetchNote:
    fetched = len(result.fetched())
    part = told.FetchPart(
        holders=result.holders[:64],
        transport=transport,
        chunks_asked=len(result.outcomes),
        chunks_fetched=fetched,
        fetched_bytes=fetched * chunk_bytes,
        seconds=result.seconds,
        misses={reason.value: count for reason, count in result.misses().items()},
    )
    chunks = {
        bytes(outcome.item.key): Came(outcome.reason, result.asked.get(outcome.item.slot, ""))
        for outcome in result.outcomes
    }
    details = {} if result.gate is None else {MissReason.GATE_REFUSED: result.gate.detail()}
    return FetchNote(part, chunks, details)


def _aged(kept: Kept, now_s: float) -> told.Explanation:
    return msgspec.structs.replace(kept.explanation, age_s=max(0.0, now_s - kept.at_s))


def _line(kept: Kept, now_s: float) -> told.RecentRequest:
    one = kept.explanation
    return told.RecentRequest(
        request_id=one.request_id,
        instance_id=one.instance_id,
        age_s=max(0.0, now_s - kept.at_s),
        prompt_tokens=one.prompt_tokens,
        chunks=one.chunks,
        found=one.found,
        reason=one.causes[0].reason if one.causes else None,
        summary=one.summary,
    )
