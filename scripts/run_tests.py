"""Run the stages of the test suite, each in its own process, and say what each took.

    .venv/bin/python scripts/run_tests.py                # unit, fuzz, contract, process, browser, chart, e2e
    .venv/bin/python scripts/run_tests.py unit -x -k tcp # one stage; what starts with a dash goes to pytest

Every stage runs, whatever the ones before gave. After a table of the stages come the slowest files; the last line
counts all stages together.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / ".test-results"
STAGES = ("unit", "fuzz", "contract", "process", "browser", "chart", "e2e")
SPREAD = {
    "unit": "worksteal",
    "fuzz": "worksteal",
    "contract": "loadgroup",
    "chart": "loadfile",
}
"""How tests are spread over one process per core; the other stages have one process. `tests/conftest.py` says
what a group is. TEST_SPREAD="process" spreads the process tests, too: for a machine that does nothing else.
"""
ALONE = {"process"}
"""Stages with tests that nothing may run beside (marked so): where the others are spread, those run afterwards."""
NO_TESTS = 5  # pytest's exit status
SLOWEST = 12


class Outcome(NamedTuple):
    """What one stage gave."""

    stage: str
    seconds: float
    passed: int
    failed: int
    skipped: int


def run_stage(stage: str, options: list[str]) -> Outcome:
    """Run one stage in a process of its own: no module, metric or thread of it reaches the next."""
    spread = ["-n", "auto", "--dist", SPREAD[stage]] if stage in SPREAD else []
    if stage not in ALONE or stage not in SPREAD:
        return _run(stage, stage, [*spread, *options])
    together = _run(stage, stage, [*spread, "-m", "not alone", *options])
    alone = _run(stage, f"{stage}-alone", ["-m", "alone", *options])
    return Outcome(
        stage,
        together.seconds + alone.seconds,
        together.passed + alone.passed,
        together.failed + alone.failed,
        together.skipped + alone.skipped,
    )


def _run(stage: str, name: str, options: Sequence[str]) -> Outcome:
    print(f"\n== {name} tests", flush=True)
    report = RESULTS / f"{name}.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", f"tests/{stage}", f"--junitxml={report}", *options]
    start = time.monotonic()
    status = subprocess.run(command, cwd=ROOT, check=False, env={**os.environ, "PYTHONUNBUFFERED": "1"}).returncode
    seconds = time.monotonic() - start
    passed, failed, skipped = _count(report)
    if status not in {0, NO_TESTS}:
        failed = max(failed, 1)  # also when pytest itself broke down
    return Outcome(stage, seconds, passed, failed, skipped)


def _count(report: Path) -> tuple[int, int, int]:
    if not report.is_file():
        return 0, 0, 0
    suites = list(ET.parse(report).getroot().iter("testsuite"))  # noqa: S314 - pytest has just written it
    total, failures, errors, skipped = (
        sum(int(suite.get(key, "0")) for suite in suites) for key in ("tests", "failures", "errors", "skipped")
    )
    failed = failures + errors
    return max(total - failed - skipped, 0), failed, skipped


def _slowest(stages: Collection[str]) -> list[tuple[str, int]]:
    """The files whose tests took longest in all, with their milliseconds."""
    took_ms: Counter[str] = Counter()
    for report in RESULTS.glob("*.xml"):
        if report.stem.removesuffix("-alone") in stages:
            for case in ET.parse(report).getroot().iter("testcase"):  # noqa: S314 - as above
                module = case.get("classname", "").partition(".Test")[0]
                took_ms[f"{module.replace('.', '/')}.py"] += round(1000 * float(case.get("time", "0")))
    return took_ms.most_common(SLOWEST)


def main() -> int:
    """Run the stages that are named, or all; 1 if anything failed or nothing passed."""
    options = sys.argv[1:]
    stages: list[str] = []
    while options and options[0] in STAGES:
        stages.append(options.pop(0))
    if options and not options[0].startswith("-"):
        print(f"no stage named {options[0]!r}: expected one of {', '.join(STAGES)}", file=sys.stderr)
        return 2
    RESULTS.mkdir(exist_ok=True)
    SPREAD.update(dict.fromkeys(os.environ.get("TEST_SPREAD", "").split(), "loadgroup"))
    outcomes = [run_stage(stage, options) for stage in stages or STAGES]
    print(f"\n{'stage':<10}{'seconds':>10}{'passed':>10}{'failed':>10}{'skipped':>10}")
    for each in outcomes:
        print(f"{each.stage:<10}{each.seconds:>10.1f}{each.passed:>10}{each.failed:>10}{each.skipped:>10}")
    print("\nslowest files, in seconds of their tests")
    for name, took_ms in _slowest(stages or STAGES):
        print(f"{took_ms / 1000:>10.1f}  {name}")
    passed, failed, skipped = (sum(getattr(each, key) for each in outcomes) for key in ("passed", "failed", "skipped"))
    print(f"total: {passed} passed, {failed} failed, {skipped} skipped", flush=True)
    return 0 if passed and not failed else 1


if __name__ == "__main__":
    raise SystemExit(main())
