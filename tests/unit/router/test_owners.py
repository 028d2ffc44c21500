"""Requests that refer to a stored response."""

from __future__ import annotations

import json

from kvmesh.router.owners import ResponseOwners
from kvmesh.router.request import RESPONSES, read_facts


def facts(method: str, path: str, **body: object):
    return read_facts(method, path, {"content-type": "application/json"}, json.dumps(body).encode())


def test_a_response_is_found_again() -> None:
    """By its path and as the previous one; whole or streamed; what is no response is not remembered."""
    owners = ResponseOwners(max_responses=2)
    owners.learn(facts("POST", RESPONSES), b'{"id":"resp_1","object":"response"}', "a")
    owners.learn(facts("POST", RESPONSES), b'event: response.created\ndata: {"response": {"id": "resp_2"', "b")
    owners.learn(facts("POST", "/v1/completions"), b'{"id":"resp_3"}', "a")
    owners.learn(facts("POST", RESPONSES), b'{"error":{}}', "a")
    assert owners.owner(facts("GET", f"{RESPONSES}/resp_1")) == "a"
    assert owners.owner(facts("POST", f"{RESPONSES}/resp_2/cancel")) == "b"
    assert owners.owner(facts("POST", RESPONSES, previous_response_id="resp_2")) == "b"
    assert owners.owner(facts("POST", RESPONSES)) is None
    assert owners.owner(facts("GET", f"{RESPONSES}/resp_3")) is None
    owners.learn(facts("POST", RESPONSES), b'{"id":"resp_4"}', "a")
    assert len(owners) == 2
