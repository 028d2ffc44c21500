"""A link so slow that computing is faster: the gate refuses it, and `kvmesh explain` and `doctor` say so with both
predicted times.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from kvmesh.bench.cluster import free_ports
from kvmesh.bench.stand_in import make_key
from kvmesh.wire import link
from process.controller_nodes import wait_for
from support.stand_ins import make_config, running_controller, running_engine

gate = pytest.importorskip("kvmesh.core.gate", reason="no gate in this version")
pytest.importorskip("kvmesh.core.advice", reason="no explanations in this version")

pytestmark = [pytest.mark.process, pytest.mark.timeout(120)]

HOLDER, PROXY = "127.0.0.2", "127.0.0.3"
LINK_BYTES_PER_S = 1_000_000
CHUNK_PREFILL_S = 0.001
"""An engine that computes a chunk in a millisecond, while the link takes 65 for it."""
KEYS = [make_key(f"far away {number}") for number in range(8)]


@contextlib.contextmanager
def slow_link(port: int) -> Iterator[None]:
    """Passes connections to PROXY on to HOLDER; what comes back comes slowly."""
    closing = threading.Event()

    def serve(client: socket.socket) -> None:
        with client, contextlib.suppress(OSError), socket.create_connection((HOLDER, port), 5) as holder:
            others = {client: holder, holder: client}
            while not closing.is_set():
                for readable in select.select(list(others), [], [], 0.2)[0]:
                    data = readable.recv(16_384)
                    if not data:
                        return
                    if readable is holder:
                        time.sleep(len(data) / LINK_BYTES_PER_S)
                    others[readable].sendall(data)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    with socket.create_server((PROXY, port)) as listener:
        acceptor = threading.Thread(target=accept, daemon=True)
        acceptor.start()
        try:
            yield
        finally:
            closing.set()
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            acceptor.join(5)


def run_json(*arguments: str) -> dict:
    command = [sys.executable, "-m", "kvmesh.cli", *arguments, "--json"]
    done = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, timeout=60, check=False)
    return json.loads(done.stdout) if done.stdout else {}


def test_a_gate_that_refuses_a_slow_link(tmp_path):
    (port,) = free_ports(1)
    with (
        running_controller(tmp_path) as controller,
        slow_link(port),
        running_engine(make_config(controller, "holder", host=HOLDER, advertise_host=PROXY, peer_port=port)) as holder,
        running_engine(make_config(controller, "reader")) as reader,
    ):
        holder.put(KEYS)
        assert reader.wait_visible(KEYS)
        assert reader.get(KEYS[:4]).fetched == 4, "what has not been measured is allowed"
        wait_for(lambda: reader.node.fastest() and reader.node.fastest().rate)
        saved = gate.Saved(fixed_s=0.0, chunk_s=CHUNK_PREFILL_S)
        wanted = KEYS[4:]
        reader.node.fetch(1000, "cmpl-slow", wanted, [reader._allocate() for _ in wanted], 5.0, saved)
        (finished,) = wait_for(reader.node.take_finished)
        assert {reason.value for reason in finished.reasons} == {"gate_refused"}
        assert finished.gate is not None
        detail = {"fetch_s": finished.gate.fetch_s, "prefill_s": finished.gate.prefill_s}
        assert detail["fetch_s"] > detail["prefill_s"]
        tokens = len(wanted) * reader.format.chunk_tokens
        misses = [link.Miss(wanted[0], finished.reasons[0], detail)]
        reader.node.record(
            link.RequestRecord(request_id="cmpl-slow", prompt_tokens=tokens, keys=list(wanted), misses=misses)
        )
        found = wait_for(lambda: run_json("explain", "cmpl-slow", "--controller", controller.url))
        cause = found["explanations"][0]["causes"][0]
        assert cause["reason"] == "gate_refused"
        assert cause["detail"].items() >= detail.items(), "both predicted times"
        assert cause["change"]
        doctor = run_json("doctor", "--only", "misses", "--controller", controller.url)
        (refused,) = (one for one in doctor["findings"] if one["check"] == "misses.gate_refused")
        assert refused["level"] == "warning"
        assert refused["advice"]
