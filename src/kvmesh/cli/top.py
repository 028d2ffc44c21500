"""`kvmesh top`: the cluster, live in a terminal."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from typing import TYPE_CHECKING, Annotated

import typer

from kvmesh.cli.shared import (
    DEFAULT_CONTROLLER,
    CaOption,
    ControllerOption,
    JsonFlag,
    make_console,
    make_table,
    open_api,
)
from kvmesh.cli.status import SHOWN_DEPARTED, SHOWN_SPLITS, status_parts

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console, Group
    from rich.table import Table

    from kvmesh.client import ControllerApi
    from kvmesh.client.moment import Moment, Rates

SHOWN_FETCHES = 12
OTHER_ROWS = 9
"""Of a picture, beside members, fetches, incompatibilities and the departed."""
MIN_ROWS = 5
WINDOW_S = 6.0
"""Rates are those of about so long: counters come with heartbeats, every two seconds unless configured otherwise."""


def top(
    controller: ControllerOption = DEFAULT_CONTROLLER,
    ca: CaOption = None,
    interval: Annotated[
        float, typer.Option(min=0.2, max=3600, metavar="SECONDS", help="Between two looks at the cluster.")
    ] = 2.0,
    count: Annotated[int | None, typer.Option(min=1, help="So many looks, then end.  [default: until Ctrl-C]")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Watch the cluster: what every member fetches and serves now, and the last fetches. Ctrl-C ends it.

    For example:

    ```text
    kvmesh top
    kvmesh top --interval 0.5 --controller https://controller:9000 --ca ca.pem
    kvmesh top --json --count 10 > rates.jsonl     # one line of JSON per look
    ```

    A controller that does not answer for a while is waited for; that none answers at the start is an error (3).
    """
    with open_api(controller, ca, timeout_s=max(2.0, interval)) as api, contextlib.suppress(KeyboardInterrupt):
        if as_json:
            _print_lines(api, interval, count)
        else:
            _show(api, interval, count)


def _show(api: ControllerApi, interval_s: float, count: int | None) -> None:
    from rich.live import Live

    console = make_console()
    looks = _looks(api, interval_s, count)
    pictures = (picture(api.target.url, console, *look) for look in looks)
    if not console.is_terminal:
        for shown in pictures:
            console.print(shown)
        return
    with Live(next(pictures), console=console, screen=True, auto_refresh=False) as live:
        live.refresh()
        for shown in pictures:
            live.update(shown, refresh=True)


def _print_lines(api: ControllerApi, interval_s: float, count: int | None) -> None:
    import msgspec

    from kvmesh.client.moment import sum_rates

    for moment, rates, error in _looks(api, interval_s, count):
        line = {
            "error": error,
            "instances": len(moment.members.instances),
            "totals": moment.totals,
            "rates": sum_rates(rates)._asdict(),
            "rates_by_instance": {name: one._asdict() for name, one in rates.items()},
        }
        typer.echo(msgspec.json.encode(line).decode())


def _looks(api: ControllerApi, interval_s: float, count: int | None) -> Iterator[tuple[Moment, dict[str, Rates], str]]:
    """One after the other, `interval_s` apart: the cluster, its rates, and what keeps us from seeing it (then the last
    one again). Raises DirectoryError when the first one fails.
    """
    from kvmesh.client.moment import rates_by_instance, take_moment
    from kvmesh.errors import DirectoryError

    now, number = take_moment(api), 0
    rates = rates_by_instance(None, now)
    past = deque([now])
    yield now, rates, ""
    while count is None or (number := number + 1) < count:
        time.sleep(interval_s)
        error = ""
        try:
            now = take_moment(api)
            rates = rates_by_instance(past[0], now)
            past.append(now)
            while len(past) > 1 and now.at_s - past[1].at_s >= WINDOW_S:
                past.popleft()
        except DirectoryError as failure:
            error = str(failure)
        yield now, rates, error


def picture(url: str, console: Console, moment: Moment, rates: dict[str, Rates], error: str = "") -> Group:
    """One screen: on a terminal as high as it is, elsewhere everything."""
    from rich.console import Group
    from rich.text import Text

    from kvmesh.client.moment import sum_rates
    from kvmesh.units import age, duration, size

    total = sum_rates(rates)
    parts: list[Text | Table] = []
    if error:
        silent_s = time.monotonic() - moment.at_s
        parts.append(Text(f"no news for {duration(silent_s)}: {error}", style="bold red"))
    rows = None
    if console.is_terminal:
        below = min(len(moment.members.departed), SHOWN_DEPARTED) + 2 * min(len(moment.incompatibilities), SHOWN_SPLITS)
        rows = max(MIN_ROWS, console.height - SHOWN_FETCHES - below - OTHER_ROWS)
    parts += status_parts(url, moment, console.width, rates, rows)
    line = f"now        {size(total.fetched_bytes)}/s in {total.fetches:.1f} fetches/s, {total.misses:.1f} misses/s"
    parts.insert(3 if error else 2, Text(line, style="bold"))
    if moment.fetches:
        parts.append(Text("last fetches", style="bold"))
        table = make_table(
            *("when", "instance", "from", "by", "chunks", "size", "took", "misses"), right=("chunks", "size", "took")
        )
        for fetch in moment.fetches[:SHOWN_FETCHES]:
            table.add_row(
                age(fetch.age_s),
                fetch.instance_id,
                ", ".join(fetch.holders) or "-",
                fetch.transport,
                f"{fetch.chunks_fetched}/{fetch.chunks_asked}",
                size(fetch.fetched_bytes),
                duration(fetch.seconds),
                ", ".join(f"{reason} {chunks}" for reason, chunks in fetch.misses.items()),
            )
        parts.append(table)
    return Group(*parts)
