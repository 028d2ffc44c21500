"""`kvmesh ops`: what is sent, how it is followed, and how it ends."""

from __future__ import annotations

import json

import pytest

from kvmesh.cli.operations import parse_duration
from kvmesh.errors import ApiRefusedError
from support.keys import KEY_TEXT

KEY = "ab" * 36
ID = "9f2c4e"


def operation(state: str, done: int = 0, **changed: object) -> dict[str, object]:
    part = {
        "instance_id": "engine-b",
        "action": "warm",
        "state": state,
        "chunks_done": done,
        "chunks_total": 400,
        "bytes_done": done * 1_000_000,
        "outcomes": {"fetched": done},
        "note": "",
        "error": None,
    }
    return {
        "id": ID,
        "kind": "warm",
        "state": state,
        "url": f"/api/v1/operations/{ID}",
        "created_age_s": 1.2,
        "finished_age_s": None,
        "timeout_s": 120,
        "request": {},
        "chunks_done": done,
        "chunks_total": 400,
        "bytes_done": done * 1_000_000,
        "instances": [part],
        "error": None,
        "summary": f"warm engine-b: {done} of 400 chunks",
        **changed,
    }


@pytest.fixture
def operations(controller):
    """A controller that takes one operation, which is done when it is looked at for the third time."""
    states = iter([operation("running", 100), operation("running", 200), *[operation("done", 400)] * 9])
    controller.answers |= {
        "/api/v1/operations": lambda asked: (202, operation("pending")),
        f"/api/v1/operations/{ID}": lambda asked: (200, next(states)),
    }
    return controller


def sent(controller) -> dict[str, object]:
    (posted,) = (asked for asked in controller.asked if asked.method == "POST")
    return posted.body


@pytest.mark.parametrize(
    ("arguments", "body"),
    [
        (["clear", "--yes"], {"kind": "clear", "timeout_s": 120}),
        (["clear", "-y", "--instance", "a", "--keys", KEY], {"kind": "clear", "instance": "a", "keys": [KEY]}),
        (["pin", "--text", "hi", "--for", "2h"], {"kind": "pin", "seconds": 7200, "text": "hi"}),
        (["unpin", "--instance", "a"], {"kind": "unpin", "instance": "a"}),
        (["warm", "b", "--hottest", "500", "--from", "a"], {"kind": "warm", "hottest": 500, "sources": ["a"]}),
        (["warm", "b", "--text", "hi", "--within", "5m"], {"instance": "b", "text": "hi", "timeout_s": 300}),
        (["move", "a", "b"], {"kind": "move", "from": "a", "to": "b"}),
        (["drain", "a", "--yes"], {"kind": "drain", "instance": "a", "leave": True}),
        (["drain", "a", "-y", "--stay", "--hand-over", "0"], {"kind": "drain", "leave": False, "hand_over": 0}),
        (["resume", "a"], {"kind": "resume", "instance": "a"}),
    ],
)
def test_what_is_asked_for(run, operations, arguments, body):
    """Nothing that was not given is sent; and once it is done, the exit status is 0."""
    result = run("ops", *arguments)
    assert result.exit_code == 0, result.output
    assert body.items() <= sent(operations).items()
    assert None not in sent(operations).values()
    assert "warm done: 400 of 400 chunks, 400 MB" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["clear"], "--yes"),
        (["drain", "a"], "--yes"),
        (["pin"], "say which chunks"),
        (["warm", "b"], "say which chunks"),
        (["warm", "b", "--hottest", "5", "--keys", KEY], "say which chunks"),
        (["warm", "b", "--keys", KEY, "--from", "a"], "--from goes with --hottest"),
        (["pin", "--keys", KEY, "--for", "soon"], "expected a time"),
        (["resume", "a", "--within", "0"], "expected a time"),
    ],
)
def test_a_wrong_command_line_sends_nothing(run, operations, arguments, says):
    result = run("ops", *arguments)
    assert result.exit_code == 2
    assert says in " ".join(result.stderr.replace("│", " ").split())
    assert not [asked for asked in operations.asked if asked.method == "POST"]


def test_writes_show_the_clusters_token_and_a_key_of_their_own(run, operations, tmp_path):
    file = tmp_path / "cluster.key"
    file.touch(0o600)
    file.write_text(KEY_TEXT)
    run("ops", "resume", "a", "--no-wait", "--cluster-key-file", str(file))
    run("ops", "resume", "a", "--no-wait", KVMESH_CLUSTER_KEY=KEY_TEXT)
    run("ops", "resume", "a", "--no-wait")
    first, second, third = (asked.headers for asked in operations.asked)
    assert first["Authorization"] == second["Authorization"]
    assert "Authorization" not in third
    assert len({one["Idempotency-Key"] for one in (first, second, third)}) == 3


def test_not_waiting_tells_how_to_look_later(run, run_json, operations):
    result = run("ops", "resume", "a", "--no-wait")
    assert (result.exit_code, len(operations.asked)) == (0, 1)
    assert f"kvmesh ops show {ID} --wait" in result.stdout
    assert run_json("ops", "resume", "a", "--no-wait")["state"] == "pending"


@pytest.mark.parametrize(("state", "status"), [("done", 0), ("partly", 1), ("failed", 1)])
def test_how_it_ended_is_the_exit_status(run, controller, state, status):
    error = {"code": "lost", "message": "engine-b has left", "hint": "look at its log"}
    controller.answers[f"/api/v1/operations/{ID}"] = operation(state, 100, error=error)
    result = run("ops", "show", ID, "--wait")
    assert result.exit_code == status
    assert "engine-b has left" in result.stdout
    assert "look at its log" in result.stdout


def test_following_asks_the_controller_to_hold_its_answer(run, operations):
    result = run("ops", "show", ID, "--wait", "--json")
    assert json.loads(result.stdout)["state"] == "done"
    assert [asked.query for asked in operations.asked] == ["", "wait_s=1.0", "wait_s=1.0", ""]


def test_listing(run, run_json, controller):
    controller.answers["/api/v1/operations"] = {"operations": [operation("running", 100)]}
    result = run("ops", "list", "--state", "running", "--limit", "5")
    assert f"{ID}" in result.stdout
    assert controller.asked[-1].query == "state=running&limit=5"
    assert run_json("ops", "list")["operations"][0]["id"] == ID


def test_cancelling(run, operations):
    result = run("ops", "cancel", ID)
    assert result.exit_code == 0
    assert [asked.method for asked in operations.asked] == ["DELETE"]


def test_a_refusal_is_told(run, controller):
    controller.refuse("/api/v1/operations", 404, "unknown_instance", "no member has the id 'a'", "kvmesh status")
    error = run("ops", "resume", "a").exception
    assert isinstance(error, ApiRefusedError)
    assert "no member has the id 'a'; kvmesh status" in str(error)


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("90s", 90), ("10m", 600), ("1h", 3600), ("7d", 604800)])
def test_times_as_people_write_them(text, seconds):
    assert parse_duration(text, "--for") == seconds
