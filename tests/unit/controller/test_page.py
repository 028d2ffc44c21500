"""The words of the page, without a browser."""

from __future__ import annotations

import logging

import pytest

from kvmesh.controller import views
from kvmesh.controller.log import LogLimiter, fields
from kvmesh.controller.process import LineFormatter
from kvmesh.controller.ui import units
from kvmesh.controller.ui.fetches import fetch_row
from kvmesh.controller.ui.instances import instance_row
from kvmesh.controller.ui.warnings import incompatibility_lines
from unit.controller.makers import make_format, make_member
from unit.controller.simulation import Cluster


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (units.count(0), "0"),
        (units.count(999), "999"),
        (units.count(999_999), "1.00 M"),
        (units.count(1_234_567), "1.23 M"),
        (units.size(1_500_000), "1.50 MB"),
        (units.size(3.1e18), "3100 PB"),
        (units.duration(0.0123), "12 ms"),
        (units.duration(3.44), "3.4 s"),
        (units.duration(300), "5 min"),
        (units.age(0.4), "now"),
        (units.age(3.4), "3 s ago"),
        (units.share(None), ""),
        (units.share(0.126), "13 %"),
    ],
)
def test_units(text, expected):
    assert text == expected


def test_incompatibilities_are_told_in_one_sentence_for_each_cause():
    """Three instances against one with two differing fields: one line, whichever side of a pair each stands on."""
    cluster = Cluster()
    for name, chunk_tokens, seed in (("a", 256, ""), ("c", 256, ""), ("b", 128, "123"), ("d", 256, "")):
        cluster.add(make_member(name, format=make_format(chunk_tokens=chunk_tokens, hash_seed=seed)))
    cluster.pass_time(1)
    pairs = views.incompatibility_views(list(_pairs(cluster)))
    assert len(pairs) == 3
    (line,) = incompatibility_lines(pairs)
    assert line.startswith("a, c, d cannot share KV with b")
    assert "chunk_tokens is 256 here and 128 there; hash_seed is empty here and 123 there" in line


def _pairs(cluster: Cluster):
    from kvmesh.controller.formats import incompatibilities  # noqa: PLC0415

    return incompatibilities(cluster.registry.groups)


def test_instance_states():
    """Up, suspect, joining; incompatible only when it has nobody to share with."""
    cluster = Cluster()
    cluster.add(make_member("a"))
    cluster.add(make_member("x", format=make_format(kv_dtype="bfloat16")))
    cluster.pass_time(1)

    def row(name: str, *, alone: bool, later_s: float = 0.0) -> dict[str, object]:
        registry = cluster.registry
        return instance_row(
            views.instance_view(registry, registry.instances[name], cluster.now_s + later_s), alone=alone
        )

    assert row("a", alone=False)["state"] == "up"
    assert row("a", alone=True)["state"] == "incompatible"
    assert row("a", alone=True, later_s=5)["state"] == "suspect"
    cluster.registry.instances["a"].group.replica.mark_stale("a")
    assert row("a", alone=False)["state"] == "joining"


def test_fetch_row_of_a_total_miss():
    """Nothing fetched in no time is shown, not divided by."""
    view = views.FetchView(
        number=1,
        age_s=0.0,
        instance_id="a",
        request_id="r",
        holders=[],
        transport="tcp",
        chunks_asked=3,
        chunks_fetched=0,
        fetched_bytes=0,
        seconds=0.0,
        bytes_per_second=None,
        misses={"not_published": 3},
    )
    row = fetch_row(view)
    assert row["route"] == "a ← nobody"
    assert row["tone"] == "bad"
    assert row["misses"] == "not_published 3"


def test_log_lines_stay_one_line_whatever_is_in_them():
    """An instance id with line feeds and quotes cannot forge a second line."""
    line = fields(event="x", instance='a\nlevel=error event="forged"', number=1.23456, none=None, long="y" * 1000)
    assert "\n" not in line
    assert line.startswith('event=x instance="a\\nlevel=error event=\\"forged\\"" number=1.235 none=None long=yyy')
    assert len(line) < 700


def test_prose_of_libraries_becomes_a_field():
    record = logging.LogRecord("uvicorn.error", logging.WARNING, "", 0, "Invalid HTTP request\nreceived.", (), None)
    line = LineFormatter().format(record)
    assert 'level=warning logger=uvicorn.error event=log text="Invalid HTTP request\\nreceived."' in line


def test_log_limiter():
    """One line per key and interval, with a count of those kept back; bounded memory."""
    limiter = LogLimiter(interval_s=10.0, max_keys=2)
    assert limiter.allow("a", 0.0) == 0
    assert [limiter.allow("a", 1.0 + index) for index in range(5)] == [None] * 5
    assert limiter.allow("b", 2.0) == 0
    assert limiter.allow("a", 10.0) == 5
    assert limiter.allow("c", 11.0) == 0
    assert len(limiter._last) == 2
