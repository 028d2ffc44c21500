"""A table that becomes a list of cards on narrow screens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from nicegui import ui

Row = Mapping[str, object]


class Column:
    """One column: `name` is the row's field to sort by, `name_text`, if the row has it, is what is shown."""

    def __init__(self, name: str, label: str, *, right: bool = False, sortable: bool = True) -> None:
        self.name = name
        self.definition = {
            "name": name,
            "label": label,
            "field": name,
            "align": "right" if right else "left",
            "sortable": sortable,
            "classes": "km-number" if right else "",
            ":format": f"(value, row) => row.{name}_text ?? value",
        }


_STATE_DOT = """
<span class="inline-block rounded-full mr-2" style="width: .6em; height: .6em"
 :style="{background: `var(--km-${TONE})`}"></span>
"""

_CARD = """
<div class="col-12 q-py-sm" style="border-top: 1px solid var(--km-line)">
  <div class="row items-center no-wrap q-mb-xs">
    <span v-if="props.row.tone" class="inline-block rounded-full mr-2"
     style="width: .6em; height: .6em; flex: none" :style="{background: `var(--km-${props.row.tone})`}"></span>
    <span class="text-weight-medium" style="overflow-wrap: anywhere">{{ props.cols[0].value }}</span>
  </div>
  <div class="row" style="column-gap: 1.1em; row-gap: .15em">
    <span v-for="col in props.cols.slice(1).filter(c => c.value !== '')" :key="col.name" class="text-caption km-number"
     style="overflow-wrap: anywhere">
      <span class="km-muted">{{ col.label }}</span> {{ col.value }}
    </span>
  </div>
</div>
"""


class LiveTable:
    """A table of one page, redrawn only when its rows have changed. Rows may have a `tone` (ok, warn, bad)."""

    def __init__(self, columns: Sequence[Column], *, row_key: str, empty: str, rows_per_page: int = 25) -> None:
        first = columns[0].name
        self._table = (
            ui.table(
                columns=[column.definition for column in columns],
                rows=[],
                row_key=row_key,
                pagination={"rowsPerPage": rows_per_page},
            )
            .classes("w-full")
            .props('dense flat :grid="Quasar.Screen.lt.md" hide-pagination')
        )
        dot = _STATE_DOT.replace("${TONE}", "${props.row.tone}")
        self._table.add_slot(
            f"body-cell-{first}",
            f'<q-td :props="props"><template v-if="props.row.tone">{dot}</template>{{{{ props.value }}}}</q-td>',
        )
        self._table.add_slot("item", _CARD)
        self._table.add_slot("no-data", f'<span class="km-muted q-py-sm">{empty}</span>')
        self._paged = False
        self._rows_per_page = rows_per_page

    def update(self, rows: list[dict[str, object]]) -> None:
        """Show these rows."""
        if rows != self._table.rows:
            self._table.rows = rows
        if (len(rows) > self._rows_per_page) != self._paged:
            self._paged = not self._paged
            self._table.props(remove="hide-pagination") if self._paged else self._table.props("hide-pagination")
