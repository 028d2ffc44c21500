"""The fault matrix: a few of its cells with real processes, and that it would notice what it is there to notice."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmesh.bench.chaos import run_chaos
from kvmesh.bench.chaos.cells import CELLS, Cell
from kvmesh.bench.chaos.matrix import QUICK, Result, Stages, choose, run_cell, run_matrix
from kvmesh.bench.chaos.stage import CHUNKS, DOCUMENTS, Stage
from kvmesh.errors import StartupError
from kvmesh.transfer import nixl_agent

pytestmark = [pytest.mark.process, pytest.mark.timeout(180)]

needs_nixl = [
    pytest.mark.nixl,
    pytest.mark.skipif(nixl_agent.unavailable() is not None, reason=str(nixl_agent.unavailable())),
]
TCP_CELLS = (
    "peer-node-killed",
    "peer-stopped",
    "own-node-killed",
    "slots-reused",
    "controller-killed",
    "random-frames",
)
SHM_CELLS = ("peer-node-killed", "slots-reused")
NIXL_CELLS = ("peer-node-killed", "nixl-process-killed", "slots-reused")


@pytest.mark.parametrize(
    ("transport", "cells"),
    [("tcp", TCP_CELLS), ("shm", SHM_CELLS), pytest.param("nixl", NIXL_CELLS, marks=needs_nixl)],
)
def test_cells_pass(transport: str, cells: tuple[str, ...], tmp_path: Path) -> None:
    """One after the other on one cluster: every request is answered, in time, with the right bytes; all heals."""
    chosen = choose([f"{transport}/{cell}" for cell in cells], quick=True)
    assert len(chosen) == len(cells)
    for result in run_matrix(chosen, tmp_path, pace=QUICK, seed=7):
        assert not result.failures, result
        assert not result.not_run, result
        assert result.answered == result.sent > QUICK.before + QUICK.after
        assert result.wrong == 0
        assert result.share_before == result.share_after == 1.0


def test_wrong_bytes_are_noticed(tmp_path: Path) -> None:
    """An instance of our format and without a key to stop it publishes other bytes under our keys: the cell fails."""

    @contextlib.contextmanager
    def lie(stage: Stage) -> Iterator[None]:
        liar = stage.join("liar", lies=True)
        liar.tell("put", first=0, count=DOCUMENTS, chunks=CHUNKS)
        stage.holder.tell("forget", first=0, count=DOCUMENTS, chunks=CHUNKS)
        yield
        liar.close()
        stage.publish()

    with contextlib.closing(Stages(tmp_path, seed=7)) as stages:
        result = Result("tcp", "lie", "")
        run_cell(Cell("lie", lie), stages.get("local", "tcp"), QUICK, result)
    assert result.wrong > 0
    assert any("wrong chunks" in failure for failure in result.failures)


def test_an_unknown_cell_is_named_with_those_that_exist() -> None:
    with pytest.raises(StartupError, match="link-cut"):
        run_chaos(quick=True, as_json=True, only=["moon-falls-down"], seed=1)


def test_json_has_everything_that_the_table_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The exit status is that of the worst cell; cells that were not run are told with the reason, and no failure."""
    results = [
        Result("tcp", "good", "", sent=3, answered=3, share_during=0.5, recovery_s=0.1),
        Result("tcp", "elsewhere", "", not_run="no root"),
    ]
    monkeypatch.setattr("kvmesh.bench.chaos.run_matrix", lambda *_, **__: iter(results))
    assert run_chaos(quick=True, as_json=True, only=(), seed=5, logs=tmp_path) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["seed"], printed["requests"], printed["failed_cells"]) == (5, 3, [])
    assert [cell["not_run"] for cell in printed["cells"]] == ["", "no root"]
    results.append(Result("tcp", "bad", "", sent=3, answered=2, failures=["1 requests without an answer"]))
    assert run_chaos(quick=True, as_json=False, only=(), seed=5, logs=tmp_path) == 1
    assert "1 requests without an answer" in capsys.readouterr().out


def test_every_cell_has_a_name_of_its_own_and_says_what_it_does() -> None:
    assert len({cell.name for cell in CELLS}) == len(CELLS)
    assert all(cell.meaning.endswith(".") for cell in CELLS)
