"""What the page says of single instances: words and cells, used by several pages."""

from __future__ import annotations

from typing import NamedTuple
from urllib.parse import quote

from kvmesh.controller.instances import Instance
from kvmesh.controller.ui.live import Moment
from kvmesh.controller.ui.tables import Cell, cell

SLOW_BYTES = 8_000_000
"""Notices under way to an instance from which on it is called slow."""
STATES = {
    "up": ("ok", "Answers, publishes and fetches."),
    "joining": ("accent", "Registered; its inventory has not come yet."),
    "slow": ("warn", "Does not keep up with the news of the cluster, and gets whole inventories from time to time."),
    "alone": ("bad", "Nobody serves its model in its format: it can share with nobody. See Compatibility."),
    "draining": ("warn", "Publishes and fetches no more, and hands hot chunks over to others."),
    "drained": ("idle", "Shares nothing until it is resumed or started anew. See Operations."),
    "silent": ("warn", "No heartbeat for longer than there should be. It is dropped when that goes on."),
    "corrupt": ("bad", "Others have got wrong bytes from it: look at its memory and network."),
}


class Member(NamedTuple):
    """An instance at a moment."""

    instance: Instance
    moment: Moment

    @property
    def name(self) -> str:
        return self.instance.instance_id

    @property
    def chunks(self) -> int:
        """Chunks published, as the controller knows them."""
        return len(self.instance.group.replica.keys_of(self.name))

    @property
    def pool_use(self) -> float:
        """0 to 1."""
        slots = self.instance.member.slots
        return min(1.0, self.chunks / slots) if slots else 0.0

    @property
    def state(self) -> str:
        """One of STATES; the worst that is true."""
        instance, moment = self
        if moment.registry.state(instance, moment.now_s) != "up":
            return "silent"
        if instance.corrupt_chunks:
            return "corrupt"
        if instance.statistics.sharing in STATES:
            return instance.statistics.sharing
        if len(instance.group.members) == 1 and instance.group in moment.split_groups:
            return "alone"
        if instance.group.replica.sequence(self.name) is None:
            return "joining"
        return "slow" if instance.downstream.outstanding_bytes > SLOW_BYTES else "up"

    @property
    def fetched_per_second(self) -> float:
        """Bytes; the mean of the last while."""
        rates = self.instance.rates.rates()
        return rates.fetched_bytes_per_s if rates else 0.0

    @property
    def served_per_second(self) -> float:
        """Bytes; the mean of the last while."""
        rates = self.instance.rates.rates()
        return rates.served_bytes_per_s if rates else 0.0

    @property
    def load(self) -> int:
        """Fetches that run now, and connections that it serves."""
        statistics = self.instance.statistics
        return statistics.active_fetches + statistics.active_serves


def instance_link(instance_id: str) -> str:
    """Address of the page of one instance."""
    return f"/instance?id={quote(instance_id, safe='')}"


def state_cell(member: Member) -> Cell:
    """State with its dot; the hint says what it means."""
    state = member.state
    tone, meaning = STATES[state]
    return cell(state, tone=tone, hint=meaning)


def contact_cell(member: Member) -> Cell:
    """Nothing moves in it while heartbeats come."""
    registry, instance = member.moment.registry, member.instance
    if registry.state(instance, member.moment.now_s) == "up":
        return "now"
    return cell(moment_ms=member.moment.milliseconds(instance.last_contact_s), tone="warn")
