"""The images' files: linted, and saying what the chart and the configuration expect of them."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path
from typing import Any

import pytest
import tomllib
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from kvmesh.config import load_config
from kvmesh.router.config import make_router_config
from support.helm import CHART, ROOT, find_tool

DOCKER = ROOT / "deploy" / "docker"
DOCKERFILES = sorted(DOCKER.glob("Dockerfile*"))
KEY = "0123456789abcdef0123456789abcdef"


def instructions(path: Path) -> list[tuple[str, str]]:
    """(instruction, arguments) of a Dockerfile, continued lines joined."""
    text = re.sub(r"\\\n", " ", "\n".join(line for line in path.read_text().splitlines() if not line.startswith("#")))
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in text.splitlines() if line)]


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    """compose.yaml with its anchors resolved and every variable as its default."""
    text = (DOCKER / "compose.yaml").read_text().replace("${KVMESH_CLUSTER_KEY:?", f"{KEY}${{_:-")
    text = re.sub(r"\$\{[A-Za-z_]+:-([^}]*)\}", r"\1", text).replace(
        "make one with kvmesh key new, and put it into .env", ""
    )
    loaded: dict[str, Any] = yaml.safe_load(text)
    return loaded


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint(path: Path) -> None:
    done = subprocess.run([find_tool("hadolint"), path], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_the_last_stage_is_not_root(path: Path) -> None:
    """By number, so that Kubernetes can see it; and the number is the chart's."""
    users = [rest for word, rest in instructions(path) if word == "USER"]
    assert users[-1] == "10001:10001"
    assert "runAsUser: 10001" in (CHART / "templates" / "_names.tpl").read_text()


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_bases_are_named_by_version_and_can_be_given_by_digest(path: Path) -> None:
    found = instructions(path)
    defaults = dict(rest.split("=", 1) for word, rest in found if word == "ARG")
    stages = [rest for word, rest in found if word == "FROM"]
    assert len(stages) == 2
    for stage in stages:
        base = stage.split()[0]
        assert base.startswith("${")
        tag = defaults[base.strip("${}")].rpartition(":")[2]
        assert tag not in {"", "latest"}


def test_what_is_copied_exists() -> None:
    copied = [rest.split()[:-1] for word, rest in instructions(DOCKER / "Dockerfile") if word == "COPY"]
    for name in [name for names in copied for name in names if not name.startswith(("--", "/"))]:
        assert (ROOT / name).exists()
    shown = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert {name for names in copied for name in names if not name.startswith(("--", "/"))} <= shown


class TestCompose:
    def test_it_is_as_compose_wants_it(self) -> None:
        """By compose itself, where it is there."""
        if (
            shutil.which("docker") is None
            or subprocess.run(["docker", "compose", "version"], capture_output=True, check=False, timeout=30).returncode
        ):
            pytest.skip("no docker compose here")
        command = ["docker", "compose", "-f", str(DOCKER / "compose.yaml"), "config", "--quiet"]
        subprocess.run(command, env={"KVMESH_CLUSTER_KEY": KEY}, check=True, timeout=60)

    @pytest.mark.parametrize("name", ["engine-1", "engine-2"])
    def test_engines_share_by_the_controller(self, compose: dict[str, Any], name: str) -> None:
        environment = {key: str(value) for key, value in compose["services"][name]["environment"].items()}
        config = load_config(environ=environment)
        assert config.directory == "controller"
        assert (config.instance_id, config.advertise_host) == (name, name)
        assert not config.warnings
        assert int(compose["services"][name]["shm_size"].removesuffix("gb")) > config.pool_size_gb

    def test_the_router_knows_both(self, compose: dict[str, Any]) -> None:
        arguments = compose["services"]["router"]["command"]
        (backends,) = (one.removeprefix("--backends=") for one in arguments if one.startswith("--backends="))
        router = make_router_config(flags={"backends": backends})
        assert {one.name for one in router.static_backends()} == {"engine-1", "engine-2"}

    def test_nothing_is_open_beyond_this_machine(self, compose: dict[str, Any]) -> None:
        for service in compose["services"].values():
            assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
            assert service["cap_drop"] == ["ALL"]


@pytest.mark.timeout(180)
def distribution_of(package: str) -> str:
    """The distribution that an importable package came with; vLLM for CPU has another one's name."""
    return packages_distributions()[package][0]


def brought_by(name: str) -> set[str]:
    """Distributions that come with one, by what each says that it requires."""
    found: set[tuple[str, frozenset[str]]] = set()
    waiting = [(name, frozenset[str]())]
    while waiting:
        one, extras = waiting.pop()
        with contextlib.suppress(PackageNotFoundError):
            for each in map(Requirement, requires(one) or []):
                wanted = (canonicalize_name(each.name), frozenset(each.extras))
                applies = each.marker is None or any(each.marker.evaluate({"extra": extra}) for extra in ("", *extras))
                if applies and wanted not in found:
                    found.add(wanted)
                    waiting.append(wanted)
    return {one for one, _ in found}


def test_what_goes_beside_an_engine(tmp_path: Path) -> None:
    """site.sh makes a folder from which vLLM's Python finds kvmesh, its plug-in, and what is compiled for it."""
    python = ROOT / ".venv" / "bin" / "python"
    done = subprocess.run(
        [DOCKER / "site.sh", tmp_path],
        cwd=ROOT, env={"PYTHON": str(python), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True, text=True, timeout=170, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} >= {"any", "cp310", "cp311", "cp312", "cp313"}
    ours = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    lacking = {canonicalize_name(Requirement(one).name) for one in ours} - brought_by(distribution_of("vllm"))
    for version in ("cp310", "cp311", "cp312", "cp313"):
        beside = {path.name.lower() for folder in ("any", version) for path in (tmp_path / folder).iterdir()}
        assert lacking - beside == set(), f"{version}: kvmesh needs these, and vLLM does not bring them"
    program = (
        "import kvmesh, xxhash, redis, hiredis, zstandard; from importlib.metadata import entry_points;"
        "print(kvmesh.__file__, xxhash.__file__, redis.__file__, hiredis.__file__, zstandard.__file__,"
        "[one.value for one in entry_points(group='vllm.general_plugins')])"
    )
    shown = subprocess.run(
        [python, "-c", program], env={"PYTHONPATH": f"{tmp_path}/any:{tmp_path}/cp311"},
        capture_output=True, text=True, check=True, timeout=60,
    ).stdout  # fmt: skip
    assert shown.count(str(tmp_path)) == 5
    assert "kvmesh.vllm.plugin:register" in shown
