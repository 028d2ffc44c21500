"""Numbers as people read them."""

from __future__ import annotations

from collections.abc import Sequence

NOTHING = "\N{EN DASH}"
"""Stands where there is no number."""


def count(number: float) -> str:
    """1234567 -> 1.23 M."""
    return _scaled(number, 1000.0, ("", " k", " M", " G", " T"))


def size(number_bytes: float) -> str:
    """Bytes in powers of ten, as the log lines have them: 1.5 MB."""
    return _scaled(number_bytes, 1000.0, (" B", " kB", " MB", " GB", " TB", " PB"))


def rate(bytes_per_second: float) -> str:
    """Bytes per second; a dash for none, so that a table of idle routes is calm."""
    return f"{size(bytes_per_second)}/s" if bytes_per_second >= 1 else NOTHING


def duration(seconds: float) -> str:
    """Short: 12 ms, 3.4 s, 5 min, 7 h, 3 d."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 10 and seconds != round(seconds):
        return f"{seconds:.1f} s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    if seconds < 36 * 3600:
        return f"{seconds / 3600:.0f} h"
    return f"{seconds / 86400:.0f} d"


def age(seconds: float) -> str:
    """How long ago, in whole seconds at least, so that it does not flicker."""
    return "now" if seconds < 1 else f"{duration(max(1.0, round(seconds)))} ago"


def share(part: float | None) -> str:
    """0.123 -> 12 %."""
    return "" if part is None else f"{part * 100:.0f} %"


def some(number: int, thing: str, things: str = "") -> str:
    """1 instance, 2 instances."""
    return f"{count(number)} {thing if number == 1 else things or thing + 's'}"


def listed(names: Sequence[str], shown: int = 3) -> str:
    """a, b, c and 4 more."""
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def _scaled(number: float, step: float, units: tuple[str, ...]) -> str:
    for unit in units[:-1]:
        if number < step * 0.9995:
            return _digits(number) + unit
        number /= step
    return _digits(number) + units[-1]


def _digits(number: float) -> str:
    """Three significant digits, whole numbers as they are."""
    if number == int(number) and number < 1000:
        return str(int(number))
    if number < 10:
        return f"{number:.2f}"
    return f"{number:.1f}" if number < 100 else f"{number:.0f}"
