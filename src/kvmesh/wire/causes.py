"""Makes the records of `kvmesh.wire.explain` with their texts, the same in node and controller. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from kvmesh.core.advice import advise
from kvmesh.core.format import differences
from kvmesh.core.reasons import MissReason
from kvmesh.wire.directory import Member
from kvmesh.wire.explain import Cause, Detail, Explanation, FieldPair, Found


def make_cause(
    reason: MissReason,
    chunks: int,
    first_chunk: int,
    instance_id: str = "",
    detail: Detail | None = None,
    fields: Sequence[FieldPair] = (),
) -> Cause:
    """A cause with its text. Arguments as the fields of `Cause`."""
    advice = advise(reason, detail)
    return Cause(
        reason=reason,
        chunks=chunks,
        first_chunk=first_chunk,
        instance_id=instance_id,
        text=advice.text,
        change=advice.change,
        detail=dict(detail or {}),
        fields=list(fields)[:32],
    )


def make_mismatch(ours: Member, theirs: Member, chunks: int, first_chunk: int) -> Cause:
    """The cause FORMAT_MISMATCH between two members, with the fields that differ."""
    found = differences(ours.format, theirs.format)
    detail: Detail = {"instance": theirs.instance_id, "differs": "; ".join(map(str, found))[:1024]}
    fields = [FieldPair(field=one.field, ours=one.ours[:1024], theirs=one.theirs[:1024]) for one in found]
    return make_cause(MissReason.FORMAT_MISMATCH, chunks, first_chunk, theirs.instance_id, detail, fields)


def summarize(found: Found, causes: Sequence[Cause], *, ended_early: bool = False) -> str:
    """One sentence about a request."""
    total = found.device + found.own_pool + found.peer + found.nowhere
    if ended_early:
        return "The request ended before the engine knew what it would load."
    if not total:
        return "The prompt is shorter than one chunk: computed."
    parts = [
        f"{number} {what}"
        for number, what in (
            (found.device, "in the engine's own cache"),
            (found.own_pool, "in the own pool"),
            (found.peer, "fetched from peers"),
            (found.nowhere, "computed"),
        )
        if number
    ]
    why = ""
    if found.nowhere and causes:
        first = causes[0]
        why = f" ({first.reason.value}{f', {first.instance_id}' if first.instance_id else ''})"
    return f"Of {total} chunks: {', '.join(parts)}{why}."


def replace_first_cause(explanation: Explanation, cause: Cause) -> Explanation:
    """The explanation with a better first cause, which takes over the chunks of the old one."""
    old = explanation.causes[0]
    new = msgspec.structs.replace(cause, chunks=old.chunks, first_chunk=old.first_chunk)
    causes = [new, *explanation.causes[1:]]
    spans = [
        msgspec.structs.replace(span, reason=new.reason, instance_id=new.instance_id)
        if span.reason is old.reason and span.instance_id == old.instance_id
        else span
        for span in explanation.spans
    ]
    return msgspec.structs.replace(
        explanation,
        causes=causes,
        possible=[other for other in explanation.possible if other.reason is not new.reason],
        spans=spans,
        summary=summarize(explanation.found, causes, ended_early=explanation.ended_early),
    )
