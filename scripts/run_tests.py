"""Run the stages of the test suite, each in its own process, and say what each took.

    .venv/bin/python scripts/run_tests.py                # unit, fuzz, contract, process, browser, chart, e2e
    .venv/bin/python scripts/run_tests.py unit -x -k tcp # one stage; what starts with a dash goes to pytest

Every stage runs, whatever the ones before gave. The last line counts all stages together.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / ".test-results"
STAGES = ("unit", "fuzz", "contract", "process", "browser", "chart", "e2e")
PARALLEL = {"unit", "fuzz"}
"""Stages whose tests share nothing, not even the machine's time: one process per core."""
NO_TESTS = 5  # pytest's exit status


@dataclass(frozen=True)
class Outcome:
    """What one stage gave."""

    stage: str
    seconds: float
    passed: int
    failed: int
    skipped: int


def run_stage(stage: str, options: list[str]) -> Outcome:
    """Run one stage in a process of its own: no module, metric or thread of it reaches the next."""
    print(f"\n== {stage} tests", flush=True)
    report = RESULTS / f"{stage}.xml"
    report.unlink(missing_ok=True)
    spread = ["-n", "auto", "--dist", "worksteal"] if stage in PARALLEL else []
    command = [sys.executable, "-m", "pytest", f"tests/{stage}", f"--junitxml={report}", *spread, *options]
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
    outcomes = [run_stage(stage, options) for stage in stages or STAGES]
    print(f"\n{'stage':<10}{'seconds':>10}{'passed':>10}{'failed':>10}{'skipped':>10}")
    for each in outcomes:
        print(f"{each.stage:<10}{each.seconds:>10.1f}{each.passed:>10}{each.failed:>10}{each.skipped:>10}")
    passed, failed, skipped = (sum(getattr(each, key) for each in outcomes) for key in ("passed", "failed", "skipped"))
    print(f"total: {passed} passed, {failed} failed, {skipped} skipped", flush=True)
    return 0 if passed and not failed else 1


if __name__ == "__main__":
    raise SystemExit(main())
