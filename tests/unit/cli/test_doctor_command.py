"""`kvmesh doctor` as a command: what it gathers, prints and ends with."""

from __future__ import annotations

import pytest

from kvmesh.cli.shared import exit_status
from kvmesh.config import load_config
from kvmesh.errors import ApiRefusedError, ConfigError, ConfigProblem, DirectoryUnavailableError
from support.fake_controller import instance


def test_a_problem_is_told_with_advice_and_ends_with_one(run, controller):
    members = [instance("a", state="suspect"), instance("b")]
    controller.answers["/api/v1/instances"] = {"instances": members}
    result = run("doctor", "--only", "member")
    assert result.exit_code == 1
    assert "PROBLEM member.heartbeat" in result.stdout
    assert "-> look at that process" in result.stdout
    assert "1 problem, 0 warnings, 1 ok" in result.stdout


def test_warnings_do_not_count(run_json, controller):
    full = instance("a", pool_use=1.0, chunks=1000)
    controller.answers["/api/v1/instances"] = {"instances": [full, instance("b")]}
    told = run_json("doctor", "--only", "member")
    assert told["healthy"]
    assert told["counts"] == {"ok": 2, "warning": 1, "problem": 0, "skipped": 0}
    (found,) = (one for one in told["findings"] if one["level"] == "warning")
    assert (found["check"], found["about"]) == ("pool.full", "a")


def test_no_controller_is_a_finding(run_json):
    told = run_json("doctor", "--only", "controller", KVMESH_CONTROLLER="127.0.0.1:1")
    (found,) = told["findings"]
    assert (found["check"], found["level"]) == ("controller.answers", "problem")
    assert "kvmesh controller" in found["advice"]


def test_offline_asks_nobody(run, controller):
    result = run("doctor", "--offline", "--only", "controller", "--only", "member", "--all")
    assert result.exit_code == 0
    assert "--offline" in result.stdout
    assert not controller.asked


def test_a_bad_configuration_is_a_finding_too(run_json, tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("chunk_sise: 256\n")
    told = run_json("doctor", "--offline", "--only", "config", "--config", str(file))
    assert "did you mean chunk_size?" in told["findings"][0]["message"]


def test_unknown_subjects_are_told_with_those_that_exist(run):
    result = run("doctor", "--only", "weather")
    assert result.exit_code == 2
    assert "member" in result.stderr


def test_refused_handshakes_are_read_from_the_metrics(run_json, controller):
    name = "kvmesh_controller_refused_handshakes_total"
    controller.answers["/metrics"] = f'# HELP x\n{name}{{socket="pull"}} 2.0\n{name}{{socket="reply"}} 1.0\n'.encode()
    told = run_json("doctor", "--only", "key")
    assert any(one["message"].startswith("3 connections") for one in told["findings"])


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ConfigError([]), 1),
        (ConfigError([ConfigProblem("peer_port", "a.yaml:1", "a port", "x")]), 1),
        (ConfigError([ConfigProblem("--controller", "", "host and port", "foo")]), 2),
        (DirectoryUnavailableError("controller"), 3),
        (ApiRefusedError("controller", "no"), 4),
    ],
)
def test_exit_statuses(error, status):
    assert exit_status(error) == status


def test_the_commands_variables_are_no_settings_of_an_instance():
    """Whoever exports them in a shell where an engine is started must not stop that engine."""
    environ = {"KVMESH_CONTROLLER": "a:1", "KVMESH_CONTROLLER_CA": "ca.pem", "KVMESH_SHARE": "false"}
    assert not load_config(environ=environ).warnings


def test_a_thousand_equal_findings_do_not_hide_the_others(run, run_json, controller):
    """A few of each kind, and how many more; JSON and --all have them all."""
    many = [instance(f"engine-{number}", pool_use=1.0, chunks=1000) for number in range(40)]
    controller.answers["/api/v1/instances"] = {"instances": [*many, instance("late", corrupt_chunks=1)]}
    result = run("doctor", "--only", "member")
    assert result.stdout.count("its pool is full") == 8
    assert "32 more warning of pool.full" in result.stdout
    assert "late" in result.stdout
    assert "40 warnings" in result.stdout
    assert run("doctor", "--only", "member", "--all").stdout.count("its pool is full") == 40
    assert run_json("doctor", "--only", "member")["counts"]["warning"] == 40
