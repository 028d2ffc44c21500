"""Health at a glance: one sentence, and what needs a person."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from kvmesh.controller.ui.compatibility import sentence
from kvmesh.controller.ui.live import Moment
from kvmesh.controller.ui.members import SLOW_BYTES, instance_link
from kvmesh.controller.ui.panel import Panel, Value
from kvmesh.controller.ui.units import count, duration, listed, some

SHOWN = 8


class Notice(NamedTuple):
    """One thing that needs a person."""

    key: str
    tone: str
    title: str
    text: str
    link: str = ""
    action: str = ""


class Attention(Panel, component="assets/kvmesh_notices.js"):
    """The box on top of the overview."""

    def update_moment(self, moment: Moment) -> None:
        """Show this moment."""
        notices = list(notices_of(moment))
        title, tone = headline(moment, notices)
        items: list[Value] = [dict(one._asdict()) for one in notices[:SHOWN]]
        if len(notices) > SHOWN:
            items.append(
                Notice("more", "warn", f"{len(notices) - SHOWN} more", "", "/instances", "Instances")._asdict()
            )
        totals, health = moment.totals, moment.health
        parts = [
            some(totals.formats, "format"),
            f"{some(totals.chunks, 'chunk')} in {some(totals.slots, 'slot')}",
            f"controller {health.version}, up for {duration(max(60, health.uptime_s // 60 * 60))}",
        ]
        self.show(title=title, tone=tone, note=" · ".join(parts), items=items)


def headline(moment: Moment, notices: list[Notice]) -> tuple[str, str]:
    """The one sentence, and its tone."""
    number = len(moment.instances)
    if any(one.tone == "bad" for one in notices):
        return f"{some(len(notices), 'thing needs', 'things need')} attention", "bad"
    if notices:
        return f"{some(len(notices), 'thing needs', 'things need')} a look", "warn"
    if not number:
        return "No instance has joined yet", "idle"
    if number == 1:
        return "One instance is up; a second one is needed to share with", "ok"
    return f"All {count(number)} instances are up and can share", "ok"


def badge(notices: Sequence[Notice]) -> tuple[str, str]:
    """The same in a word or two, for the bar on top of every page, and its tone."""
    if not notices:
        return "healthy", "ok"
    return some(len(notices), "notice"), "bad" if any(one.tone == "bad" for one in notices) else "warn"


def notices_of(moment: Moment) -> Iterator[Notice]:
    """The worst first."""
    for problem in moment.health.problems:
        yield Notice(f"health {problem}", "bad", "The controller is not whole", f"{problem}. Restart it.")
    for pair in moment.split_models:
        key = f"format {pair.ours.format_id} {pair.theirs.format_id}"
        yield Notice(
            key, "bad", "Instances of one model cannot share", sentence(pair), "/compatibility", "What to change"
        )
    for one in moment.corrupt[:SHOWN]:
        text = (
            f"{some(one.corrupt_chunks, 'chunk')} from {one.member.peer_address} arrived with other bytes than were "
            "published, and were thrown away. Look at its memory and network."
        )
        title = f"{one.instance_id} delivers wrong bytes"
        yield Notice(f"corrupt {one.instance_id}", "bad", title, text, instance_link(one.instance_id), "Instance")
    if moment.suspects:
        names = listed([one.instance_id for one in moment.suspects])
        text = "No heartbeat for longer than there should be: stopped, overloaded, or cut off from the controller."
        yield Notice("silent", "warn", f"Silent: {names}", text, "/instances", "Instances")
    slow = [one.instance_id for one in moment.instances if one.downstream.outstanding_bytes > SLOW_BYTES]
    if slow:
        text = "News of the cluster wait for them; they see other instances' chunks later."
        yield Notice("slow", "warn", f"Slow to read: {listed(slow)}", text, "/instances", "Instances")
    yield from refusals_of(moment)


def refusals_of(moment: Moment) -> Iterator[Notice]:
    """Who was turned away a short while ago."""
    for refusal in moment.registry.refusals.recent(moment.now_s):
        yield Notice(
            f"refused {refusal.who}",
            "warn",
            f"Turned away: {refusal.who}",
            f"{refusal.reason}. " + (f"{count(refusal.times)} times" if refusal.times > 1 else "Once"),
        )
