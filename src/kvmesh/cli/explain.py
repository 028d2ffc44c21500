"""`kvmesh explain`: why a request hit and missed what it did, and why requests missed at all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated
from urllib.parse import quote

import typer

from kvmesh.cli.complete import complete_instance
from kvmesh.cli.shared import (
    DEFAULT_CONTROLLER,
    CaOption,
    ControllerOption,
    JsonFlag,
    make_console,
    make_table,
    open_api,
    print_raw_json,
    tell,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from rich.console import Console
    from rich.text import Text

    from kvmesh.client import ControllerApi
    from kvmesh.client.explanations import (
        Cause,
        Explanation,
        Explanations,
        Found,
        RecentRequests,
        Summaries,
        Summary,
        Unanswered,
    )

PATH = "/api/v1/explain"


def explain(
    request: Annotated[
        str | None,
        typer.Argument(help="Id of a request: the engine's, the answer's (cmpl-...), or its X-Request-Id."),
    ] = None,
    instance: Annotated[
        str | None,
        typer.Option(metavar="ID", help="Only this instance.", autocompletion=complete_instance),
    ] = None,
    summary: Annotated[bool, typer.Option("--summary", help="Why requests missed, by reason.")] = False,
    hours: Annotated[float, typer.Option(min=0.02, max=24, metavar="HOURS", help="So far back, with --summary.")] = 1.0,
    limit: Annotated[int, typer.Option(min=1, max=200, help="Requests to list, without REQUEST.")] = 20,
    controller: ControllerOption = DEFAULT_CONTROLLER,
    ca: CaOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Say for a request what was found where, what was not, why, and what to change.

    For example:

    ```text
    kvmesh explain                         # the last requests, with reasons
    kvmesh explain cmpl-9a4e61f07c
    kvmesh explain --summary --hours 6     # why we missed
    kvmesh explain --summary --json | jq '.cluster.misses[0].reason'
    ```

    Nodes remember their last requests only; an id that nobody remembers ends with exit status 4.
    """
    from kvmesh.client import explanations as shapes

    if summary and request is not None:
        raise typer.BadParameter("--summary is about all requests: leave REQUEST out")
    with open_api(controller, ca) as api:
        if summary:
            _show(api, api.get_raw(f"{PATH}/summary", hours=hours, instance=instance), shapes.Summaries, as_json)
        elif request is not None:
            raw = api.get_raw(f"{PATH}/{quote(request, safe='')}", instance=instance)
            _show(api, raw, shapes.Explanations, as_json)
        else:
            _show(api, api.get_raw(PATH, instance=instance, limit=limit), shapes.RecentRequests, as_json)


def _show(api: ControllerApi, raw: bytes, kind: type[Summaries | Explanations | RecentRequests], as_json: bool) -> None:
    from kvmesh.client import explanations as shapes

    if as_json:
        print_raw_json(raw)
        return
    console = make_console()
    told: Summaries | Explanations | RecentRequests = api.decode(raw, kind)
    if isinstance(told, shapes.Summaries):
        _print_summaries(console, told)
    elif isinstance(told, shapes.Explanations):
        for number, one in enumerate(told.explanations):
            if number:
                console.print()
            print_explanation(console, one)
    else:
        _print_recent(console, told)
    _print_unanswered(console, told.unanswered)


# -- one request -------------------------------------------------------------------------------------------------------


def print_explanation(console: Console, told: Explanation) -> None:
    """What was found where, why not the rest, and what to change."""
    from rich.text import Text

    from kvmesh.units import age, duration, size

    def say(word: str, text: Text | str) -> None:
        tell(console, text, label=f"  {word}", indent=11)

    waited = f", waited {duration(told.wait_s)} for peers" if told.wait_s else ""
    tell(console, Text.assemble((told.request_id, "bold"), f"  on {told.instance_id}, {age(told.age_s)}{waited}"))
    tail = f" and {told.tail_tokens} tokens" if told.tail_tokens else ""
    parts = f"{told.chunks} chunks of {told.chunk_tokens}{tail}"
    say("prompt", f"{told.prompt_tokens} tokens: {parts}; {_found(told.found)}")
    if told.separated_by:
        say("apart", f"only requests with the same {', '.join(told.separated_by)} share with it")
    for span in told.spans:
        last = span.first_chunk + span.chunks - 1
        chunks = f"{span.first_chunk}" if span.chunks == 1 else f"{span.first_chunk}-{last}"
        where = _WHERE.get(span.where, span.where) + (f" {span.instance_id}" if span.instance_id else "")
        style = "yellow" if span.where == "nowhere" else "green"
        say("chunks", Text(f"{chunks}: {where}" + (f" ({span.reason})" if span.reason else ""), style=style))
    for fetch in told.fetches:
        missed = ", ".join(f"{reason} {chunks}" for reason, chunks in fetch.misses.items())
        say(
            "fetch",
            f"{fetch.chunks_fetched} of {fetch.chunks_asked} chunks, {size(fetch.fetched_bytes)} in "
            f"{duration(fetch.seconds)} from {', '.join(fetch.holders) or 'nobody'} by {fetch.transport}"
            + (f"; misses: {missed}" if missed else ""),
        )
    for word, causes in (("because", told.causes), ("beware", told.possible)):
        for cause in causes:
            for label, text in _cause(cause, word):
                say(label, text)


def _cause(cause: Cause, word: str) -> Iterator[tuple[str, Text | str]]:
    """Labels and lines."""
    from rich.text import Text

    who = f" {cause.instance_id}" if cause.instance_id else ""
    number = f", {cause.chunks} chunk{'s' if cause.chunks != 1 else ''}" if cause.chunks else ""
    yield word, Text.assemble((cause.reason, "bold yellow"), f"{who}{number}: {cause.text}")
    for one in cause.fields:
        yield "", f"{one.field}: {one.ours or 'empty'} here, {one.theirs or 'empty'} there"
    if cause.detail and not cause.fields:
        yield "", ", ".join(f"{name} {_plain(value)}" for name, value in cause.detail.items())
    if cause.change:
        yield "change", cause.change


# -- lists -------------------------------------------------------------------------------------------------------------


def _print_recent(console: Console, told: RecentRequests) -> None:
    from rich.text import Text

    from kvmesh.units import age

    if not told.requests:
        console.print("no instance remembers a request")
        return
    table = make_table(
        *("request", "instance", "when", "tokens", "chunks", "found", "reason"), right=("tokens", "chunks")
    )
    for one in told.requests:
        table.add_row(
            one.request_id,
            one.instance_id,
            age(one.age_s),
            str(one.prompt_tokens),
            str(one.chunks),
            _found(one.found),
            Text(one.reason or "", style="yellow"),
        )
    console.print(table)


def _print_summaries(console: Console, told: Summaries) -> None:
    _print_summary(console, told.cluster, f"cluster, last {told.hours:g} h")
    for one in told.instances:
        if one.requests and len(told.instances) > 1:
            console.print()
            _print_summary(console, one, one.instance_id)


def _print_summary(console: Console, told: Summary, title: str) -> None:
    from rich.text import Text

    from kvmesh.units import count, share

    rate = "" if told.hit_rate is None else f", hit rate {share(told.hit_rate)}"
    sums = f"{count(told.requests)} requests, {count(told.chunks)} chunks{rate}; {_found(told.found)}"
    tell(console, Text.assemble((title, "bold"), f": {sums}"))
    for missed in told.misses:
        counted = f" ({count(missed.chunks)} chunks, {count(missed.requests)} requests): {missed.text}"
        line = Text.assemble((missed.reason, "bold yellow"), counted)
        tell(console, line, label=f"  {share(missed.share):>5}", indent=8)
        if missed.change:
            tell(console, missed.change, indent=8)


def _print_unanswered(console: Console, unanswered: Iterable[Unanswered]) -> None:
    from rich.text import Text

    for one in unanswered:
        tell(console, Text(f"not asked: {one.instance_id}: {one.text or one.code}", style="dim"))


def _found(found: Found) -> str:
    told = (
        (found.device, "on the device"),
        (found.own_pool, "in the own pool"),
        (found.peer, "from peers"),
        (found.nowhere, "computed"),
    )
    return ", ".join(f"{number} {where}" for number, where in told if number) or "nothing to find"


def _plain(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


_WHERE = {"device": "on the device", "own_pool": "in the own pool", "peer": "from peer", "nowhere": "computed"}
