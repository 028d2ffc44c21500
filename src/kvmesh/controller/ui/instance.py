"""The page of one instance."""

from __future__ import annotations

from typing import NamedTuple

from nicegui import ui

from kvmesh.controller.ui.compatibility import Difference, differences_table
from kvmesh.controller.ui.frame import card, columns, text
from kvmesh.controller.ui.live import Moment
from kvmesh.controller.ui.members import STATES, Member
from kvmesh.controller.ui.open_pages import Update
from kvmesh.controller.ui.overview import Figures, figure
from kvmesh.controller.ui.panel import Value
from kvmesh.controller.ui.tables import Column, Table, cell
from kvmesh.controller.ui.traffic import fetches_table, rounded, routes_table
from kvmesh.controller.ui.units import count, duration, rate, share, size, some


class Fact(NamedTuple):
    """One line of what there is to know."""

    name: str
    value: str
    tone: str = ""


def build(instance_id: str) -> Update:
    """Inside a frame."""
    with ui.element("section").classes("km-head"):
        text(instance_id or "No instance named", "h1")
        text("one instance", "span", "km-muted")
        ui.link("All instances", "/instances").classes(replace="km-more")
    figures = Figures()
    with columns():
        with card("Facts"):
            facts = _facts_table()
        with card("Missed", "chunks that it asked for and did not get, since its start"):
            misses = _misses_table()
    with card("Cannot share with", "instances that serve the same model") as apart:
        differences = differences_table()
    apart.set_visibility(False)
    with columns():
        with card("Routes", "from and to it"):
            routes = routes_table(rows=8)
        with card("Fetches", "its last ones"):
            fetches = fetches_table(rows=8)

    def update(moment: Moment) -> None:
        instance = moment.registry.instances.get(instance_id)
        if instance is None:
            figures.show_figures(figure("State", "gone", "No member has this id now."))
            return
        member = Member(instance, moment)
        figures.show_figures(*figures_of(member))
        facts.update_records(facts_of(member))
        misses.update_records(sorted(instance.statistics.misses.items(), key=_chunks, reverse=True))
        group = instance.group
        fields = [
            Difference(pair, one.field, one.ours, one.theirs)
            for pair in moment.split_models
            if group in {pair.ours, pair.theirs}
            for one in pair.differences
        ]
        apart.set_visibility(bool(fields))
        differences.update_records(fields)
        own = [route for route in moment.routes if instance_id in {route.receiver, route.holder}]
        routes.update_records([(route, moment) for route in own])
        fetches.update_records([(one, moment) for one in moment.fetches if one.report.instance_id == instance_id])

    for table in (facts, misses, differences, routes, fetches):
        table.update_records([])
    return update


def figures_of(member: Member) -> list[dict[str, Value]]:
    """State, pool, fetching and serving."""
    state, statistics = member.state, member.instance.statistics
    tone, meaning = STATES[state]
    return [
        figure("State", state, meaning, tone=tone if tone in {"ok", "warn", "bad"} else ""),
        figure(
            "Pool in use",
            share(member.pool_use),
            f"{count(member.chunks)} of {some(member.instance.member.slots, 'slot')}",
        ),
        figure(
            "Fetches",
            rate(rounded(member.fetched_per_second)),
            f"{size(statistics.fetched_bytes)} in {some(statistics.fetches, 'fetch', 'fetches')}",
        ),
        figure("Serves", rate(rounded(member.served_per_second)), f"{size(statistics.served_bytes)} to others"),
    ]


def facts_of(member: Member) -> list[Fact]:
    """What its registration and its heartbeats say."""
    instance, moment = member
    described, kv_format = instance.member, instance.group.format
    behind = instance.downstream.outstanding_bytes
    corrupt = instance.corrupt_chunks
    return [
        Fact("Peer address", described.peer_address),
        Fact("Admin address", f"{described.peer_host}:{described.admin_port}" if described.admin_port else "none"),
        Fact("Transports", ", ".join(described.transports)),
        Fact("Version", described.version),
        Fact("Incarnation", instance.incarnation),
        Fact("Member for", duration(max(60, (moment.now_s - instance.registered_at_s) // 60 * 60))),
        Fact("Model", kv_format.model_name),
        Fact("Format", instance.group.format_id),
        Fact("Shares with", some(len(instance.group.members) - 1, "other instance")),
        Fact("Chunk", f"{some(kv_format.chunk_tokens, 'token')}, {size(kv_format.chunk_bytes)}"),
        Fact("Knows of others", some(instance.statistics.replica_chunks, "chunk")),
        Fact("News under way to it", size(behind) if behind > 100_000 else "none to speak of"),
        Fact(
            "Corrupt chunks", f"{corrupt}, as others report" if corrupt else "none reported", "bad" if corrupt else ""
        ),
    ]


def _facts_table() -> Table[Fact]:
    return Table[Fact](
        [
            Column("name", "Fact", lambda one: one.name),
            Column("value", "Value", lambda one: cell(one.value, tone=one.tone or None)),
        ],
        caption="What is known of the instance",
        empty="Nothing is known of it now",
        key=lambda one: one.name,
    )


def _misses_table() -> Table[tuple[str, int]]:
    return Table[tuple[str, int]](
        [
            Column("reason", "Reason", lambda one: one[0], lambda one: one[0]),
            Column("chunks", "Chunks", lambda one: count(one[1]), _chunks, right=True),
        ],
        caption="Chunks missed, by reason",
        empty="Nothing",
        key=lambda one: one[0],
    )


def _chunks(one: tuple[str, int]) -> int:
    return one[1]
