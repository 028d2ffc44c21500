"""The page of all instances."""

from __future__ import annotations

from kvmesh.controller.instances import Departed
from kvmesh.controller.ui.frame import card
from kvmesh.controller.ui.live import Moment
from kvmesh.controller.ui.members import Member, contact_cell, instance_link, state_cell
from kvmesh.controller.ui.open_pages import Update
from kvmesh.controller.ui.tables import Cell, Column, Table, cell
from kvmesh.controller.ui.units import count, rate, share

_REASONS = {"left": "stopped in good order", "timeout": "fell silent", "replaced": "was started anew"}


def build() -> Update:
    """Inside a frame."""
    with card("Instances", "every engine with its node", level="h1"):
        table = instances_table()
    with card("Gone", "in the last ten minutes"):
        gone = _gone_table()

    def update(moment: Moment) -> None:
        table.update_records([Member(instance, moment) for instance in moment.instances])
        gone.update_records([(one, moment) for one in reversed(moment.registry.departed.values())])

    return update


def instances_table() -> Table[Member]:
    """One row per member."""
    return Table[Member](
        [
            Column(
                "instance", "Instance", lambda one: cell(one.name, link=instance_link(one.name)), lambda one: one.name
            ),
            Column("state", "State", state_cell, lambda one: one.state, kind="state"),
            Column("model", "Model", lambda one: one.instance.group.format.model_name, _model),
            Column("format", "Format", lambda one: one.instance.group.format_id[:8], _model, kind="code"),
            Column("pool", "Pool", _pool, lambda one: one.pool_use, right=True),
            Column("chunks", "Chunks", lambda one: count(one.chunks), lambda one: one.chunks, right=True),
            Column("fetching", "Fetches", lambda one: rate(one.fetched_per_second), _fetching, right=True),
            Column("serving", "Serves", lambda one: rate(one.served_per_second), _serving, right=True),
            Column("load", "Load", _load, lambda one: one.load, right=True),
            Column("contact", "Heard", contact_cell, lambda one: -one.instance.last_contact_s, right=True),
            Column("life", "Incarnation", lambda one: one.instance.incarnation[:8], kind="code"),
        ],
        caption="Instances: state, model, pool use and rates",
        empty="No instance has joined yet. Start vLLM with KVMeshConnector, and controller_pull_url and "
        "controller_reply_url pointing here.",
        key=lambda one: f"{one.name} {one.instance.incarnation}",
        search=lambda one: (
            f"{one.name} {one.state} {one.instance.group.format.model_name} "
            f"{one.instance.group.format_id} {one.instance.incarnation} {one.instance.member.peer_address}"
        ),
        search_label="Search name, state, model, address",
        sort="instance",
    )


def _gone_table() -> Table[tuple[Departed, Moment]]:
    return Table[tuple[Departed, Moment]](
        [
            Column(
                "instance", "Instance", lambda one: one[0].member.instance_id, lambda one: one[0].member.instance_id
            ),
            Column("why", "What happened", lambda one: _REASONS[one[0].reason]),
            Column("when", "When", lambda one: cell(moment_ms=one[1].milliseconds(one[0].at_s)), _gone_at, right=True),
            Column("model", "Model", lambda one: one[0].member.format.model_name),
            Column("address", "Address", lambda one: one[0].member.peer_address, kind="code"),
        ],
        caption="Instances that have gone",
        empty="Nobody",
        key=lambda one: f"{one[0].member.instance_id} {one[0].member.incarnation}",
        rows_per_page=10,
    )


def _gone_at(one: tuple[Departed, Moment]) -> float:
    return one[0].at_s


def _model(one: Member) -> tuple[str, str]:
    return one.instance.group.format.model_name, one.instance.group.format_id


def _fetching(one: Member) -> float:
    return one.fetched_per_second


def _serving(one: Member) -> float:
    return one.served_per_second


def _pool(one: Member) -> Cell:
    hint = f"{one.chunks} of {one.instance.member.slots} slots hold a published chunk"
    return cell(share(one.pool_use), share=round(one.pool_use, 3), hint=hint)


def _load(one: Member) -> Cell:
    statistics = one.instance.statistics
    hint = f"{statistics.active_fetches} fetches run, {statistics.active_serves} connections are served"
    return cell(str(one.load), hint=hint)
