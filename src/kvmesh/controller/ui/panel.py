"""What all live parts of the page are: an element that shows a few named values and is sent only those that changed.

The look of each is a Vue component of ours under `assets/`. The browser keeps what it was shown, so the controller
sends differences, and nothing is rebuilt that did not change. An open page is a handful of these, a few kB each.
"""

from __future__ import annotations

from collections.abc import Mapping

from nicegui import ui

Value = str | int | float | bool | None | list["Value"] | dict[str, "Value"]
"""What can be shown: JSON."""


class Panel(ui.element):
    """Base of the live parts."""

    def __init__(self, fixed: Mapping[str, Value] | None = None) -> None:
        """`fixed` are the component's values that never change."""
        super().__init__()
        self._shown: dict[str, Value] = {}
        if fixed is not None:
            self._props["fixed"] = dict(fixed)

    def show(self, **values: Value) -> None:
        """Show these values; what is not named stays."""
        changed = {
            name: value for name, value in values.items() if name not in self._shown or self._shown[name] != value
        }
        if not changed:
            return
        self._shown |= changed
        self._deliver(changed)

    def _deliver(self, changed: Mapping[str, Value]) -> None:
        if self.client.has_socket_connection:
            self.run_method("patch", changed)
        else:
            self._props["initial"] = self._shown  # goes out with the page itself
