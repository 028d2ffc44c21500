"""The cluster key's ways into a configuration, and that it never gets out of it by accident."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvmesh.config import KVMeshConfig, load_config, make_controller_config
from kvmesh.config.cluster_key import MAX_FILE_BYTES
from kvmesh.errors import ConfigError, ConfigProblem

KEY = "correct horse battery staple"
YAML = "controller_pull_url: localhost:8300\ncontroller_reply_url: localhost:8400\n"


def key_file(folder: Path, data: bytes = KEY.encode(), mode: int = 0o600) -> Path:
    path = folder / "cluster.key"
    path.write_bytes(data)
    path.chmod(mode)
    return path


def load(folder: Path, *lines: str, **environ: str) -> KVMeshConfig:
    path = folder / "a.yaml"
    path.write_text(YAML + "\n".join(lines) + "\n")
    return load_config(path=path, environ=environ)


def only_problem(folder: Path, *lines: str, **environ: str) -> ConfigProblem:
    with pytest.raises(ConfigError) as caught:
        load(folder, *lines, **environ)
    assert KEY not in str(caught.value)
    (problem,) = caught.value.problems
    return problem


def secret(config: KVMeshConfig) -> str | None:
    return None if config.cluster_key is None else config.cluster_key.get_secret_value()


def test_from_a_file_with_whitespace_around_it(tmp_path):
    path = key_file(tmp_path, f"\n  {KEY}\r\n".encode())
    assert secret(load(tmp_path, f"cluster_key_file: {path}")) == KEY


def test_from_the_environment(tmp_path):
    assert secret(load(tmp_path, KVMESH_CLUSTER_KEY=f" {KEY}\n")) == KEY
    assert secret(load(tmp_path, KVMESH_CLUSTER_KEY="")) is None


def test_the_controller_takes_both_too(tmp_path):
    path = str(key_file(tmp_path))
    for config in (
        make_controller_config(cluster_key_file=path, environ={}),
        make_controller_config(environ={"KVMESH_CLUSTER_KEY": KEY}),
    ):
        assert config.cluster_key is not None
        assert config.cluster_key.get_secret_value() == KEY
        assert KEY not in repr(config)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644, 0o601])
def test_a_file_that_others_can_reach_is_refused(tmp_path, mode):
    problem = only_problem(tmp_path, f"cluster_key_file: {key_file(tmp_path, mode=mode)}")
    assert problem.hint.startswith("chmod 600 ")
    assert f"{mode:04o}" in problem.found


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"fifteen bytes!!", "a shorter one"),
        (b" " * 100, "a shorter one"),
        (b"", "a shorter one"),
        (b"-----BEGIN PRIVATE KEY-----\nabc\n", "several lines"),
        (b"0123456789abcde\x00", "cannot be printed"),
        (bytes(range(128, 160)), "no text"),
        (b"k" * (MAX_FILE_BYTES + 1), "more than"),
    ],
)
def test_a_file_that_holds_no_key_is_refused(tmp_path, data, found):
    assert found in only_problem(tmp_path, f"cluster_key_file: {key_file(tmp_path, data)}").found


def test_what_is_no_file_is_refused_at_once(tmp_path):
    """A named pipe that nobody writes to does not hold up the start."""
    os.mkfifo(tmp_path / "pipe", 0o600)
    for name in ("pipe", ".", "missing"):
        assert only_problem(tmp_path, f"cluster_key_file: {tmp_path / name}").key == "cluster_key_file"


def test_a_short_key_in_the_environment_is_refused_without_showing_it(tmp_path):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, KVMESH_CLUSTER_KEY="hunter2")
    assert "hunter2" not in str(caught.value)
    assert caught.value.problems[0].key == "KVMESH_CLUSTER_KEY"


def test_two_keys_are_one_too_many(tmp_path):
    problem = only_problem(tmp_path, f"cluster_key_file: {key_file(tmp_path)}", KVMESH_CLUSTER_KEY="k" * 20)
    assert problem.hint == "remove one of them"


def test_the_key_itself_is_no_setting(tmp_path):
    """In a YAML file, which is copied and shown around, it is refused, and not repeated."""
    assert only_problem(tmp_path, f"cluster_key: {KEY}").hint == "did you mean cluster_key_file?"


def test_with_a_key_any_address_may_be_bound(tmp_path):
    """No key: refused with all ways out. With one: fine, but NIXL's own ports are not protected by it."""
    lines = ("host: 10.0.0.1",)
    problem = only_problem(tmp_path, *lines)
    assert problem.key == "host"
    for way in ("cluster_key_file", "KVMESH_CLUSTER_KEY", "loopback", "insecure: true"):
        assert way in problem.hint
    assert not load(tmp_path, *lines, KVMESH_CLUSTER_KEY=KEY).warnings
    assert "NIXL" in load(tmp_path, *lines, "transfer_channel: nixl", KVMESH_CLUSTER_KEY=KEY).warnings[0]


def test_the_key_is_shown_nowhere_but_reaches_the_node(tmp_path):
    config = load(tmp_path, KVMESH_CLUSTER_KEY=KEY)
    for shown in (repr(config), str(config), str(config.describe()), str(config.model_dump())):
        assert KEY not in shown
    assert secret(KVMeshConfig.from_wire(config.to_wire())) == KEY
    assert secret(KVMeshConfig.from_wire(KVMeshConfig().to_wire())) is None


def test_bad_wire_form_does_not_show_the_key(tmp_path):
    wire = load(tmp_path, KVMESH_CLUSTER_KEY=KEY).to_wire().replace(b'"peer_port":0', b'"peer_port":"x"')
    with pytest.raises(ConfigError) as caught:
        KVMeshConfig.from_wire(wire)
    assert KEY not in str(caught.value)


class TestCommand:
    def run(self, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "kvmesh.cli", "key", *arguments]
        env = {name: value for name, value in os.environ.items() if name != "KVMESH_CLUSTER_KEY"} | environ
        return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=50)

    def test_new_makes_a_file_that_can_be_used_and_never_overwrites_one(self, tmp_path):
        path = tmp_path / "new.key"
        assert self.run("new", str(path)).returncode == 0
        assert path.stat().st_mode & 0o777 == 0o600
        made = path.read_text()
        assert secret(load(tmp_path, f"cluster_key_file: {path}")) == made.strip()
        again = self.run("new", str(path))
        assert (again.returncode, path.read_text()) == (1, made)
        token = self.run("token", str(path))
        assert len(token.stdout.strip()) == 64
        assert token.stdout == self.run("token", KVMESH_CLUSTER_KEY=made).stdout
