"""What the page shows, without a browser: words, cells and figures."""

from __future__ import annotations

import logging
import types

import msgspec
import pytest
from pydantic import TypeAdapter

from kvmesh.controller.activity import Saved
from kvmesh.controller.api import Context
from kvmesh.controller.formats import format_pairs
from kvmesh.controller.log import LogLimiter, fields
from kvmesh.controller.operation_bodies import OperationBody
from kvmesh.controller.process import LineFormatter
from kvmesh.controller.traffic import Route
from kvmesh.controller.ui import units
from kvmesh.controller.ui.attention import badge, headline, notices_of
from kvmesh.controller.ui.compatibility import CHANGES, differences_of, sentence
from kvmesh.controller.ui.live import Moment
from kvmesh.controller.ui.members import STATES, Member
from kvmesh.controller.ui.operations import Form
from kvmesh.controller.ui.operations import sentence as sentence_of
from kvmesh.controller.ui.overview import prefill_note, thinned
from kvmesh.core.format import Format
from kvmesh.wire import directory as wire
from unit.controller.makers import make_format, make_member
from unit.controller.simulation import Cluster


class NoFeed:
    """A feed that has nothing to complain about."""

    def problems(self) -> list[str]:
        return []


def moment_of(cluster: Cluster, later_s: float = 0.0) -> Moment:
    context = Context(cluster.registry, NoFeed(), clock=lambda: cluster.now_s + later_s)
    return Moment(context, cluster.now_s + later_s, 0.0)


def state_of(cluster: Cluster, name: str, later_s: float = 0.0) -> str:
    return Member(cluster.registry.instances[name], moment_of(cluster, later_s)).state


@pytest.fixture
def cluster() -> Cluster:
    """Two that can share, and one of the same model that cannot."""
    made = Cluster()
    for name, dtype in (("a", "float32"), ("b", "float32"), ("x", "bfloat16")):
        made.add(make_member(name, format=make_format(kv_dtype=dtype), peer_port=8200 + ord(name)))
    made.pass_time(2)
    return made


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (units.count(0), "0"),
        (units.count(999), "999"),
        (units.count(999_999), "1.00 M"),
        (units.count(1_234_567), "1.23 M"),
        (units.size(1_500_000), "1.50 MB"),
        (units.size(3.1e18), "3100 PB"),
        (units.rate(0.3), units.NOTHING),
        (units.rate(1500), "1.50 kB/s"),
        (units.duration(0.0123), "12 ms"),
        (units.duration(3.44), "3.4 s"),
        (units.duration(300), "5 min"),
        (units.age(0.4), "now"),
        (units.age(3.4), "3 s ago"),
        (units.share(None), ""),
        (units.share(0.126), "13 %"),
        (units.some(1, "fetch", "fetches"), "1 fetch"),
        (units.some(2, "fetch", "fetches"), "2 fetches"),
        (units.listed(["a", "b"]), "a, b"),
        (units.listed(list("abcde")), "a, b, c and 2 more"),
    ],
)
def test_units(text, expected):
    assert text == expected


class TestStates:
    def test_each_state_is_explained(self, cluster):
        """Up; alone when nobody shares its format; silent before all else; joining without an inventory."""
        assert state_of(cluster, "a") == "up"
        assert state_of(cluster, "x") == "alone"
        assert state_of(cluster, "x", later_s=5) == "silent"
        cluster.registry.instances["a"].group.replica.mark_stale("a")
        assert state_of(cluster, "a") == "joining"
        cluster.registry.instances["b"].corrupt_chunks = 2
        assert state_of(cluster, "b") == "corrupt"
        assert {"up", "alone", "silent", "joining", "corrupt", "slow", "draining", "drained"} == STATES.keys()

    def test_sharing_as_the_node_tells_it(self, cluster):
        instance = cluster.registry.instances["a"]
        instance.statistics = wire.NodeStatistics(sharing="draining")
        assert state_of(cluster, "a") == "draining"
        instance.statistics = wire.NodeStatistics(sharing="made up")
        assert state_of(cluster, "a") == "up"


class TestAttention:
    def test_nothing_to_say(self):
        """All well, in one sentence that counts."""
        cluster = Cluster()
        for number in range(3):
            cluster.add(make_member(f"n{number}", peer_port=8000 + number))
        cluster.pass_time(1)
        moment = moment_of(cluster)
        assert list(notices_of(moment)) == []
        assert badge([]) == ("healthy", "ok")
        assert headline(moment, []) == ("All 3 instances are up and can share", "ok")
        assert headline(moment_of(Cluster()), []) == ("No instance has joined yet", "idle")

    def test_what_is_wrong_is_named(self, cluster):
        """Formats with the field, corrupt chunks, silence, and who was turned away."""
        cluster.registry.instances["b"].corrupt_chunks = 3
        cluster.registry.refusals.add("10.0.0.9", "it has no cluster key", cluster.now_s)
        notices = list(notices_of(moment_of(cluster, later_s=4.0)))
        told = " | ".join(f"{one.title}: {one.text}" for one in notices)
        for words in ("kv_dtype is float32 and bfloat16", "b delivers wrong bytes", "3 chunks", "Silent: a, b, x"):
            assert words in told
        assert "Turned away: 10.0.0.9" in told
        assert headline(moment_of(cluster), notices)[1] == "bad"
        assert badge(notices) == (f"{len(notices)} notices", "bad"), "never healthy beside something that needs a look"
        assert badge(notices[-1:]) == ("1 notice", "warn")

    def test_a_long_forgotten_refusal_is_not_shown(self, cluster):
        cluster.registry.refusals.add("10.0.0.9", "it has no cluster key", cluster.now_s - 3600)
        assert not [one for one in notices_of(moment_of(cluster)) if "10.0.0.9" in one.title]


class TestCompatibility:
    def test_one_record_for_each_differing_field(self):
        """Three instances against one with two differing fields: two records, whoever is asked."""
        cluster = Cluster()
        for name, chunk_tokens, seed in (("a", 256, ""), ("c", 256, ""), ("b", 128, "123"), ("d", 256, "")):
            cluster.add(make_member(name, format=make_format(chunk_tokens=chunk_tokens, hash_seed=seed)))
        cluster.pass_time(1)
        pairs = format_pairs(cluster.registry.groups)
        found = differences_of(pairs)
        assert [(one.field, one.ours, one.theirs) for one in found] == [
            ("chunk_tokens", "256", "128"),
            ("hash_seed", "", "123"),
        ]
        assert sentence(pairs[0]).startswith("a, c, d cannot share with b, though the model name is the same")
        assert "hash_seed is empty and 123" in sentence(pairs[0])

    def test_other_models_are_nobodys_fault(self):
        cluster = Cluster()
        cluster.add(make_member("a"))
        cluster.add(make_member("b", format=make_format(model_name="Other")))
        cluster.pass_time(1)
        assert differences_of(format_pairs(cluster.registry.groups)) == []

    def test_every_field_has_advice(self):
        assert set(Format.__struct_fields__) == set(CHANGES)


def test_prefill_saved_is_told_as_far_as_it_is_known():
    """Tokens always; seconds only from engines that have told how fast they prefill."""
    assert prefill_note(Saved()) == "nothing pulled yet"
    assert prefill_note(Saved(1000)) == "no engine has told how fast it prefills"
    assert prefill_note(Saved(1000, 1000, 3.0)) == "about 3 s of prefill"
    assert prefill_note(Saved(1000, 500, 3.0)) == "about 3 s of prefill (50 % of them timed)"


def test_prefill_saved_is_summed_up_from_reports():
    """Chunks that came from peers, in tokens, and in seconds at the engine's own rate."""
    cluster = Cluster()
    node = cluster.add(make_member("a"))
    cluster.pass_time(1)
    cluster.registry.instances["a"].statistics = wire.NodeStatistics(prefill_tokens_per_s=1024.0)
    for peer_chunks in (2, 6):  # the first one only tells where the counters stand
        report = wire.UseReport(
            instance_id="a",
            incarnation=node.who[1],
            requests=peer_chunks,
            chunks=8,
            device_chunks=0,
            own_chunks=0,
            peer_chunks=peer_chunks,
            new_alone=0.0,
            threshold=2**63 - 1,
            hashes=b"",
        )
        cluster.registry.on_event(report, wire.encode(report), cluster.now_s)
    assert cluster.registry.activity.saved == Saved(1024, 1024, 1.0)


def test_thinned_keeps_the_sum():
    assert thinned([1.0] * 10) == [2.0, 4.0, 4.0]
    assert thinned([]) == []


def test_busy_routes_come_first():
    """Those that move now, then those that have moved most; nobody's share is counted twice."""
    cluster = Cluster()
    a = cluster.add(make_member("a"))
    cluster.pass_time(1)
    report = wire.FetchReport(
        instance_id="a",
        incarnation=a.who[1],
        request_id="r",
        holders=("b", "c"),
        transport="tcp",
        chunks_asked=4,
        chunks_fetched=4,
        fetched_bytes=4000,
        seconds=0.5,
        misses={},
    )
    only_b = msgspec.structs.replace(report, holders=("b",), fetched_bytes=1000, chunks_fetched=1)
    for each in (report, only_b):
        cluster.registry.on_event(each, wire.encode(each), cluster.now_s)
    routes = moment_of(cluster).routes
    assert [(route.receiver, route.holder, route.bytes) for route in routes] == [("a", "b", 3000), ("a", "c", 2000)]
    assert routes[0].bytes_per_second > routes[1].bytes_per_second > 0
    later = moment_of(cluster, later_s=600).routes
    assert [route.bytes_per_second for route in later] == [0.0, 0.0]
    assert isinstance(later[0], Route)


def test_log_lines_stay_one_line_whatever_is_in_them():
    """An instance id with line feeds and quotes cannot forge a second line."""
    line = fields(event="x", instance='a\nlevel=error event="forged"', number=1.23456, none=None, long="y" * 1000)
    assert "\n" not in line
    assert line.startswith('event=x instance="a\\nlevel=error event=\\"forged\\"" number=1.235 none=None long=yyy')
    assert len(line) < 700


def test_prose_of_libraries_becomes_a_field():
    record = logging.LogRecord("uvicorn.error", logging.WARNING, "", 0, "Invalid HTTP request\nreceived.", (), None)
    line = LineFormatter().format(record)
    assert 'level=warning logger=uvicorn.error event=log text="Invalid HTTP request\\nreceived."' in line


def test_log_limiter():
    """One line per key and interval, with a count of those kept back; bounded memory."""
    limiter = LogLimiter(interval_s=10.0, max_keys=2)
    assert limiter.allow("a", 0.0) == 0
    assert [limiter.allow("a", 1.0 + index) for index in range(5)] == [None] * 5
    assert limiter.allow("b", 2.0) == 0
    assert limiter.allow("a", 10.0) == 5
    assert limiter.allow("c", 11.0) == 0
    assert len(limiter._last) == 2


class TestWhoMayChangeSomething:
    """The page's operations keep to the rules of the HTTP API."""

    def refusal(self, *, token: str | None, shown: str, client: str = "127.0.0.1", origin: str = "http://127.0.0.1:9"):
        context = Context(Cluster().registry, NoFeed(), token=token)
        headers = [(b"host", b"127.0.0.1:9"), (b"origin", origin.encode()), (b"authorization", b"Bearer somebody")]
        scope = {"type": "websocket", "headers": headers, "client": (client, 1), "path": "/"}
        reader = types.SimpleNamespace(environ={"asgi.scope": scope})
        return Form(context, reader)._refusal(shown)  # type: ignore[arg-type]

    def test_with_a_cluster_key_the_token_decides(self):
        """What the reader types, not what the browser sends by itself."""
        assert self.refusal(token="right", shown="right", client="10.0.0.9") is None
        for wrong in ("", "wrong"):
            assert self.refusal(token="right", shown=wrong).code == "bad_token"

    def test_without_a_key_only_this_machine(self):
        """And no page of somebody else's that this machine's browser shows."""
        assert self.refusal(token=None, shown="") is None
        assert self.refusal(token=None, shown="", client="10.0.0.9").code == "writes_need_loopback"
        assert self.refusal(token=None, shown="", origin="http://evil.example").code == "writes_need_loopback"

    def test_a_page_without_a_connection_changes_nothing(self):
        context = Context(Cluster().registry, NoFeed())
        form = Form(context, types.SimpleNamespace(environ=None))  # type: ignore[arg-type]
        assert form._refusal("").code == "no_connection"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"kind": "clear"}, "Clear everything on every instance."),
        ({"kind": "clear", "instance": "a", "text": "x"}, "Clear the chunks of this prompt on a."),
        ({"kind": "pin", "text": "x", "seconds": 3600}, "Pin the chunks of this prompt on every instance for 60 min."),
        ({"kind": "warm", "instance": "a", "hottest": 5}, "Have a fetch the 5 hottest chunks from others."),
        ({"kind": "drain", "instance": "a", "hand_over": 3}, "Drain a: hand over up to 3 chunks, then leave."),
        ({"kind": "move", "from": "a", "to": "b"}, "Move everything from a to b."),
        ({"kind": "resume", "instance": "a"}, "Have a publish and fetch again."),
        ({"kind": "unpin"}, "Unpin everything on every instance."),
    ],
)
def test_the_confirmation_says_what_will_happen(body, words):
    assert sentence_of(TypeAdapter(OperationBody).validate_python(body)) == words
