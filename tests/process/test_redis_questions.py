"""A controller that shows a directory in Redis asks its nodes over their peer ports, as a member of the cluster.

What it can have done there is in `test_operations.py`, with either directory.
"""

from __future__ import annotations

import contextlib
import os
import signal
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from kvmesh.bench.stand_in import make_key
from kvmesh.config import TlsFiles
from kvmesh.core.reasons import MissReason
from process.controller_nodes import wait_for
from support.keys import KEY_TEXT, OTHER_KEY_TEXT, Authority, needs_openssl
from support.redis_servers import needs_redis, running_redis
from support.stand_ins import make_config, running_controller, running_engine

pytestmark = [pytest.mark.process, pytest.mark.timeout(120), needs_redis]

KEYS = [make_key(f"asked-{number}") for number in range(9)]
VARIABLE = "KVMESH_CLUSTER_KEY"
JSON = dict[str, Any]


@pytest.fixture(autouse=True)
def no_key_around(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests say themselves who has which key."""
    monkeypatch.delenv(VARIABLE, raising=False)


@contextlib.contextmanager
def watcher(folder: Path, url: str, *arguments: str, ca_file: str | None = None) -> Iterator[httpx.Client]:
    """The HTTP API of a controller that shows this Redis."""
    folder.mkdir()
    flags = ("--lookup-url", url, "--heartbeat-interval", "0.3", "--instance-timeout", "2", *arguments)
    scheme = "http" if ca_file is None else "https"
    context = ssl.create_default_context(cafile=ca_file)
    with (
        running_controller(folder, arguments=flags, env={VARIABLE: ""}, scheme=scheme) as controller,
        httpx.Client(base_url=f"{controller.url}/api/v1", verify=context, timeout=20, trust_env=False) as client,
    ):
        yield client


def explained(client: httpx.Client, request_id: str) -> JSON:
    """The explanation of a request, as soon as its instance is known and has one."""

    def find() -> JSON | None:
        answer = client.get(f"/explain/{request_id}")
        found: JSON = answer.json()
        return found["explanations"][0] if answer.status_code == 200 and found["explanations"] else None

    return wait_for(find, 30)


def key_file(folder: Path, text: str) -> str:
    path = folder / f"{text.replace(' ', '-')}.key"
    path.touch(0o600)
    path.write_text(text + "\n")
    return str(path)


def test_requests_are_explained(tmp_path: Path) -> None:
    """By the node that had them, improved by what its peers say; a node that does not answer is named, with the reason,
    and costs no other node's answer.
    """
    with running_redis(tmp_path / "redis") as redis, watcher(tmp_path / "controller", redis.url) as client:
        quick = {"lookup_url": redis.url, "heartbeat_interval_s": 0.3, "instance_timeout_s": 20.0}
        with (
            running_engine(make_config(None, "holder", **quick)) as holder,
            running_engine(make_config(None, "reader", **quick)) as reader,
        ):
            wait_for(lambda: reader.node.state.directory_connected)
            holder.put(KEYS[:6])
            assert reader.wait_visible(KEYS[:6], 20)
            assert reader.get(KEYS[:8], request_id="cmpl-redis-0").fetched == 6
            one = explained(client, "cmpl-redis-0")
            assert one["instance_id"] == "reader"
            assert one["found"]["peer"] == 6
            assert one["causes"][0]["reason"] == MissReason.NOT_PUBLISHED
            holder.get([KEYS[8]], request_id="earlier")
            explained(client, "earlier")
            reader.get([KEYS[8]], request_id="later")
            asked = wait_for(lambda: explained(client, "later")["causes"][0]["detail"].get("asked_at"))
            assert asked == "holder", "what the other one knows is asked, too"

            pid = holder.node.pid
            assert pid is not None
            os.kill(pid, signal.SIGSTOP)
            try:
                answer = client.get("/explain/cmpl-redis-0").json()
            finally:
                os.kill(pid, signal.SIGCONT)
            assert [one["instance_id"] for one in answer["explanations"]] == ["reader"]
            [unanswered] = answer["unanswered"]
            assert (unanswered["instance_id"], unanswered["code"]) == ("holder", "deadline")


@needs_openssl
def test_only_a_member_is_answered(tmp_path: Path) -> None:
    """With a cluster key and TLS between peers, a controller needs both, too; without them it is told what it lacks,
    and shows what is in Redis all the same.
    """
    authority = Authority(tmp_path)
    files = authority.issue("member")
    right_key, wrong_key = key_file(tmp_path, KEY_TEXT), key_file(tmp_path, OTHER_KEY_TEXT)
    https = ("--tls-cert-file", files.cert_file, "--tls-key-file", files.key_file)
    with running_redis(tmp_path / "redis") as redis:
        config = make_config(
            None, "a", lookup_url=redis.url, heartbeat_interval_s=0.3, cluster_key=SecretStr(KEY_TEXT), **_tls(files)
        )
        with running_engine(config) as engine:
            engine.get(KEYS[:1], request_id="cmpl-secret")
            member = ("--cluster-key-file", right_key, *https, "--tls-ca-file", files.ca_file)
            with watcher(tmp_path / "member", redis.url, *member, ca_file=files.ca_file) as client:
                assert explained(client, "cmpl-secret")["instance_id"] == "a"
            without_ca = ("--cluster-key-file", right_key, *https)
            with watcher(tmp_path / "plain", redis.url, *without_ca, ca_file=files.ca_file) as client:
                wait_for(lambda: client.get("/instances/a").status_code == 200)
                [unanswered] = client.get("/explain").json()["unanswered"]
                assert unanswered["code"] == "unreachable"
            other = ("--cluster-key-file", wrong_key, *https, "--tls-ca-file", files.ca_file)
            with watcher(tmp_path / "other", redis.url, *other, ca_file=files.ca_file) as client:
                assert client.get("/instances").json()["instances"] == [], "what is signed by another key is not shown"


def _tls(files: TlsFiles) -> dict[str, object]:
    return {"tls_cert_file": files.cert_file, "tls_key_file": files.key_file, "tls_ca_file": files.ca_file}
