"""Options that take several values, separated by commas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import typer

_N = TypeVar("_N", int, float)


def numbers(option: str, text: str, kind: type[_N], *, least: float) -> list[_N]:
    """The numbers in `text`, each at least `least`. Raises BadParameter naming the option."""
    try:
        found = [kind(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < least:
        told = f"{text!r} is not a list of numbers ({kind.__name__}) from {least:g} on, with commas between them"
        raise typer.BadParameter(told, param_hint=option)
    return found


def names(option: str, text: str, allowed: Sequence[str]) -> list[str]:
    """The names in `text`, all of them `allowed`. Raises BadParameter naming the option."""
    found = [part.strip() for part in text.split(",")]
    if unknown := [name for name in found if name not in allowed]:
        raise typer.BadParameter(f"{unknown[0]!r} is not one of {', '.join(allowed)}", param_hint=option)
    return found
