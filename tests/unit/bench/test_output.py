"""Results that are written into a file."""

from __future__ import annotations

import pytest
from rich.table import Table

from kvmesh.bench.output import result_console


def test_a_table_in_a_file_is_as_wide_as_it_has_to_be(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    table = Table("who", "what")
    table.add_row("narrow", "wide" * 30)
    result_console().print(table)
    assert "wide" * 30 in capsys.readouterr().out
