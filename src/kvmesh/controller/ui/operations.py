"""Doing something to the cluster: a form, a confirmation that says what will happen, and how far operations are."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from nicegui import Client, ui
from pydantic import TypeAdapter, ValidationError
from starlette.requests import HTTPConnection

from kvmesh.controller.api import Context
from kvmesh.controller.errors import ApiError
from kvmesh.controller.operation_bodies import AnyBody, OperationBody
from kvmesh.controller.operation_views import OperationView
from kvmesh.controller.ui.frame import card, columns, text
from kvmesh.controller.ui.live import Moment
from kvmesh.controller.ui.open_pages import Update
from kvmesh.controller.ui.tables import Cell, Column, Table, cell
from kvmesh.controller.ui.units import NOTHING, duration, listed, size
from kvmesh.controller.write_guard import may_write

_BODY: TypeAdapter[AnyBody] = TypeAdapter(OperationBody)
TONES = {"done": "ok", "partly": "warn", "failed": "bad", "running": "accent", "pending": "accent"}
EVERYWHERE = "everywhere"


class Kind(NamedTuple):
    """One kind of operation, as the form shows it."""

    title: str
    explanation: str
    fields: frozenset[str]
    danger: str = ""
    """What is lost by it; the confirmation says so."""
    anywhere: bool = False
    """It may be done everywhere."""


KINDS = {
    "warm": Kind(
        "Warm",
        "The instance fetches chunks from others before requests need them: the hottest ones, or those of a prompt.",
        frozenset({"instance", "hottest", "text"}),
    ),
    "pin": Kind(
        "Pin",
        "Chunks of a prompt stay in the pools that hold them, whatever else comes, for a time.",
        frozenset({"instance", "text", "seconds"}),
        anywhere=True,
    ),
    "unpin": Kind(
        "Unpin",
        "Pinned chunks may be evicted again: those of a prompt, or all.",
        frozenset({"instance", "text"}),
        anywhere=True,
    ),
    "drain": Kind(
        "Drain",
        "The instance publishes and fetches no more, hands over hot chunks that nobody else holds, and leaves.",
        frozenset({"instance", "hand_over", "leave"}),
        danger="The instance shares nothing afterwards, until it is resumed or started anew.",
    ),
    "resume": Kind("Resume", "Undoes a drain after which the instance has not left.", frozenset({"instance"})),
    "move": Kind(
        "Move",
        "One instance fetches chunks of another, which then clears them: those of a prompt, or all.",
        frozenset({"from", "to", "text"}),
        danger="What has been moved is removed from the first instance.",
    ),
    "clear": Kind(
        "Clear",
        "Chunks are retracted and removed from the pools: those of a prompt, or all.",
        frozenset({"instance", "text"}),
        danger="What is cleared has to be computed again.",
        anywhere=True,
    ),
}


def build(context: Context, client: Client) -> Update:
    """Inside a frame."""
    form = Form(context, client)
    with columns(wide_left=True):
        with card("Operations", "what was asked for, newest first", level="h1"):
            table = operations_table()
        with card("Start one"):
            form.build()

    def act(operation_id: str, what: str) -> None:
        if what == "cancel":
            form.confirm_cancel(operation_id)

    table.on_action(act)

    def update(moment: Moment) -> None:
        form.update_instances([one.instance_id for one in moment.instances])
        views = context.operator.views()
        table.update_records([(view, moment) for view in views])

    return update


Shown = tuple[OperationView, Moment]


def operations_table() -> Table[Shown]:
    """One row per operation."""
    return Table[Shown](
        [
            Column("what", "Operation", lambda one: one[0].summary, lambda one: one[0].kind),
            Column("state", "State", _state, lambda one: one[0].state, kind="state"),
            Column("progress", "Chunks", _progress, right=True),
            Column("moved", "Bytes", lambda one: size(one[0].bytes_done) if one[0].bytes_done else NOTHING, right=True),
            Column("when", "Asked", _created, lambda one: -one[0].created_age_s, right=True),
            Column("notes", "What became of it", lambda one: outcome(one[0]), kind="long"),
            Column("act", "", _button),
        ],
        caption="Operations, newest first",
        empty="Nothing has been asked for since this controller's start",
        key=lambda one: one[0].id,
        search=lambda one: (
            f"{one[0].summary} {one[0].state} {one[0].id} {' '.join(part.instance_id for part in one[0].instances)}"
        ),
        search_label="Search operation or instance",
        rows_per_page=15,
    )


def _state(one: Shown) -> Cell:
    return cell(one[0].state, tone=TONES[one[0].state], hint=f"operation {one[0].id}")


def _progress(one: Shown) -> Cell:
    view = one[0]
    if not view.chunks_total:
        return NOTHING
    part = min(1.0, view.chunks_done / view.chunks_total)
    return cell(f"{view.chunks_done} of {view.chunks_total}", share=round(part, 3), tone=TONES[view.state])


def _created(one: Shown) -> Cell:
    # To half a second, so that it stays the same moment from one update to the next.
    return cell(moment_ms=int(one[1].milliseconds(one[1].now_s - one[0].created_age_s) // 500 * 500))


def _button(one: Shown) -> Cell:
    return cell("Cancel", action="cancel") if one[0].state in {"pending", "running"} else ""


def outcome(view: OperationView) -> str:
    """Why it ended as it did, instance by instance."""
    if view.error is not None:
        return f"{view.error.message}. {view.error.hint}"
    told = []
    for part in view.instances:
        if part.error is not None:
            told.append(f"{part.instance_id}: {part.error.message}")
        elif part.note and part.state in {"pending", "running"}:
            told.append(f"{part.instance_id}: {part.note}")
        elif part.outcomes:
            words = ", ".join(f"{name} {chunks}" for name, chunks in sorted(part.outcomes.items()))
            told.append(f"{part.instance_id}: {words}")
    return "; ".join(told[:4]) + (f"; and {len(told) - 4} more" if len(told) > 4 else "")


class Form:
    """Asks for an operation and starts it after a confirmation."""

    def __init__(self, context: Context, client: Client) -> None:
        self._context = context
        self._client = client
        self._instances: list[str] = []
        self._inputs: dict[str, ui.element] = {}

    def build(self) -> None:
        """The inputs; those that the kind does not need are not there."""
        with ui.element("div").classes("km-form"):
            self._kind = ui.select(
                {name: kind.title for name, kind in KINDS.items()}, value="warm", label="What", on_change=self._arrange
            ).props("outlined dense")
            self._about = text("", "p", "km-muted")
            self._instance = self._select("instance", "Instance")
            self._from = self._select("from", "From")
            self._to = self._select("to", "To")
            self._hottest = self._number("hottest", "Hottest chunks (with a prompt: left out)", 500, 1, 20_000)
            self._hand_over = self._number("hand_over", "Hand over at most so many chunks", 1000, 0, 20_000)
            self._minutes = self._number("seconds", "Minutes", 60, 1, 43_200)
            self._leave = ui.checkbox("Leave the cluster afterwards", value=True)
            self._inputs["leave"] = self._leave
            self._text = ui.textarea("Prompt, chat template and all").props("outlined dense autogrow maxlength=250000")
            self._inputs["text"] = self._text
            with ui.element("div").classes("km-actions"):
                ui.button("Review", on_click=self._review).props("unelevated color=primary")
        self._arrange()

    def update_instances(self, names: list[str]) -> None:
        """Offer these; sent only when they have changed."""
        if names != self._instances:
            self._instances = names
            self._offer()

    def _select(self, name: str, label: str) -> ui.select:
        made = ui.select([], label=label, with_input=True).props("outlined dense options-dense")
        self._inputs[name] = made
        return made

    def _number(self, name: str, label: str, value: int, least: int, most: int) -> ui.number:
        made = ui.number(label, value=value, min=least, max=most, precision=0).props("outlined dense")
        self._inputs[name] = made
        return made

    def _offer(self) -> None:
        kind = KINDS[self._kind.value]
        for select in (self._instance, self._from, self._to):
            offered = [EVERYWHERE, *self._instances] if select is self._instance and kind.anywhere else self._instances
            kept = select.value if select.value in offered else (EVERYWHERE if EVERYWHERE in offered else None)
            select.set_options(offered, value=kept)

    def _arrange(self) -> None:
        kind = KINDS[self._kind.value]
        for name, element in self._inputs.items():
            element.set_visibility(name in kind.fields)
        self._about._text = kind.explanation  # noqa: SLF001 - as in `frame.text`
        self._about.update()
        self._offer()

    # -- asking and doing ----------------------------------------------------------------------------------------------

    def values(self) -> dict[str, object]:
        """What the API would be sent."""
        name = str(self._kind.value)
        fields = KINDS[name].fields
        given: dict[str, object] = {"kind": name}
        prompt = (self._text.value or "") if "text" in fields else ""
        if prompt:
            given["text"] = prompt
        for field, select in (("instance", self._instance), ("from", self._from), ("to", self._to)):
            if field in fields and select.value and select.value != EVERYWHERE:
                given[field] = select.value
        if "hottest" in fields and not prompt:
            given["hottest"] = _whole(self._hottest)
        if "hand_over" in fields:
            given["hand_over"] = _whole(self._hand_over)
        if "leave" in fields:
            given["leave"] = bool(self._leave.value)
        if "seconds" in fields:
            given["seconds"] = 60 * _whole(self._minutes)
        return given

    def _review(self) -> None:
        try:
            body = _BODY.validate_python(self.values())
        except ValidationError as error:
            ui.notify(_words(error), type="negative", close_button="Close", timeout=8000)
            return
        kind = KINDS[body.kind]
        self._confirm(sentence(body), kind.danger, kind.title, lambda: self._start(body))

    def confirm_cancel(self, operation_id: str) -> None:
        """Ask before an operation is given up."""

        def cancel() -> str:
            return f"Giving up {self._context.operator.operations.cancel(operation_id).body.kind}"

        danger = "What an engine was handed already is finished; what was done stays done."
        self._confirm(f"Give up operation {operation_id}?", danger, "Give up", cancel)

    def _start(self, body: AnyBody) -> str:
        operation, is_new = self._context.operator.start(body)
        view = self._context.operator.view(operation.operation_id)
        return f"Started: {view.summary}" if is_new else f"Already running: {view.summary}"

    def _confirm(self, question: str, danger: str, button: str, do: Callable[[], str]) -> None:
        with ui.dialog() as dialog, ui.card().classes("km-dialog").props('role="alertdialog" aria-labelledby="km-ask"'):
            text("Are you sure?", "h2").props('id="km-ask"')
            text(question)
            if danger:
                text(danger, "p", "km-callout")
            token: ui.input | None = None
            if self._context.token is not None:
                token = ui.input("Token of the cluster", password=True).props("outlined dense autocomplete=off")
                text("kvmesh key token prints it. It is used for this once and kept nowhere.", "p", "km-muted")
            problem = text("", "p", "km-callout km-bad")
            problem.set_visibility(False)

            def go() -> None:
                error = self._refusal("" if token is None else str(token.value or ""))
                if error is None:
                    try:
                        said = do()
                    except ApiError as raised:
                        error = raised
                    else:
                        dialog.close()
                        ui.notify(said, type="positive")
                        return
                problem._text = f"{error.message}: {error.hint}"  # noqa: SLF001 - as in `frame.text`
                problem.set_visibility(True)
                problem.update()

            with ui.element("div").classes("km-actions"):
                ui.button("Keep as it is", on_click=dialog.close).props("flat autofocus")
                ui.button(button, on_click=go).props(f"unelevated color={'negative' if danger else 'primary'}")
        dialog.on("hide", dialog.delete)
        dialog.open()

    def _refusal(self, token: str) -> ApiError | None:
        """Why the reader of this page may not change anything; the rules of the HTTP API."""
        environ = self._client.environ or {}
        scope = dict(environ.get("asgi.scope") or {})
        if not scope.get("headers"):
            return ApiError(403, "no_connection", "this page has lost its connection", "load it again")
        if token:
            shown = (b"authorization", f"Bearer {token}".encode())
            scope["headers"] = [*(pair for pair in scope["headers"] if pair[0] != b"authorization"), shown]
        return may_write(self._context, HTTPConnection({**scope, "type": "http"}))


def sentence(body: AnyBody) -> str:
    """What will happen, in words."""
    chunks = "the chunks of this prompt" if getattr(body, "text", None) else "everything"
    match body.kind:
        case "clear":
            return f"Clear {chunks} {_where(body.instance)}."
        case "pin":
            return f"Pin {chunks} {_where(body.instance)} for {duration(body.seconds)}."
        case "unpin":
            return f"Unpin {chunks} {_where(body.instance)}."
        case "warm":
            what = chunks if body.hottest is None else f"the {body.hottest} hottest chunks"
            return f"Have {body.instance} fetch {what} from others."
        case "drain":
            end = "leave" if body.leave else "stay, sharing nothing"
            return f"Drain {body.instance}: hand over up to {body.hand_over} chunks, then {end}."
        case "resume":
            return f"Have {body.instance} publish and fetch again."
        case "move":
            return f"Move {chunks} from {body.source} to {body.to}."


def _where(instance: str | None) -> str:
    return "on every instance" if instance is None else f"on {instance}"


def _whole(number: ui.number) -> int:
    return int(number.value or 0)


def _words(error: ValidationError) -> str:
    told = []
    for one in error.errors()[:3]:
        field = ".".join(str(part) for part in one["loc"][1:])
        missing = one["type"] == "missing"
        told.append(f"choose {field}" if missing else f"{field + ': ' if field else ''}{one['msg']}")
    return listed(told)
