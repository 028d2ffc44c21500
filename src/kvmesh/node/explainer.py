"""Makes an explanation out of what the engine tells of a request and what the node knows around it.

The engine knows which chunks it asked for and what it was told; the fetches of the request know what came and from
whom; the replica knows who holds what now; the memory knows what was held before. Put together they give each chunk a
place or a reason. Runs on the node's event loop, once per request; nothing waits for it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from kvmesh.config import KVMeshConfig
from kvmesh.core.format import differences
from kvmesh.core.keys import group_of
from kvmesh.core.reasons import MissReason
from kvmesh.core.replica import Replica
from kvmesh.node.memory import MAX_GONE, Memory
from kvmesh.node.peers import Peers
from kvmesh.wire import explain as told
from kvmesh.wire.causes import make_cause, make_mismatch, summarize
from kvmesh.wire.directory import Member
from kvmesh.wire.link import Miss, RequestRecord

MAX_STRANGERS = 1_000
MAX_CHUNKS = 65_536
"""Of one prompt; what is beyond them is not told of."""
_FOR_ALL_THE_REST = frozenset(
    {
        *(MissReason.NO_PEERS, MissReason.NO_DIRECTORY, MissReason.NODE_DOWN, MissReason.SHARING_OFF),
        *(MissReason.DRAINING, MissReason.TENANT_SALT, MissReason.FORMAT_MISMATCH, MissReason.BELOW_MINIMUM),
        *(MissReason.GATE_REFUSED, MissReason.NOT_ASKED, MissReason.POOL_FULL),
    }
)
"""Reasons that say something of the whole request: they hold for every chunk after the first as well."""


class Came(NamedTuple):
    """What became of one chunk in a fetch."""

    reason: MissReason | None
    holder: str
    """Who supplied it or was asked for it; empty when nobody could be."""


class FetchNote(NamedTuple):
    """One fetch of a request."""

    part: told.FetchPart
    chunks: dict[bytes, Came]
    details: dict[MissReason, told.Detail] = {}  # noqa: RUF012  (never changed)
    """Numbers behind the reasons in it, where there are some."""


@dataclass
class Neighbourhood:
    """What the node knows around a request. The parts are the node's own, read when an explanation is made."""

    config: KVMeshConfig
    replica: Replica
    peers: Peers
    memory: Memory
    member: Member | None = None
    """This node, once it is up."""
    strangers: dict[str, Member] = field(default_factory=dict)
    """Members that serve the same model in another format, by instance id."""

    def meet_stranger(self, member: Member) -> None:
        """Take note of a member whose format is not ours."""
        ours = self.member
        if ours is None or member.format.model_name != ours.format.model_name:
            return
        if len(self.strangers) < MAX_STRANGERS or member.instance_id in self.strangers:
            self.strangers[member.instance_id] = member

    def lost(self, keys: Sequence[bytes], instance_id: str, why: str) -> None:
        """`instance_id` holds these keys no longer, and was the last or their owner; others that do are left out."""
        gone = [key for key in keys[-MAX_GONE:] if key not in self.replica]
        if gone:
            self.memory.lost(gone, instance_id, why, time.monotonic())

    def find(self, instance_id: str) -> Member | None:
        """A member, peer or stranger."""
        peer = self.peers.get(instance_id)
        return self.strangers.get(instance_id) if peer is None else peer.member

    def side(self, instance_id: str) -> told.PeerSide:
        """The other instance as this node knows it."""
        peer, member = self.peers.get(instance_id), self.find(instance_id)
        if member is None:
            return told.PeerSide(instance_id=instance_id)
        side = told.PeerSide(
            instance_id=instance_id,
            incarnation=member.incarnation,
            address=member.peer_address,
            version=member.version,
            same_format=peer is not None,
        )
        if peer is None:
            return side
        return told.PeerSide(
            instance_id=instance_id,
            incarnation=member.incarnation,
            address=member.peer_address,
            version=member.version,
            transport=peer.transport.name,
            breaker="open" if peer.breaker.is_open else "closed",
            bytes_under_way=max(0, peer.bytes_under_way),
            corrupt_chunks=peer.corrupt_chunks,
        )

    def pairs(self, instance_id: str) -> list[told.FieldPair]:
        """What matters of both sides."""
        ours, theirs = self.member, self.find(instance_id)
        if ours is None or theirs is None:
            return []
        return [
            *(told.FieldPair(field=name, ours=mine, theirs=other) for name, mine, other in _sides(ours, theirs)),
            *(
                told.FieldPair(field=one.field, ours=one.ours, theirs=one.theirs)
                for one in differences(ours.format, theirs.format)
            ),
        ]


class _Fate(NamedTuple):
    """Where a chunk was found, or why not."""

    where: told.Where
    holder: str = ""
    reason: MissReason | None = None


class _Run(NamedTuple):
    """Consecutive chunks with the same fate."""

    fate: _Fate
    first: int
    chunks: int


_ON_DEVICE, _IN_OWN_POOL = _Fate("device"), _Fate("own_pool")
_TRUNCATED = _Fate("nowhere", "", MissReason.TRUNCATED)
_NOT_PUBLISHED = _Fate("nowhere", "", MissReason.NOT_PUBLISHED)


class Explained(NamedTuple):
    """An explanation, and what only the node itself needs of it."""

    explanation: told.Explanation
    misses: dict[MissReason, int]
    """Chunks by reason."""
    decided: MissReason | None
    """The first cause."""
    missed_keys: Sequence[bytes]


class Explainer:
    """Explains requests of one engine."""

    def __init__(self, around: Neighbourhood, *, chunk_tokens: int) -> None:
        self._around = around
        self._chunk_tokens = chunk_tokens

    def explain(self, record: RequestRecord, fetches: Sequence[FetchNote], now_s: float) -> Explained:
        """All about one request. `age_s` is 0: whoever shows it later puts the right one in."""
        case = _Case(self._around, record, fetches, self._chunk_tokens, now_s)
        runs = case.runs()
        causes = case.causes(runs)
        places: Counter[told.Where] = Counter()
        missed: dict[MissReason, int] = {}
        for (where, _, reason), _, chunks in runs:
            places[where] += chunks
            if reason is not None:
                missed[reason] = missed.get(reason, 0) + chunks
        number = sum(places.values())
        found = told.Found(
            device=places["device"],
            own_pool=places["own_pool"],
            peer=places["peer"],
            nowhere=places["nowhere"],
        )
        others = dict.fromkeys([run.fate.holder for run in runs] + [cause.instance_id for cause in causes])
        member = self._around.member
        explanation = told.Explanation(
            request_id=record.request_id,
            instance_id=member.instance_id if member else "",
            incarnation=member.incarnation if member else "",
            age_s=0.0,
            wait_s=record.wait_s,
            prompt_tokens=record.prompt_tokens,
            chunk_tokens=self._chunk_tokens,
            chunks=number,
            tail_tokens=record.prompt_tokens - number * self._chunk_tokens,
            found=found,
            summary=summarize(found, causes, ended_early=record.ended_early),
            spans=_spans(runs),
            causes=causes,
            possible=case.possible(causes),
            fetches=[note.part for note in fetches],
            peers=[self._around.side(name) for name in list(filter(None, others))[: told.MAX_PEERS]],
            separated_by=list(record.separated_by),
            ended_early=record.ended_early,
            first_missed_key=case.missed_keys[0].hex() if case.missed_keys else "",
        )
        return Explained(explanation, missed, causes[0].reason if causes else None, case.missed_keys)


class _Case:
    """One request being explained."""

    def __init__(
        self,
        around: Neighbourhood,
        record: RequestRecord,
        fetches: Sequence[FetchNote],
        chunk_tokens: int,
        now_s: float,
    ) -> None:
        self._around = around
        self._record = record
        self._now_s = now_s
        self._chunk_tokens = chunk_tokens
        group = group_of(record.keys[0]) if record.keys else b""
        self._keys = [key for key in record.keys if group_of(key) == group]
        self._number = min(record.prompt_tokens // chunk_tokens, MAX_CHUNKS)
        self._on_device = min(self._number, record.device_tokens // chunk_tokens)
        self._found = min(self._number, (record.device_tokens + record.loaded_tokens) // chunk_tokens)
        self._came = {key: came for note in fetches for key, came in note.chunks.items()}
        self._asked = {miss.key: miss for miss in record.misses}
        self._details: dict[tuple[MissReason, str], told.Detail] = {
            (reason, ""): detail for note in fetches for reason, detail in note.details.items()
        }
        """By reason and the other instance; without one, for all."""
        self._decided: _Fate | None = None
        """Of the first chunk that was missed."""
        self.missed_keys = self._keys[self._found :]

    def runs(self) -> list[_Run]:
        """The chunks' places or reasons, in prefix order."""
        starts: list[tuple[_Fate, int]] = []
        for index in range(self._number):
            fate = self._fate(index)
            if not starts or (fate is not starts[-1][0] and fate != starts[-1][0]):
                starts.append((fate, index))
        ends = [first for _, first in starts[1:]] + [self._number]
        return [_Run(fate, first, end - first) for (fate, first), end in zip(starts, ends, strict=False)]

    def causes(self, runs: Sequence[_Run]) -> list[told.Cause]:
        """One cause per reason and other instance, in the order in which they appear."""
        if not self._number:
            detail: told.Detail = {
                "prompt_tokens": float(self._record.prompt_tokens),
                "chunk_tokens": float(self._chunk_tokens),
            }
            return [make_cause(MissReason.BELOW_ONE_CHUNK, 0, 0, detail=detail)]
        sums: dict[tuple[MissReason, str], list[int]] = {}
        for fate, first, chunks in runs:
            if fate.reason is not None:
                sums.setdefault((fate.reason, fate.holder), [first, 0])[1] += chunks
        return [
            self._cause(reason, holder, chunks, first)
            for (reason, holder), (first, chunks) in list(sums.items())[: told.MAX_CAUSES]
        ]

    def possible(self, causes: Sequence[told.Cause]) -> list[told.Cause]:
        """What may be behind a chunk that nobody is known to have."""
        if not causes or causes[0].reason is not MissReason.NOT_PUBLISHED:
            return []
        found = [self._mismatch(0, causes[0].first_chunk)] if self._around.strangers else []
        if "cache_salt" in self._record.separated_by and not self._found:
            found.append(make_cause(MissReason.TENANT_SALT, 0, causes[0].first_chunk))
        return found

    # -- single chunks -------------------------------------------------------------------------------------------------

    def _fate(self, index: int) -> _Fate:
        if index < self._on_device:
            return _ON_DEVICE
        if index < self._found:
            came = self._came.get(self._keys[index]) if index < len(self._keys) else None
            return _IN_OWN_POOL if came is None or came.reason is not None else _Fate("peer", came.holder)
        if self._decided is None:
            self._decided = self._first_missed()
            return self._decided
        return self._later_missed(index, self._decided)

    def _first_missed(self) -> _Fate:
        """The chunk that decided: everything behind it is of no use without it."""
        key = self._keys[self._found] if self._found < len(self._keys) else None
        miss = None if key is None else self._asked.get(key)
        if miss is None and self._record.misses:
            miss = self._record.misses[-1]  # of another KV cache group
        if miss is None:
            return _Fate("nowhere", "", MissReason.NOT_ASKED)
        came = self._came.get(miss.key)
        if came is not None and came.reason not in {None, MissReason.TRUNCATED}:
            return self._failed(miss.key, came)
        return self._refine(miss)

    def _refine(self, miss: Miss) -> _Fate:
        """The engine only knows that nobody holds the chunk; the node may know why."""
        if miss.detail:
            self._details[miss.reason, ""] = dict(miss.detail)
        if miss.reason not in {MissReason.NOT_PUBLISHED, MissReason.NO_PEERS}:
            holders = self._around.replica.holders(miss.key)
            return _Fate("nowhere", holders[0] if holders else "", miss.reason)
        if self._is_salted_elsewhere():
            return _Fate("nowhere", "", MissReason.TENANT_SALT)
        if miss.reason is MissReason.NO_PEERS:
            return _Fate("nowhere", "", MissReason.FORMAT_MISMATCH if self._around.strangers else MissReason.NO_PEERS)
        fate = self._unknown(miss.key)
        if fate is _NOT_PUBLISHED:
            self._note_asked(miss.key)
        return fate

    def _unknown(self, key: bytes) -> _Fate:
        """A chunk that nobody is known to hold."""
        gone = self._around.memory.gone(key)
        if gone is None:
            return _NOT_PUBLISHED
        if gone.why != "evicted":
            self._details.setdefault((MissReason.NOT_PUBLISHED, ""), {"left": gone.instance_id, "why": gone.why})
            return _NOT_PUBLISHED
        detail: told.Detail = {"instance": gone.instance_id, "gone_s": max(0.0, self._now_s - gone.at_s)}
        self._details.setdefault((MissReason.EVICTED, gone.instance_id), detail)
        return _Fate("nowhere", gone.instance_id, MissReason.EVICTED)

    def _note_asked(self, key: bytes) -> None:
        """This instance was asked for the same chunk before: it may be computing it."""
        asked_s, member = self._around.memory.asked_at_s(key), self._around.member
        if asked_s is not None and member is not None:
            detail: told.Detail = {"asked_s": self._now_s - asked_s, "asked_at": member.instance_id}
            self._details.setdefault((MissReason.NOT_PUBLISHED, ""), detail)

    def _failed(self, key: bytes, came: Came) -> _Fate:
        assert came.reason is not None
        holder = came.holder or next(iter(self._around.replica.holders(key)), "")
        return _Fate("nowhere", holder, came.reason)

    def _later_missed(self, index: int, first: _Fate) -> _Fate:
        if index >= len(self._keys) or first.reason in _FOR_ALL_THE_REST:
            return first
        key = self._keys[index]
        came = self._came.get(key)
        if came is not None and came.reason is not None:
            return self._failed(key, came) if came.reason is not MissReason.TRUNCATED else _TRUNCATED
        if came is not None or key in self._around.replica:
            return _TRUNCATED
        return self._unknown(key)

    def _is_salted_elsewhere(self) -> bool:
        record = self._record
        if self._found or not record.tokens_hash or not self._keys:
            return False
        return self._around.memory.is_salted_elsewhere(record.tokens_hash, self._keys[0], record.separated_by)

    # -- causes --------------------------------------------------------------------------------------------------------

    def _cause(self, reason: MissReason, holder: str, count: int, first: int) -> told.Cause:
        if reason is MissReason.FORMAT_MISMATCH:
            return self._mismatch(count, first)
        detail = {**self._details.get((reason, ""), {}), **self._details.get((reason, holder), {})}
        member = self._around.find(holder) if holder else None
        if member is not None:
            detail.setdefault("address", member.peer_address)
        if reason in {MissReason.DEADLINE, MissReason.PEER_STALLED}:
            detail["fetch_timeout_s"] = self._around.config.fetch_timeout_s
            detail["stall_timeout_s"] = self._around.config.stall_timeout_s
        return make_cause(reason, count, first, holder, detail, self._around.pairs(holder) if holder else [])

    def _mismatch(self, count: int, first: int) -> told.Cause:
        """Names the stranger that differs least: most likely the one that somebody expects to share."""
        around = self._around
        assert around.member is not None
        ours = around.member.format
        stranger = min(around.strangers.values(), key=lambda other: len(differences(ours, other.format)))
        return make_mismatch(around.member, stranger, count, first)


def _spans(runs: list[_Run]) -> list[told.Span]:
    """The runs as they are told. What is beyond the limit is put into the last one, without a holder."""
    if len(runs) > told.MAX_SPANS:
        (where, _, reason), first, _ = runs[told.MAX_SPANS - 1]
        rest = sum(run.chunks for run in runs[told.MAX_SPANS - 1 :])
        runs = [*runs[: told.MAX_SPANS - 1], _Run(_Fate(where, "", reason), first, rest)]
    return [
        told.Span(first_chunk=first, chunks=chunks, where=fate.where, instance_id=fate.holder, reason=fate.reason)
        for fate, first, chunks in runs
    ]


def _sides(ours: Member, theirs: Member) -> list[tuple[str, str, str]]:
    return [
        ("address", ours.peer_address, theirs.peer_address),
        ("version", ours.version, theirs.version),
        ("transports", ",".join(ours.transports), ",".join(theirs.transports)),
        ("slots", str(ours.slots), str(theirs.slots)),
    ]
