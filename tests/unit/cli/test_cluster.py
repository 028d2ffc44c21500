"""`kvmesh status`, `top` and `lookup`."""

from __future__ import annotations

import io
import json
import re

import msgspec
import pytest
from rich.console import Console

from kvmesh.cli.status import members_shown
from kvmesh.cli.top import picture
from kvmesh.client import Health, Instance, Instances, Totals
from kvmesh.client.moment import Moment, Rates
from kvmesh.errors import ConfigError, DirectoryUnavailableError
from support.fake_controller import instance

KEY = "ab" * 36


@pytest.fixture
def busy(controller):
    """Two members, one of them silent, that cannot share; one that has gone."""
    silent = instance("engine-b", state="suspect", peer_address="10.0.0.2:8200", last_contact_age_s=5.0)
    controller.answers |= {
        "/api/v1/instances": {
            "instances": [instance("engine-a"), silent],
            "departed": [
                {
                    "instance_id": "engine-c",
                    "incarnation": "0" * 16,
                    "peer_address": "10.0.0.3:8200",
                    "model_name": "m",
                    "reason": "timeout",
                    "age_s": 30.0,
                }
            ],
        },
        "/api/v1/totals": {
            "instances": 2,
            "formats": 2,
            "chunks": 400,
            "entries": 600,
            "slots": 2000,
            "fetches": 3,
            "chunks_asked": 20,
            "chunks_fetched": 15,
            "fetched_bytes": 150_000_000,
            "fetch_seconds": 0.1,
            "misses": {"evicted": 5},
        },
        "/api/v1/incompatibilities": [
            {
                "instance_id": "engine-a",
                "other_instance_id": "engine-b",
                "same_model": True,
                "fields": [{"field": "hash_seed", "ours": "", "theirs": "7"}],
            }
        ],
        "/api/v1/fetches": [
            {
                "number": 1,
                "age_s": 2.0,
                "instance_id": "engine-b",
                "request_id": "cmpl-1",
                "holders": ["engine-a"],
                "transport": "tcp",
                "chunks_asked": 20,
                "chunks_fetched": 15,
                "fetched_bytes": 150_000_000,
                "seconds": 0.1,
                "misses": {"evicted": 5},
            }
        ],
    }
    return controller


@pytest.mark.usefixtures("busy")
class TestStatus:
    def test_at_a_glance(self, run):
        result = run("status")
        assert result.exit_code == 0, result.output
        for part in (
            "well",
            "2 (1 silent), 2 formats; 400 chunks, 1.50 holders each, pools 30 % full",
            "150 MB in 3 fetches at 1.50 GB/s; 75 % of the chunks asked for came; misses: evicted 5",
            "engine-a cannot share KV with engine-b: hash_seed is empty here and '7' there",
            "PYTHONHASHSEED",
            "engine-c (10.0.0.3:8200) 30 s ago: timeout",
        ):
            assert part in result.stdout
        rows = [line.split() for line in result.stdout.splitlines()]
        assert any(row[:2] == ["engine-b", "suspect"] for row in rows)
        assert "\x1b" not in result.stdout  # no colours where nobody sees them

    @pytest.mark.parametrize(
        ("columns", "shown"),
        [(80, []), (110, ["address"]), (130, ["address", "format"]), (200, ["address", "format", "incarnation"])],
    )
    def test_a_narrow_terminal_gets_fewer_columns(self, run, columns, shown):
        """And no line is longer than it."""
        table = run("status", COLUMNS=str(columns)).stdout.splitlines()[3:6]
        assert [name for name in ("address", "format", "incarnation") if name in table[0].split()] == shown
        assert max(map(len, table)) <= columns
        assert all(row.split()[0].startswith("engine-") for row in table[1:]), "each member is one row"

    def test_json(self, run_json):
        told = run_json("status")
        assert [one["instance_id"] for one in told["instances"]] == ["engine-a", "engine-b"]
        assert told["totals"]["chunks_fetched"] == 15
        assert told["hit_rates"] is None

    def test_hit_rates_where_the_controller_tells_them(self, busy, run):
        rates = {"requests": 9, "chunks": 100, "peer_chunks": 40, "achieved": 0.712, "achievable": 0.9}
        of = {"recent": rates, "since_start": rates}
        listed = [{"instance_id": "engine-a", **of}]
        busy.answers["/api/v1/hit-rates"] = {"window_s": 3600, "cluster": of, "instances": listed}
        result = run("status")
        assert "71 % of the chunks of 9 requests" in result.stdout
        assert "90 %" in result.stdout
        assert "hit rate" in result.stdout

    def test_a_controller_that_is_not_well(self, busy, run):
        busy.answers["/healthz"]["problems"] = ["the task of the pull socket has died"]
        busy.status["/healthz"] = 503
        result = run("status")
        assert result.exit_code == 1
        assert "the pull socket has died" in result.stdout


def test_nobody_answers(run):
    result = run("status", KVMESH_CONTROLLER="127.0.0.1:1")
    assert isinstance(result.exception, DirectoryUnavailableError)


def test_the_option_comes_before_the_environment(run, controller):
    result = run("status", "--controller", controller.address, KVMESH_CONTROLLER="127.0.0.1:1")
    assert result.exit_code == 0
    assert isinstance(run("status", "--controller", "nonsense").exception, ConfigError)


@pytest.mark.usefixtures("busy")
class TestTop:
    def test_one_picture_after_the_other_where_there_is_no_terminal(self, run):
        result = run("top", "--count", "2", "--interval", "0.2")
        assert result.exit_code == 0, result.output
        assert result.stdout.count("last fetches") == 2
        assert "15/20" in result.stdout
        assert "now " in result.stdout

    def test_lines_of_json(self, run, busy):
        statistics = busy.answers["/api/v1/instances"]["instances"][0]["statistics"]

        def grow(_):
            statistics["fetched_bytes"] += 1_000_000
            return 200, {"instances": 2}

        busy.answers["/api/v1/totals"] = grow
        result = run("top", "--json", "--count", "3", "--interval", "0.2")
        first, *later = map(json.loads, result.stdout.splitlines())
        assert first["rates"]["fetched_bytes"] == 0
        assert len(later) == 2
        assert all(line["rates_by_instance"]["engine-a"]["fetched_bytes"] > 0 for line in later)

    def test_a_controller_that_goes_away_is_waited_for(self, run, busy):
        """Its last words stay on the screen, with their age."""
        members = busy.answers["/api/v1/instances"]
        times = iter(range(9))

        def sometimes(_):
            return (500, b"") if next(times) == 1 else (200, members)

        busy.answers["/api/v1/instances"] = sometimes
        result = run("top", "--json", "--count", "3", "--interval", "0.2")
        errors = [bool(json.loads(line)["error"]) for line in result.stdout.splitlines()]
        assert errors == [False, True, False]


class TestLookup:
    @pytest.fixture
    def found(self, controller):
        def answer(asked):
            chunks = [{"key": KEY, "holders": ["engine-a"]}, {"key": "cd" * 36, "holders": []}]
            prefix = {"chunks": 1, "tokens": 256, "by_instance": {"engine-a": 1}}
            shown = {"format_id": "c7" * 16, "model_name": "m", "chunk_tokens": 256, "chunks": chunks}
            return 200, {"formats": [{**shown, "longest_prefix": prefix, "tokens": None}]}

        controller.answers["/api/v1/lookup"] = answer
        return controller

    @pytest.mark.parametrize(
        ("arguments", "text", "body"),
        [
            ([KEY, "cd" * 36], "", {"keys": [KEY, "cd" * 36]}),
            (["--keys", f"{KEY},{KEY}"], "", {"keys": [KEY, KEY]}),
            (["--keys-file", "-"], f"{KEY}\n{KEY}\n", {"keys": [KEY, KEY]}),
            (["--tokens-file", "-"], "[1, 2, 3]", {"tokens": [1, 2, 3]}),
            (["--tokens-file", "-"], "1 2\n3", {"tokens": [1, 2, 3]}),
            (["--text", "Hello"], "", {"text": "Hello"}),
            (["--text-file", "-", "--cache-salt", "a"], "Hello\n", {"text": "Hello\n", "cache_salt": "a"}),
        ],
    )
    def test_chunks_by_every_name(self, run, found, arguments, text, body):
        result = run("lookup", *arguments, text=text)
        assert result.exit_code == 0, result.output
        assert found.asked[-1].body == {**body, "format_id": None}
        assert "longest prefix 1 chunks, 256 tokens" in result.stdout
        assert "engine-a alone holds the first 1" in result.stdout

    def test_the_answer_is_no(self, run, controller):
        controller.answers["/api/v1/lookup"] = {"formats": []}
        assert run("lookup", KEY).exit_code == 1

    @pytest.mark.parametrize(
        ("arguments", "text", "says"),
        [
            ([], "", "say which chunks"),
            ([KEY, "--text", "x"], "", "in two ways"),
            (["xyz"], "", "no key in hexadecimal"),
            (["--tokens-file", "-"], '["a"]', "token ids"),
            (["--tokens-file", "-"], "[", "token ids"),
            (["--keys-file", "/no/such/file"], "", "No such file"),
            (["--keys", KEY, "--cache-salt", "a"], "", "--cache-salt"),
        ],
    )
    def test_a_wrong_command_line_is_told(self, run, arguments, text, says):
        result = run("lookup", *arguments, text=text)
        assert result.exit_code == 2
        assert says in " ".join(result.stderr.replace("│", " ").split())


def test_a_large_cluster_on_a_small_screen():
    """Silent members and busy ones come first; by name where there is room for all."""
    names = [f"engine-{number:03}" for number in range(500)]
    listed = [msgspec.convert(instance(name), Instance) for name in names]
    listed[77] = msgspec.structs.replace(listed[77], state="suspect")
    rates = dict.fromkeys(names, Rates()) | {"engine-400": Rates(fetched_bytes=5.0)}
    moment = Moment(0.0, Health("ok"), Instances(listed), Totals(), [], [])
    shown = [one.instance_id for one in members_shown(moment, rates, 10)]
    assert shown[:3] == ["engine-077", "engine-400", "engine-000"]
    assert len(shown) == 10
    assert [one.instance_id for one in members_shown(moment, rates, 500)] == names
    screen = Console(file=io.StringIO(), force_terminal=True, width=100, height=40, color_system=None)
    screen.print(picture("http://a:1", screen, moment, rates))
    lines = screen.file.getvalue().splitlines()
    assert len(lines) <= 40
    assert any(re.match(r"and 4\d\d quieter members", line) for line in lines)
