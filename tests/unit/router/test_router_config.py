"""The router's settings."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmesh.errors import ConfigError
from kvmesh.router.backends import Backend, Fleet
from kvmesh.router.config import make_router_config, parse_backend


def problems(**flags: object) -> str:
    with pytest.raises(ConfigError) as caught:
        make_router_config(flags=flags)
    return str(caught.value)


def test_flags_go_over_the_file(tmp_path: Path) -> None:
    """And the file over the defaults; both spellings of a key are taken."""
    path = tmp_path / "router.yaml"
    path.write_text("port: 9001\nhealth-interval-s: 2\nbackends: [http://a:1, http://b:2]\nretries:\n")
    config = make_router_config(path=path, flags={"port": 9002, "host": None})
    assert (config.host, config.port, config.health_interval_s, config.retries) == ("localhost", 9002, 2.0, 2)
    assert [backend.id for backend in config.static_backends()] == ["a:1", "b:2"]


def test_backends_as_text() -> None:
    """A flag lists them with commas; a name is the identity where there is one."""
    config = make_router_config(flags={"backends": "one=http://a:8000, http://[::1]:8001,http://c"})
    assert config.static_backends() == (
        Backend("one", "one", "a", 8000),
        Backend("[::1]:8001", "", "::1", 8001),
        Backend("c:80", "", "c", 80),
    )


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({}, "neither"),
        ({"backends": "http://a:1", "kubernetes_selector": "app=x"}, "both"),
        ({"backends": "a:1"}, "NAME=http://HOST:PORT"),
        ({"backends": "https://a:1"}, "NAME=http://HOST:PORT"),
        ({"backends": "http://a:1/v1"}, "only host and port"),
        ({"backends": "http://a:99999"}, "backends"),
        ({"backends": "http://a:1,http://a:1"}, "each engine once"),
        ({"backends": "http://a:1", "policy": "best"}, "roundrobin, leastload, session, prefix, kv"),
        ({"backends": "http://a:1", "policy": "kv", "controller_url": "http://c:9000"}, "instance_id"),
        ({"backends": "a=http://a:1", "policy": "kv"}, "controller_url"),
        ({"backends": "http://a:1", "controller_url": "c:9000"}, "http://HOST:PORT"),
        ({"backends": "http://a:1", "polcy": "kv"}, "did you mean policy?"),
        ({"backends": "http://a:1", "retries": -1}, "retries"),
        ({"backends": "http://a:1", "idle_timeout_s": float("inf")}, "idle_timeout_s"),
        ({"backends": "http://a:1", "session_header": "a b"}, "the name of an HTTP header"),
        ({"backends": "http://a:1", "api_key_file": "/no/such/file"}, "api_key_file"),
    ],
)
def test_what_is_wrong_is_named(flags: dict[str, object], told: str) -> None:
    """With what would be right."""
    assert told in problems(**flags)


@pytest.mark.parametrize("text", ["- a\n- b\n", "{", "port: [1", "\x00"])
def test_files_that_are_none(text: str, tmp_path: Path) -> None:
    """A list, broken YAML: an error that names the file."""
    path = tmp_path / "router.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"router\.yaml"):
        make_router_config(path=path, flags={"backends": "http://a:1"})


@settings(deadline=None)
@given(st.text(max_size=60))
def test_any_text_is_a_backend_or_an_error(text: str) -> None:
    """Nothing but ValueError."""
    try:
        backend = parse_backend(text)
    except ValueError:
        return
    assert backend.port


def test_a_fleet_keeps_who_stays_and_renews_who_moved() -> None:
    """State belongs to a life: the same id at another address is another backend."""
    fleet = Fleet(recent_half_life_s=1.0)
    new, gone = fleet.replace([Backend("a", "a", "h", 1), Backend("b", "b", "h", 2)])
    assert ([state.id for state in new], gone) == (["a", "b"], [])
    kept = fleet.get("a")
    new, gone = fleet.replace([Backend("a", "a", "h", 1), Backend("b", "b", "h", 3)])
    assert ([state.id for state in new], [state.id for state in gone]) == (["b"], ["b"])
    assert fleet.get("a") is kept


def test_candidates() -> None:
    """Healthy, with room, serving the model; everybody when nobody is known to."""
    fleet = Fleet(recent_half_life_s=1.0, max_requests_per_backend=1)
    states, _ = fleet.replace([Backend(name, name, "h", number) for number, name in enumerate("abc", start=1)])
    assert fleet.candidates() == []
    for state in states:
        state.healthy = True
    states[0].models, states[1].models = {"m": None}, {}
    assert [state.id for state in fleet.candidates("m")] == ["a", "c"]
    assert [state.id for state in fleet.candidates("m", without=["a", "c"])] == ["b"]
    states[2].load.start(1, 0.0)
    assert [state.id for state in fleet.candidates()] == ["a", "b"]
