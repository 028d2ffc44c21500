"""What others can make us write: no forged lines, no flood."""

from __future__ import annotations

import logging

import pytest

from kvmesh.logs import MAX_LINES, WINDOW_S, LogLimiter, _FloodFilter, _OneLineFormatter


def record(text: str, *values: object) -> logging.LogRecord:
    return logging.LogRecord("kvmesh.test", logging.INFO, "f.py", 1, text, values, None)


@pytest.mark.parametrize("name", ["a\nERROR forged", "a\r\x1b[2J", "\0", "\x7f"])
def test_a_peers_name_cannot_forge_a_line(name: str) -> None:
    line = _OneLineFormatter("%(message)s").format(record("peer=%s", name))
    assert line.isprintable()
    assert line.startswith("peer=")


def test_a_flood_of_one_kind_is_cut_and_counted() -> None:
    """Other kinds are not touched, and the next line of that kind says how many were kept back."""
    now_s = 0.0
    flood = _FloodFilter(lambda: now_s)
    assert sum(flood.filter(record("joined %s", index)) for index in range(MAX_LINES + 50)) == MAX_LINES
    assert flood.filter(record("other"))
    now_s = WINDOW_S + 1
    late = record("joined %s", 7)
    assert flood.filter(late)
    assert "joined 7 (kept back: 50 lines" in late.getMessage()
    for index in range(30_000):
        flood.filter(record(f"made up {index}"))
    assert len(flood._seen) <= 10_001


def test_the_limiter_lets_one_line_through_and_forgets() -> None:
    limiter = LogLimiter(interval_s=10.0, max_keys=2)
    assert [limiter.allow("a", now_s) for now_s in (0, 1, 2, 11)] == [0, None, None, 2]
    for number in range(10):
        limiter.allow(str(number), 12)
    assert limiter.allow("a", 13) == 0
