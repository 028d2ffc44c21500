"""`kvmesh doctor`: what would make sharing fail, on this machine and in a running cluster."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvmesh.cli.shared import (
    DEFAULT_CONTROLLER,
    EXIT_NO,
    CaOption,
    ControllerOption,
    JsonFlag,
    make_console,
    open_api,
    print_json,
    tell,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console

    from kvmesh.doctor import Finding, Situation

MAX_ALIKE = 8
"""Findings of one check and level that are printed; a cluster may have a thousand members with full pools."""
MARKS = {"ok": ("ok", "green"), "warning": ("warning", "yellow"), "problem": ("PROBLEM", "bold red")}


def doctor(
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Configuration of the instance on this machine.  [default: as an engine finds it, KVMESH_CONFIG_FILE]",
        ),
    ] = None,
    controller: ControllerOption = DEFAULT_CONTROLLER,
    ca: CaOption = None,
    cluster_key_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The cluster's key, where no --config names it; or KVMESH_CLUSTER_KEY."),
    ] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Do not ask a controller: this machine only.")] = False,
    only: Annotated[
        list[str] | None, typer.Option(metavar="SUBJECT", help="Only these checks, such as peer. May be repeated.")
    ] = None,
    timeout: Annotated[
        float, typer.Option(min=0.1, max=60, metavar="SECONDS", help="Longest wait for one answer of the network.")
    ] = 3.0,
    show_all: Annotated[bool, typer.Option("--all", help="Show everything, also what was skipped.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Check this machine and the running cluster for what keeps KV from being shared, and say what to do.

    For example:

    ```text
    kvmesh doctor --config instance1.yaml            # where it runs, or will
    kvmesh doctor --controller 10.0.0.5:9000         # the cluster, from here
    kvmesh doctor --offline --config instance1.yaml  # before there is a cluster
    kvmesh doctor --json | jq '.findings[] | select(.level == "problem").check'
    ```

    Run it where instances run: addresses and ports are tried from here. It changes nothing. The exit status is 1 when
    there is a problem, also that no controller answers; warnings do not count.
    """
    from kvmesh.doctor import examine
    from kvmesh.doctor.run import CHECKS

    subjects = [name for name, _ in CHECKS]
    if unknown := [name for name in only or () if name not in subjects]:
        raise typer.BadParameter(f"{unknown[0]!r} is not one of {', '.join(subjects)}", param_hint="--only")
    if config is not None and cluster_key_file is not None:
        raise typer.BadParameter("--config says which key this instance uses: leave --cluster-key-file out")
    situation = find_situation(config, controller, ca, cluster_key_file, offline=offline, timeout_s=timeout)
    raise typer.Exit(report(examine(situation, only or ()), as_json=as_json, show_all=show_all))


def find_situation(
    config_path: Path | None,
    controller: str,
    ca: Path | None,
    key_file: Path | None,
    *,
    offline: bool,
    timeout_s: float,
) -> Situation:
    """Gather what the checks look at. Raises ConfigError for a bad option; a bad configuration is a finding."""
    from kvmesh.cli.key import find_key
    from kvmesh.doctor import Situation, look
    from kvmesh.doctor.situation import read_configuration
    from kvmesh.errors import DirectoryError
    from kvmesh.wire.auth import ClusterKey

    environ = dict(os.environ)
    file, config, problems = read_configuration(config_path, environ)
    if config is None:
        key = find_key(key_file)
    else:  # this instance is judged by what it would use
        key = None if config.cluster_key is None else ClusterKey(config.cluster_key.get_secret_value())
    cluster = error = None
    if not offline:
        with open_api(controller, ca) as api:  # which asks all nodes in turn, so it gets more time than one of them
            try:
                cluster = look(api)
            except DirectoryError as failure:
                error = failure
    return Situation(
        environ=environ,
        config=config,
        config_file=file,
        config_problems=problems,
        cluster=cluster,
        cluster_error=error,
        cluster_key=key,
        timeout_s=timeout_s,
    )


def report(findings: Iterator[Finding], *, as_json: bool, show_all: bool) -> int:
    """Print findings; returns the exit status. As text, each is printed as soon as it is there."""
    from collections import Counter

    from kvmesh.units import some

    found: list[Finding] = []
    alike: Counter[tuple[str, str]] = Counter()
    console = make_console()
    for finding in findings:
        found.append(finding)
        alike[finding.check, finding.level.value] += 1
        if not as_json and (show_all or alike[finding.check, finding.level.value] <= MAX_ALIKE):
            _print(console, finding, show_all=show_all)
    counts = Counter(finding.level.value for finding in found)
    if as_json:
        numbers = {level: counts[level] for level in ("ok", "warning", "problem", "skipped")}
        print_json({"healthy": not counts["problem"], "counts": numbers, "findings": found})
    else:
        for (check, level), number in alike.items():
            if number > MAX_ALIKE and not show_all:
                tell(console, f"{number - MAX_ALIKE} more {level} of {check} (--all shows them)", indent=8)
        told = f"{some(counts['problem'], 'problem')}, {some(counts['warning'], 'warning')}, {counts['ok']} ok"
        told += f", {counts['skipped']} skipped" if counts["skipped"] else ""
        hint = "" if show_all or not counts["skipped"] else " (--all shows those too)"
        console.print(told + hint, style="bold red" if counts["problem"] else "bold")
    return EXIT_NO if counts["problem"] else 0


def _print(console: Console, finding: Finding, *, show_all: bool) -> None:
    from rich.text import Text

    if finding.level.value == "skipped" and not show_all:
        return
    mark, style = MARKS.get(finding.level.value, (finding.level.value, "dim"))
    line = Text.assemble((f"{finding.check:<22} ", "dim"), (f"{finding.about}: ", "bold"), finding.message)
    tell(console, line, label=Text(mark, style=style), indent=8)
    if finding.advice:
        tell(console, finding.advice, label="        ->", indent=11)
