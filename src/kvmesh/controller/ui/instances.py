"""The table of instances, and who has gone."""

from __future__ import annotations

from collections import Counter

from nicegui import ui

from kvmesh.controller import views
from kvmesh.controller.ui.frame import card
from kvmesh.controller.ui.live import Moment
from kvmesh.controller.ui.tables import Column, LiveTable
from kvmesh.controller.ui.units import age, count, share, size

SHOWN_DEPARTED = 5


class Instances:
    """One line per member."""

    def __init__(self) -> None:
        with card("Instances"):
            self._table = LiveTable(
                [
                    Column("instance", "Instance"),
                    Column("state", "State"),
                    Column("model", "Model"),
                    Column("chunks", "Chunks", right=True),
                    Column("pool", "Pool", right=True),
                    Column("fetched", "Fetched", right=True),
                    Column("served", "Served", right=True),
                    Column("contact", "Last contact", right=True),
                    Column("address", "Peer address"),
                ],
                row_key="incarnation",
                empty="No instance has registered yet",
            )
            self._departed = ui.label().classes("text-xs km-muted break-words")

    def update(self, moment: Moment) -> None:
        """Show all members, and the last ones that went."""
        members = moment.members.instances
        sizes = Counter(instance.format.format_id for instance in members)
        self._table.update([instance_row(one, alone=sizes[one.format.format_id] == 1) for one in members])
        gone = moment.members.departed[:SHOWN_DEPARTED]
        self._departed.text = "Gone: " + ", ".join(
            f"{one.instance_id} ({one.reason}, {age(one.age_s)})" for one in gone
        )
        self._departed.visible = bool(gone)


def instance_row(instance: views.InstanceView, *, alone: bool) -> dict[str, object]:
    """One member as the table shows it. `alone`: no other member has its format."""
    split = any(other.same_model for other in instance.incompatible_with)
    state = instance.state
    if state == "up" and split and alone:
        state = "incompatible"
    elif state == "up" and not instance.inventory_known:
        state = "joining"
    return {
        "incarnation": instance.incarnation,
        "instance": instance.instance_id,
        "state": state,
        "tone": {"up": "ok", "incompatible": "bad"}.get(state, "warn"),
        "model": instance.format.model_name,
        "chunks": instance.chunks,
        "chunks_text": count(instance.chunks),
        "pool": instance.pool_use or 0.0,
        "pool_text": share(instance.pool_use) or "-",
        "fetched": instance.statistics.fetched_bytes,
        "fetched_text": size(instance.statistics.fetched_bytes),
        "served": instance.statistics.served_bytes,
        "served_text": size(instance.statistics.served_bytes),
        "contact": round(instance.last_contact_age_s, 1),
        "contact_text": age(instance.last_contact_age_s),
        "address": instance.peer_address,
    }
