"""Who is let in: ZMQ's questions, and the token of HTTP calls that change something."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from zmq.utils import z85

from kvmesh.config import make_controller_config
from kvmesh.controller.admission import answer_zap
from kvmesh.controller.api import Context
from kvmesh.controller.errors import ApiError, require_token
from kvmesh.controller.feed import Feed
from kvmesh.controller.registry import Registry
from kvmesh.controller.sockets import open_sockets
from kvmesh.wire.auth import ClusterKey
from kvmesh.wire.curve import CurveKeys

KEY = ClusterKey("k" * 20)
KEYS = CurveKeys.derive(KEY)
QUESTION = [b"1.0", b"7", b"kvmesh", b"10.0.0.1", b"", b"CURVE", z85.decode(KEYS.node_public)]


def test_a_member_is_let_in():
    assert answer_zap(QUESTION, KEYS)[:3] == [b"1.0", b"7", b"200"]


@pytest.mark.parametrize("index", [0, 2, 5, 6])
@given(other=st.binary(max_size=40))
def test_anything_else_is_not(index, other):
    if other != QUESTION[index]:
        assert answer_zap([*QUESTION[:index], other, *QUESTION[index + 1 :]], KEYS)[2] == b"400"


@given(st.lists(st.binary(max_size=40), max_size=10))
def test_every_question_has_an_answer(frames):
    """Of the form that ZMQ wants, whatever the question."""
    answer = answer_zap(frames, KEYS)
    assert len(answer) == 6
    assert answer[2] == b"400"


@pytest.fixture
def context():
    sockets = open_sockets(make_controller_config(port=0, monitor_ports='{"pull": 0, "reply": 0}', environ={}))
    registry = Registry(incarnation="0" * 16, heartbeat_interval_s=1.0, instance_timeout_s=4.0)
    yield lambda token: Context(registry, Feed(registry, sockets), token=token)
    sockets.close()


def test_the_token_of_the_cluster_is_taken(context):
    require_token(context(KEY.http_token()), f"Bearer {KEY.http_token()}")


@pytest.mark.parametrize(
    ("token", "shown", "status"),
    [
        (None, None, 403),
        (None, "Bearer ", 403),
        ("t" * 64, None, 401),
        ("t" * 64, "", 401),
        ("t" * 64, "Bearer", 401),
        ("t" * 64, "Bearer " + "t" * 63, 401),
        ("t" * 64, "Basic " + "t" * 64, 401),
        ("t" * 64, "Bearer \N{SNOWMAN}", 401),
    ],
)
def test_anything_else_changes_nothing(context, token, shown, status):
    with pytest.raises(ApiError) as caught:
        require_token(context(token), shown)
    assert caught.value.status == status
    assert "t" * 63 not in repr(context(token))
