"""Whatever answers, or does not: one error that says what to do."""

from __future__ import annotations

import contextlib
import json
import socket
from pathlib import Path

import pytest

from kvmesh.client import ControllerApi, ControllerTarget, Health, Instances
from kvmesh.errors import ApiRefusedError, ConfigError, DirectoryUnavailableError
from support.fake_controller import FakeController, fake_controller


@pytest.fixture
def controller():
    with fake_controller() as running:
        yield running


@contextlib.contextmanager
def open_api(controller: FakeController, **options):
    with contextlib.closing(ControllerApi(ControllerTarget.parse(controller.address), **options)) as api:
        yield api


@pytest.mark.parametrize(
    ("written", "url"),
    [
        ("localhost:9000", "http://localhost:9000"),
        (" https://controller.example:443/ ", "https://controller.example:443"),
        ("[::1]:9000", "http://[::1]:9000"),
    ],
)
def test_addresses_as_people_write_them(written, url):
    assert ControllerTarget.parse(written).url == url


@pytest.mark.parametrize("written", ["", "controller", "ftp://a:1", "tcp://a:1", "a:99999", "http://a:1/path"])
def test_other_addresses_are_refused_with_an_example(written):
    with pytest.raises(ConfigError, match=r"--controller .*10\.0\.0\.5:9000"):
        ControllerTarget.parse(written)


def test_a_ca_that_is_none_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nothing\.pem"):
        ControllerTarget.parse("a:1", Path(tmp_path / "nothing.pem"))
    (tmp_path / "empty.pem").touch()
    with pytest.raises(ConfigError, match=r"empty\.pem"):
        ControllerApi(ControllerTarget.parse("https://a:1", tmp_path / "empty.pem"))


def test_an_answer_is_typed_and_new_fields_do_no_harm(controller):
    controller.answers["/healthz"]["news"] = {"of": "tomorrow"}
    with open_api(controller) as api:
        assert api.health() == Health("ok", "0.1.0", "ab" * 8, 61.0, 0, [])
        assert api.get("/api/v1/instances", Instances) == Instances([], [])


def test_an_unhealthy_controller_is_an_answer(controller):
    controller.answers["/healthz"]["problems"] = ["the pull socket's task has died"]
    controller.status["/healthz"] = 503
    with open_api(controller) as api:
        assert api.health().problems == ["the pull socket's task has died"]


def test_a_refusal_keeps_the_controllers_words(controller):
    controller.refuse("/api/v1/instances/x", 404, "unknown_instance", "no member has the id 'x'", "list them")
    with open_api(controller) as api, pytest.raises(ApiRefusedError) as caught:
        api.get_raw("/api/v1/instances/x")
    error = caught.value
    assert (error.status, error.code) == (404, "unknown_instance")
    assert str(error).endswith(": no member has the id 'x'; list them")


def test_a_call_that_an_older_controller_does_not_know_is_nothing(controller):
    controller.refuse("/api/v1/gone", 404, "unknown_instance", "another kind of 404")
    with open_api(controller) as api:
        assert api.get_if_known("/api/v1/new", Health) is None
        with pytest.raises(ApiRefusedError):
            api.get_if_known("/api/v1/gone", Health)


def test_nobody_there():
    """The address, and how to start or name a controller."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        target = ControllerTarget.parse(f"127.0.0.1:{unused.getsockname()[1]}")
        with contextlib.closing(ControllerApi(target)) as api, pytest.raises(DirectoryUnavailableError) as caught:
            api.health()
    assert target.url in str(caught.value)
    assert "kvmesh controller" in caught.value.hint
    assert "--controller" in caught.value.hint


def test_somebody_who_says_nothing():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        target = ControllerTarget.parse(f"127.0.0.1:{listener.getsockname()[1]}")
        impatient = contextlib.closing(ControllerApi(target, timeout_s=0.1))
        with impatient as api, pytest.raises(DirectoryUnavailableError, match="none in time"):
            api.health()


@pytest.mark.parametrize("body", [b"", b"[]", b"<html>a login page</html>", b'{"status": 5}', b"\xff\xfe"])
def test_another_program_is_not_taken_for_a_controller(controller, body):
    controller.answers["/healthz"] = body
    with open_api(controller) as api, pytest.raises(DirectoryUnavailableError, match="kvmesh controller"):
        api.health()


def test_an_error_of_a_proxy_is_told_as_it_is(controller):
    controller.answers["/api/v1/instances"] = b"<html>Bad Gateway</html>"
    controller.status["/api/v1/instances"] = 502
    with open_api(controller) as api, pytest.raises(ApiRefusedError, match="502"):
        api.get("/api/v1/instances", Instances)


def test_changes_show_the_token_and_reading_does_not(controller):
    controller.answers["/api/v1/operations"] = {}
    with open_api(controller, token=lambda: "secret") as api:
        api.get_raw("/api/v1/operations")
        api.change("POST", "/api/v1/operations", {"kind": "clear"}, idempotency_key="once")
    read, changed = controller.asked
    assert "Authorization" not in read.headers
    assert changed.headers["Authorization"] == "Bearer secret"
    assert changed.headers["Idempotency-Key"] == "once"
    assert changed.body == {"kind": "clear"}


def test_without_a_key_the_way_out_is_the_key(controller):
    controller.refuse("/api/v1/operations", 401, "bad_token", "this call needs the cluster's token", "send a header")
    with open_api(controller) as api, pytest.raises(ApiRefusedError, match="--cluster-key-file"):
        api.change("POST", "/api/v1/operations", {})
    with open_api(controller, token=lambda: "wrong") as api, pytest.raises(ApiRefusedError, match="send a header"):
        api.change("POST", "/api/v1/operations", {})


def test_names_from_outside_cannot_steer_a_terminal(controller):
    """Control characters are replaced, however they are written; text that only looks like them stays."""
    hostile = "a\x1b[2Jb\x07c\x7fd\x9be \\u001bf\ng\u00e9"
    controller.answers["/healthz"]["status"] = hostile
    with open_api(controller) as api:
        assert api.health().status == "a?[2Jb?c?d?e \\u001bf\ng\u00e9"
    controller.answers["/healthz"] = json.dumps({"status": hostile}, ensure_ascii=False).encode()
    with open_api(controller) as api:
        assert api.health().status == "a?[2Jb?c?d?e \\u001bf\ng\u00e9"
