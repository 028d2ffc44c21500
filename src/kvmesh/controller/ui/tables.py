"""Tables of records that live in the controller. Searching, sorting and paging happen here, over the records; only the
rows in view are made and sent, and of these only what has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar

from nicegui.events import GenericEventArguments

from kvmesh.controller.ui.panel import Panel, Value

R = TypeVar("R")
R_contra = TypeVar("R_contra", contravariant=True)
Cell = Value
"""A text, or `cell(...)`."""
MAX_SEARCH_CHARACTERS = 200


class Order(Protocol[R_contra]):
    """What to sort a column by."""

    def __call__(self, record: R_contra, /) -> tuple[float | str, ...] | float | str: ...


class Column(NamedTuple, Generic[R]):
    """One column: how it is named, what it shows of a record, and what it is sorted by (None: cannot be)."""

    name: str
    label: str
    show: Callable[[R], Cell]
    order: Order[R] | None = None
    right: bool = False
    kind: str = "text"
    """text, state (a dot in the cell's tone), code, or long (sentences)."""


def cell(
    text: str = "",
    *,
    share: float | None = None,
    tone: str | None = None,
    link: str | None = None,
    hint: str | None = None,
    moment_ms: int | None = None,
    action: str | None = None,
) -> Cell:
    """A cell with more than a text: a bar (0 to 1), a tone (ok, warn, bad), a link, a hint, a moment that is shown as
    its age, or a button (see `Table.on_action`).
    """
    made: dict[str, Value] = {"t": text, "s": share, "o": tone, "h": link, "x": hint, "a": moment_ms, "b": action}
    return {name: value for name, value in made.items() if value is not None}


class Table(Panel, Generic[R], component="assets/kvmesh_table.js"):
    """One live table."""

    def __init__(
        self,
        columns: Sequence[Column[R]],
        *,
        caption: str,
        empty: str,
        key: Callable[[R], str],
        search: Callable[[R], str] | None = None,
        search_label: str = "Search",
        sort: str = "",
        descending: bool = False,
        rows_per_page: int = 25,
    ) -> None:
        """
        Args:
            columns: from left to right; the first one names the record.
            caption: what the table is, for those who do not see it.
            empty: shown instead of no rows.
            key: names a record for good.
            search: a record's text that a search looks through; None: no search.
            search_label: what the search is for.
            sort: column that the table is sorted by at first; empty: the records' own order.
            descending: largest first.
            rows_per_page: rows in view at most.
        """
        described: list[Value] = [
            {
                "name": column.name,
                "label": column.label,
                "right": column.right,
                "kind": column.kind,
                "sortable": column.order is not None,
            }
            for column in columns
        ]
        super().__init__(
            {
                "columns": described,
                "caption": caption,
                "empty": empty,
                "perPage": rows_per_page,
                "search": None if search is None else search_label,
            }
        )
        self._columns = columns
        self._key = key
        self._search = search
        self._rows_per_page = rows_per_page
        self._sort, self._descending = sort, descending
        self._text, self._page = "", 0
        self._records: Sequence[R] = ()
        self._rows: dict[str, dict[str, Cell]] = {}
        """What the browser has."""
        self.on("ask", self._on_ask)

    def on_action(self, do: Callable[[str, str], None]) -> None:
        """Call `do` with a record's key and the action whenever the reader presses a cell's button."""

        def take(event: GenericEventArguments) -> None:
            pressed = event.args
            if isinstance(pressed, dict) and pressed.get("key") in self._rows:
                do(str(pressed["key"]), str(pressed.get("what")))

        self.on("act", take)

    def update_records(self, records: Sequence[R]) -> None:
        """Show these, as the reader has asked for them."""
        self._records = records
        found = self._found()
        pages = max(1, -(-len(found) // self._rows_per_page))
        self._page = min(self._page, pages - 1)
        start = self._page * self._rows_per_page
        rows = {
            self._key(record): {column.name: column.show(record) for column in self._columns}
            for record in found[start : start + self._rows_per_page]
        }
        changed: dict[str, Value] = {}
        for key, row in rows.items():
            known = self._rows.get(key, {})
            different = {name: value for name, value in row.items() if name not in known or known[name] != value}
            if different:
                changed[key] = different
        self._rows = rows
        values: dict[str, Value] = {
            "order": list(rows),
            "total": len(found),
            "page": self._page,
            "pages": pages,
            "sort": self._sort,
            "descending": self._descending,
        }
        self._show_rows(values, changed)

    def _show_rows(self, values: dict[str, Value], changed: dict[str, Value]) -> None:
        different = {name: value for name, value in values.items() if self._shown.get(name) != value}
        self._shown |= different
        if not self.client.has_socket_connection:
            self._props["initial"] = {**self._shown, "rows": {key: dict(row) for key, row in self._rows.items()}}
        elif different or changed:
            self.run_method("patch", {**different, **({"changed": changed} if changed else {})})

    def _found(self) -> Sequence[R]:
        found = self._records
        if self._text and self._search is not None:
            words = self._text.lower().split()
            search = self._search
            found = [record for record in found if all(word in search(record).lower() for word in words)]
        order = next((column.order for column in self._columns if column.name == self._sort), None)
        return found if order is None else sorted(found, key=order, reverse=self._descending)

    def _on_ask(self, event: GenericEventArguments) -> None:
        """The reader sorts, searches or turns the page. What comes from a browser is checked like all input."""
        asked = event.args
        if not isinstance(asked, dict):
            return
        if asked.get("sort") in {column.name for column in self._columns if column.order is not None}:
            self._sort = asked["sort"]
        self._descending = bool(asked.get("descending"))
        self._page = asked["page"] if isinstance(asked.get("page"), int) and asked["page"] >= 0 else 0
        self._text = str(asked.get("text") or "")[:MAX_SEARCH_CHARACTERS]
        self._shown.pop("order", None)  # so that it is answered also when nothing changes
        self.update_records(self._records)
