"""Write or check requirements/lock.txt, the exact set of packages of the demonstration, the tests and CI.

    .venv/bin/python scripts/lock.py write    # from what is installed in this environment
    .venv/bin/python scripts/lock.py check    # the lock, pyproject.toml and this environment agree

The lock holds everything that pyproject.toml (all extras) and requirements/lock.in need, directly or not, less what
must stay out (LEFT_OUT). That is why it is installed with `pip install --no-deps`, and why this script follows the
requirements itself. To change a version: install it into the environment, then `write`.
"""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import tomllib
from packaging.requirements import Requirement
from packaging.utils import NormalizedName, canonicalize_name

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements" / "lock.txt"
LOCK_IN = ROOT / "requirements" / "lock.in"

NOT_BUILT_FOR_CPU = "its build breaks on import beside a CPU build of torch; vLLM's text models run without it"
LEFT_OUT = {
    "torchvision": NOT_BUILT_FOR_CPU,
    "torchaudio": NOT_BUILT_FOR_CPU,
    "torchcodec": NOT_BUILT_FOR_CPU,
    "triton": "compiles GPU kernels",
    "nixl-cu13": "the CUDA 12 variant is enough, and both run without a GPU",
}

HEADER = """\
# Written by scripts/lock.py; do not edit. For CPython 3.11 on Linux x86_64.
# Install with --no-deps: some packages here require others that break them (see scripts/lock.py).
"""


def roots() -> Iterator[Requirement]:
    """Yield what is asked for by name: pyproject.toml with all extras, the build backend, and lock.in."""
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    lines = [*pyproject["build-system"]["requires"], *pyproject["project"]["dependencies"]]
    for extra in pyproject["project"]["optional-dependencies"].values():
        lines += extra
    lines += [line for line in LOCK_IN.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    yield from (Requirement(line) for line in lines if line.strip())


def resolve() -> tuple[dict[NormalizedName, str], list[str]]:
    """Follow all requirements through this environment.

    Returns: the version of each package that is needed, and a sentence for each requirement that is not met.
    """
    versions: dict[NormalizedName, str] = {}
    problems: list[str] = []
    seen: set[tuple[NormalizedName, str]] = set()
    queue = [("pyproject.toml or lock.in", requirement) for requirement in roots()]
    while queue:
        wanted_by, requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        if name in LEFT_OUT:
            continue
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            problems.append(f"{wanted_by} needs {requirement}, which is not installed")
            continue
        if not requirement.specifier.contains(distribution.version, prereleases=True):
            problems.append(f"{wanted_by} needs {requirement}, but {distribution.version} is installed")
        versions[name] = distribution.version
        for extra in ("", *requirement.extras):
            if (name, extra) not in seen:
                seen.add((name, extra))
                queue += [(name, needed) for needed in _needed(distribution, extra)]
    return versions, problems


def _needed(distribution: metadata.Distribution, extra: str) -> Iterator[Requirement]:
    for line in distribution.requires or []:
        requirement = Requirement(line)
        # A requirement without a marker was already taken when the package itself was (extra == "").
        if requirement.marker.evaluate({"extra": extra}) if requirement.marker else not extra:
            yield requirement


def locked() -> dict[NormalizedName, str]:
    """Read lock.txt."""
    lines = [line for line in LOCK.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}


def write() -> list[str]:
    """Write lock.txt from this environment; return what is wrong with the environment."""
    versions, problems = resolve()
    lines = "".join(f"{name}=={versions[name]}\n" for name in sorted(versions))
    LOCK.write_text(HEADER + lines, encoding="utf-8")
    print(f"{LOCK.relative_to(ROOT)}: {len(versions)} packages")
    return problems


def check() -> list[str]:
    """Return what differs between the lock, the requirements and this environment."""
    versions, problems = resolve()
    lock = locked()
    for name in sorted(versions.keys() | lock.keys()):
        if name not in lock:
            problems.append(f"{name} {versions[name]} is needed but not locked: run scripts/lock.py write")
        elif name not in versions:
            problems.append(f"{name} is locked but nothing needs it: run scripts/lock.py write")
        elif lock[name] != versions[name]:
            problems.append(f"{name} {versions[name]} is installed, {lock[name]} is locked: run scripts/setup")
    harmful = [name for name in LEFT_OUT if _installed(name)]
    problems += [f"{name} is installed and must not be: {LEFT_OUT[name]}" for name in harmful]
    return problems


def _installed(name: str) -> bool:
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def main() -> int:
    """Run the command that is named; 1 if it found something wrong."""
    commands = {"write": write, "check": check}
    if len(sys.argv) != 2 or sys.argv[1] not in commands:
        print(__doc__, file=sys.stderr)
        return 2
    problems = commands[sys.argv[1]]()
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
