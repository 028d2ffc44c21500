"""Helm as tests use it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / ".chart-tools"
CHART = ROOT / "deploy" / "helm" / "kvmesh-stack"
EXAMPLES = ROOT / "deploy" / "helm" / "examples"
SEED = EXAMPLES / "values-11-p2p-sharing.yaml"
ALL_EXAMPLES = sorted(EXAMPLES.glob("values-*.yaml"))

Manifest = dict[str, Any]


class Result(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def manifests(self) -> list[Manifest]:
        return [one for one in yaml.safe_load_all(self.out) if one]

    def find(self, kind: str, name: str) -> Manifest:
        """The one manifest of this kind and name."""
        (found,) = (one for one in self.manifests if one["kind"] == kind and one["metadata"]["name"] == name)
        return found


class Helm:
    """One Helm binary, with a home of its own."""

    def __init__(self, binary: Path, home: Path) -> None:
        self.binary = binary
        self.name = binary.name
        self._home = home
        self._rendered: dict[str, Result] = {}
        """What the same arguments gave before: rendering is what the tests mostly wait for."""

    def run(self, *arguments: object, kubeconfig: Path | None = None) -> Result:
        env = {"HOME": str(self._home), "PATH": os.environ["PATH"], "KUBECONFIG": str(kubeconfig or os.devnull)}
        command = [str(self.binary), *map(str, arguments)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
        return Result(done.returncode, done.stdout, done.stderr)

    def template(self, *values: Path, sets: Sequence[str] = (), overlay: Mapping[str, Any] | None = None) -> Result:
        """`helm template vllm`; `overlay` is one more values file. The same arguments are run only once."""
        asked = repr((values, tuple(sets), overlay))
        if asked not in self._rendered:
            self._rendered[asked] = self._template(values, sets, overlay)
        return self._rendered[asked]

    def _template(self, values: Sequence[Path], sets: Sequence[str], overlay: Mapping[str, Any] | None) -> Result:
        files = [*values]
        if overlay is not None:
            files.append(self._home / "overlay.yaml")
            files[-1].write_text(yaml.safe_dump(dict(overlay)))
        arguments = [part for file in files for part in ("-f", file)] + [
            part for one in sets for part in ("--set", one)
        ]
        return self.run("template", "vllm", CHART, *arguments)

    def render(self, *values: Path, sets: Sequence[str] = (), overlay: Mapping[str, Any] | None = None) -> Result:
        """As `template`, which must succeed."""
        result = self.template(*values, sets=sets, overlay=overlay)
        assert result.code == 0, result.err
        return result


def find_tool(name: str) -> Path:
    """A fetched program; skips the test where it is missing."""
    path = TOOLS / "bin" / name
    if not path.exists():
        pytest.skip(f"no {name}: make chart-check fetches it")
    return path
