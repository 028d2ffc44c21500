"""`kvmesh status`: the cluster at a glance."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

import typer

from kvmesh.cli.shared import (
    DEFAULT_CONTROLLER,
    EXIT_NO,
    CaOption,
    ControllerOption,
    JsonFlag,
    make_console,
    make_table,
    open_api,
    print_json,
)

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from kvmesh.client import ControllerApi, HitRates, Instance
    from kvmesh.client.answers import HitRatesOf
    from kvmesh.client.moment import Moment, Rates

SHOWN_DEPARTED = 10
SHOWN_SPLITS = 5
FULL = 0.98
"""Share of a pool from which it is shown as full."""
NEEDED_WIDTH: Mapping[str, int] = MappingProxyType({"address": 100, "format": 125, "incarnation": 140})
"""Columns that are shown where a terminal has so many columns of its own."""


def status(controller: ControllerOption = DEFAULT_CONTROLLER, ca: CaOption = None, as_json: JsonFlag = False) -> None:
    """Show the cluster: members, pools, hit rates, and who cannot share with whom.

    For example:

    ```text
    kvmesh status
    kvmesh status --controller 10.0.0.5:9000
    kvmesh status --json | jq '.instances[] | {instance_id, state}'
    ```

    The exit status is 1 when the controller says that a part of it has died, 3 when no controller answers. Whether
    anything keeps the members from sharing is asked with `kvmesh doctor`.
    """
    with open_api(controller, ca) as api:
        raise typer.Exit(show_status(api, as_json=as_json))


def show_status(api: ControllerApi, *, as_json: bool) -> int:
    """Print it; returns the exit status. Raises DirectoryError."""
    from rich.text import Text

    from kvmesh.client.moment import take_moment

    moment = take_moment(api)
    if as_json:
        print_json(
            {
                "controller": {"url": api.target.url, "health": moment.health},
                "totals": moment.totals,
                "hit_rates": moment.hit_rates,
                "instances": moment.members.instances,
                "departed": moment.members.departed,
                "incompatibilities": moment.incompatibilities,
            }
        )
    else:
        console = make_console()
        for part in status_parts(api.target.url, moment, console.width):
            console.print(part, soft_wrap=isinstance(part, Text) and not console.is_terminal)
    return EXIT_NO if moment.health.problems else 0


def status_parts(
    url: str, moment: Moment, width: int, rates: dict[str, Rates] | None = None, rows: int | None = None
) -> Iterator[Text | Table]:
    """Lines and the table, from top to bottom. With `rates` (see `kvmesh top`) the table has what happens now instead
    of sums; with `rows`, so many members.
    """
    from rich.text import Text

    yield from head(url, moment)
    if moment.members.instances:
        yield member_table(moment, rates, width, rows)
        if rows is not None and len(moment.members.instances) > rows:
            yield Text(f"and {len(moment.members.instances) - rows} quieter members", style="dim")
    yield from foot(moment)


def head(url: str, moment: Moment) -> Iterator[Text]:
    """Controller, sums, and what is wrong with the controller."""
    from rich.text import Text

    from kvmesh.units import count, duration, share, size

    health, totals = moment.health, moment.totals
    well = not health.problems
    line = Text("controller ", style="bold")
    line.append(f"{url}  kvmesh {health.version or '?'}, up for {duration(health.uptime_s)}, ", style="not bold")
    line.append("well" if well else "not well", style="green" if well else "bold red")
    yield line
    for problem in health.problems:
        yield Text(f"  {problem}", style="red")
    silent = sum(member.state != "up" for member in moment.members.instances)
    copies = f", {totals.entries / totals.chunks:.2f} holders each" if totals.chunks else ""
    use = f", pools {share(totals.entries / totals.slots)} full" if totals.slots else ""
    yield Text(
        f"members    {totals.instances}"
        + (f" ({silent} silent)" if silent else "")
        + f", {totals.formats} format{'s' if totals.formats != 1 else ''}; "
        f"{count(totals.chunks)} chunks{copies}{use}",
        style="yellow" if silent else "",
    )
    if totals.chunks_asked:
        rate = f" at {size(totals.fetched_bytes / totals.fetch_seconds)}/s" if totals.fetch_seconds else ""
        missed = ", ".join(
            f"{reason} {count(chunks)}" for reason, chunks in sorted(totals.misses.items(), key=lambda item: -item[1])
        )
        yield Text(
            f"fetched    {size(totals.fetched_bytes)} in {count(totals.fetches)} fetches{rate}; "
            f"{share(totals.chunks_fetched / totals.chunks_asked)} of the chunks asked for came"
            + (f"; misses: {missed}" if missed else "")
        )
    else:
        yield Text("fetched    nothing yet")
    if moment.hit_rates is not None:
        yield hit_rate_line(moment.hit_rates)


def hit_rate_line(told: HitRates) -> Text:
    """Achieved beside achievable, over the last while."""
    from rich.text import Text

    from kvmesh.units import count, duration, share

    recent = told.cluster.recent
    if recent.achieved is None:
        return Text(f"hit rate   no request in the last {duration(told.window_s)}")
    line = f"hit rate   {share(recent.achieved)} of the chunks of {count(recent.requests)} requests"
    if recent.achievable is not None:
        line += f"; {share(recent.achievable)} with unlimited pools and perfect sharing"
    if recent.achievable_alone is not None:
        line += f", {share(recent.achievable_alone)} without sharing"
    parts = ((recent.device_chunks, "device"), (recent.own_chunks, "own pool"), (recent.peer_chunks, "peers"))
    where = ", ".join(f"{name} {share(chunks / recent.chunks)}" for chunks, name in parts if chunks)
    return Text(f"{line} ({where}; last {duration(told.window_s)})" if where else line)


def members_shown(moment: Moment, rates: dict[str, Rates] | None, rows: int | None) -> list[Instance]:
    """By name; where there is room for some only, silent and busy ones before all others."""
    listed = moment.members.instances
    if rows is None or len(listed) <= rows:
        return listed

    def rank(member: Instance) -> tuple[bool, float]:
        now = None if rates is None else rates[member.instance_id]
        return member.state == "up", 0.0 if now is None else -(now.fetched_bytes + now.served_bytes)

    return sorted(listed, key=rank)[:rows]


def member_table(moment: Moment, rates: dict[str, Rates] | None, width: int, rows: int | None = None) -> Table:
    """One row for each member, or for the `rows` that matter most; without what a narrow terminal has no room for."""
    from rich.text import Text

    from kvmesh.units import age, count, share

    figures = ("fetching", "serving", "fetches/s", "misses/s") if rates is not None else ("fetched", "served", "came")
    hit_rates = {} if moment.hit_rates is None else {one.instance_id: one for one in moment.hit_rates.instances}
    numbers = (*figures, *(["hit rate"] if hit_rates else []), "heard of")
    optional = [heading for heading, needed in NEEDED_WIDTH.items() if width >= needed]
    table = make_table("instance", "state", *optional, "pool", *numbers, right=numbers)
    for member in members_shown(moment, rates, rows):
        state = member.sharing if member.state == "up" and member.sharing != "on" else member.state
        told = {
            "address": member.peer_address,
            "format": f"{member.format.model_name} {member.format.format_id[:8]}",
            "incarnation": member.incarnation[:8],
        }
        pool = f"{share(member.pool_use) or '-'} of {count(member.slots)}"
        table.add_row(
            member.instance_id,
            Text(state, style="green" if state == "up" else "bold yellow"),
            *(told[heading] for heading in optional),
            Text(pool, style="yellow" if (member.pool_use or 0) >= FULL else ""),
            *(_now(rates[member.instance_id]) if rates is not None else _so_far(member)),
            *([_hit_rate(hit_rates.get(member.instance_id))] if hit_rates else []),
            age(member.last_contact_age_s),
            style="dim" if not member.inventory_known else None,
        )
    return table


def _now(rates: Rates) -> list[str]:
    from kvmesh.units import size

    moved = [f"{size(rates.fetched_bytes)}/s", f"{size(rates.served_bytes)}/s"]
    return [*moved, f"{rates.fetches:.1f}", f"{rates.misses:.1f}"]


def _so_far(member: Instance) -> list[str]:
    from kvmesh.units import share, size

    told = member.statistics
    asked = told.fetched_chunks + sum(told.misses.values())
    came = share(told.fetched_chunks / asked) if asked else "-"
    return [size(told.fetched_bytes), size(told.served_bytes), came]


def _hit_rate(told: HitRatesOf | None) -> str:
    from kvmesh.units import share

    return "-" if told is None else share(told.recent.achieved) or "-"


def foot(moment: Moment) -> Iterator[Text]:
    """Who cannot share, and who has gone."""
    from rich.text import Text

    from kvmesh.doctor.formats import ADVICE, splits
    from kvmesh.units import age

    found = [split for split in splits(moment.incompatibilities) if split.same_model]
    for split in found[:SHOWN_SPLITS]:
        yield Text(split.sentence(), style="red")
        advice = next((ADVICE[name] for name, _, _ in split.fields if name in ADVICE), "")
        if advice:
            yield Text(f"  {advice}")
    if len(found) > SHOWN_SPLITS:
        yield Text(f"and {len(found) - SHOWN_SPLITS} more reasons why members cannot share: kvmesh doctor", style="red")
    departed = moment.members.departed
    for gone in departed[:SHOWN_DEPARTED]:
        yield Text(f"gone       {gone.instance_id} ({gone.peer_address}) {age(gone.age_s)}: {gone.reason}", style="dim")
    if len(departed) > SHOWN_DEPARTED:
        yield Text(f"           and {len(departed) - SHOWN_DEPARTED} more", style="dim")
