"""Faults that keep instances from sharing, planted in real clusters: `kvmesh doctor`, run as an operator runs it, names
each of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest
import yaml
from pydantic import SecretStr

from kvmesh.bench.chaos import network as net
from kvmesh.bench.chaos.actor import Options
from kvmesh.bench.chaos.actors import Actor
from kvmesh.bench.cluster import Controller
from kvmesh.bench.stand_in import StandInEngine, make_key, stand_in_format
from kvmesh.doctor import Finding, Level
from process.controller_nodes import wait_for
from support.keys import KEY_TEXT, OTHER_KEY_TEXT
from support.stand_ins import CHUNK_BYTES, make_config, running_controller

pytestmark = [pytest.mark.process, pytest.mark.timeout(180)]

KEY_VARIABLE = "KVMESH_CLUSTER_KEY"
BRISK = ("--heartbeat-interval", "0.5", "--instance-timeout", "120")
"""Silence is noticed soon, and nobody is dropped while we look."""
SLOTS = 8
FORMATS: Mapping[str, dict[str, object]] = {
    "hash_seed": {"hash_seed": "7"},  # PYTHONHASHSEED
    "chunk_tokens": {"chunk_tokens": 128},
    "kv_dtype": {"kv_dtype": "float16"},
    "model_weights": {"model_weights": "those of another model"},
}
"""By the field that is to be named: what is different in one instance."""


def doctor(url: str, *arguments: str, prefix: Sequence[str] = (), **environ: str) -> list[Finding]:
    """What `kvmesh doctor --json` finds, run as a process of its own; the exit status must fit."""
    command = [*prefix, sys.executable, "-m", "kvmesh.cli", "doctor", "--json", "--controller", url, *arguments]
    env = {name: value for name, value in os.environ.items() if not name.startswith("KVMESH_")} | environ
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout, done.stderr
    found = msgspec.convert(json.loads(done.stdout)["findings"], list[Finding])
    assert done.returncode == int(any(one.level is Level.PROBLEM for one in found)), done.stderr
    return found


def about(findings: Sequence[Finding], check: str, *names: str) -> Finding:
    """The finding of this check that concerns all of these."""
    matching = [one for one in findings if one.check == check and all(name in one.about for name in names)]
    assert len(matching) == 1, "\n".join(
        f"{one.level.value} {one.check} {one.about}: {one.message}" for one in findings
    )
    return matching[0]


# -- one machine -------------------------------------------------------------------------------------------------------


class Cluster(NamedTuple):
    controller: Controller
    engines: dict[str, StandInEngine]
    findings: list[Finding]
    """Of one look at everything, by an operator who has the key."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    """A cluster with a key, one healthy instance, and in each other instance another fault."""
    folder = tmp_path_factory.mktemp("planted")
    with contextlib.ExitStack() as stack:
        controller = stack.enter_context(
            running_controller(folder, arguments=BRISK, env={KEY_VARIABLE: KEY_TEXT}),
        )
        engines = {
            name: StandInEngine(
                make_config(
                    controller, name, cluster_key=SecretStr(OTHER_KEY_TEXT if name == "stranger" else KEY_TEXT)
                ),
                slots=SLOTS,
                chunk_bytes=CHUNK_BYTES,
                kv_format=stand_in_format(CHUNK_BYTES, **FORMATS.get(name, {})),
            )
            for name in ("healthy", "full", "stopped", "stranger", *FORMATS)
        }
        for engine in engines.values():
            stack.callback(engine.close)
        with ThreadPoolExecutor(len(engines)) as starting:
            list(starting.map(StandInEngine.start, engines.values()))
        wait_for(lambda: len(controller.instances()) == len(engines) - 1)  # all but the stranger
        engines["full"].put([make_key(f"full-{number}") for number in range(SLOTS)])
        wait_for(lambda: state(controller, "full").get("pool_use") == 1.0)
        stack.enter_context(stopped(engines["stopped"]))
        wait_for(lambda: state(controller, "stopped").get("state") == "suspect")
        wait_for(lambda: "event=handshake_refused" in controller.log())
        findings = doctor(controller.url, "--timeout", "2", **{KEY_VARIABLE: KEY_TEXT})
        yield Cluster(controller, engines, findings)


@contextlib.contextmanager
def stopped(engine: StandInEngine) -> Iterator[None]:
    """Its node does nothing for the length of the block."""
    pid = engine.node.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def state(controller: Controller, name: str) -> dict[str, object]:
    return next((one for one in controller.instances() if one["instance_id"] == name), {})


@pytest.mark.parametrize("field", FORMATS)
def test_a_format_that_differs(cluster, field):
    """Wrong PYTHONHASHSEED, another chunk size, another dtype, another model under the same name."""
    found = about(cluster.findings, f"format.{field}", "healthy", field)
    assert found.level is Level.PROBLEM
    assert str(FORMATS[field][field]) in found.message
    assert found.advice


def test_a_stopped_node(cluster):
    """Both by its silence and by its port, which the kernel still answers."""
    assert about(cluster.findings, "member.heartbeat", "stopped").level is Level.PROBLEM
    assert about(cluster.findings, "peer.stopped", "stopped").level is Level.PROBLEM


def test_a_full_pool(cluster):
    found = about(cluster.findings, "pool.full", "full")
    assert found.level is Level.WARNING
    assert "8 of 8 slots" in found.message


def test_a_wrong_cluster_key(cluster, tmp_path):
    """Seen by the operator, who has the right one: who was turned away; and on that one's machine: why."""
    refused = [one for one in cluster.findings if one.check == "key.refused"]
    assert {one.level for one in refused} == {Level.PROBLEM}
    assert {one.about for one in refused} <= {"127.0.0.1", "unknown"}, "ZMQ tells the address only while it is open"
    assert any("its cluster key is another one" in one.message for one in refused)
    config = {
        "lmcache_instance_id": "stranger",
        "controller_pull_url": f"127.0.0.1:{cluster.controller.pull_port}",
        "controller_reply_url": f"127.0.0.1:{cluster.controller.reply_port}",
    }
    file = tmp_path / "stranger.yaml"
    file.write_text(yaml.safe_dump(config))
    there = ("--config", str(file), "--only", "key", "--only", "peer", "--timeout", "2")
    findings = doctor(cluster.controller.url, *there, **{KEY_VARIABLE: OTHER_KEY_TEXT})
    for url in ("controller_pull_url", "controller_reply_url"):
        found = about(findings, "key.controller", url)
        assert found.level is Level.PROBLEM
        assert "wrong cluster key" in found.message
    assert about(findings, "peer.key", "healthy").level is Level.PROBLEM


def test_what_is_well_is_not_complained_about(cluster):
    """The healthy instance is in no finding but those about formats, where it is the other side."""
    complaints = [one for one in cluster.findings if one.level in {Level.PROBLEM, Level.WARNING}]
    assert not [one for one in complaints if "healthy" in one.about and not one.check.startswith("format.")]
    assert about(cluster.findings, "peer.reachable", "healthy").level is Level.OK


# -- two machines ------------------------------------------------------------------------------------------------------


class Machines(NamedTuple):
    network: net.Network
    controller: Controller
    url: str
    """Of the controller, from the machine `reader`."""


@pytest.fixture(scope="module")
def machines(tmp_path_factory) -> Iterator[Machines]:
    """Two network namespaces, as two machines: on one of them two instances, on the other one and the operator."""
    if (missing := net.unavailable()) is not None:
        pytest.skip(missing)
    folder = tmp_path_factory.mktemp("machines")
    with contextlib.ExitStack() as stack:
        network = net.Network("planted")
        stack.callback(network.close)
        network.open()
        arguments = (*BRISK, "--host", "0.0.0.0", "--insecure")
        controller = stack.enter_context(running_controller(folder, arguments=arguments, env={KEY_VARIABLE: ""}))
        places = {"local": network.holder, "blocked": network.holder, "reader": network.reader}
        actors = [actor(controller, folder, network, name, place) for name, place in places.items()]
        for one in actors:
            stack.callback(one.close)
            one.start(wait=False)
        for one in actors:
            one.started()
        wait_for(lambda: len(controller.instances()) == len(places))
        yield Machines(network, controller, f"http://{net.CONTROLLER_READER}:{controller.port}")


def actor(controller: Controller, folder: Path, network: net.Network, name: str, place: str) -> Actor:
    """An engine in a namespace. `local` advertises loopback, as who has not set an address does."""
    is_reader = place == network.reader
    host = net.READER_DATA if is_reader else net.HOLDER_DATA
    address = net.CONTROLLER_READER if is_reader else net.CONTROLLER_HOLDER
    config = make_config(
        controller,
        name,
        host=host,
        advertise_host="127.0.0.1" if name == "local" else host,
        insecure=True,
        cluster_key=None,
        controller_pull_url=f"tcp://{address}:{controller.pull_port}",
        controller_reply_url=f"tcp://{address}:{controller.reply_port}",
    )
    options = Options(config=config.to_wire().decode(), slots=SLOTS, chunk_bytes=CHUNK_BYTES)
    return Actor(name, options, folder / f"{name}.log", prefix=network.inside(place))


def test_localhost_advertised_to_another_machine_and_a_blocked_port(machines):
    """One look before and one after the packets to the other machine are lost, as a firewall loses them."""
    there = machines.network.inside(machines.network.reader)
    only = ("--only", "peer", "--timeout", "1")
    findings = doctor(machines.url, *only, prefix=there)
    found = about(findings, "address.loopback", "local")
    assert found.level is Level.PROBLEM
    assert "127.0.0.1" in found.message
    assert "advertise_host" in found.advice
    assert about(findings, "peer.reachable", "blocked").level is Level.OK
    machines.network.cut()
    findings = doctor(machines.url, *only, prefix=there)
    found = about(findings, "peer.unreachable", "blocked")
    assert found.level is Level.PROBLEM
    assert "firewall" in found.message
    assert about(findings, "peer.reachable", "reader").level is Level.OK
