"""Start-up is strict: what cannot work ends the start with one clear message, and a wrong model at the peer is named
everywhere.
"""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

from kvmesh.bench.cluster import HOST, Controller, complete, instance_config, metric, tail, wait_healthy
from kvmesh.models import TINY, make_tiny_llama
from support.prefork import PreforkedInstance
from support.servers import token_prompt

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


def test_bad_configuration_and_busy_port_end_the_start(tmp_path: Path) -> None:
    """A misspelt key, a chunk size that vLLM's blocks do not divide, and a taken port each end the engine with a
    message that names them.
    """
    model = make_tiny_llama(shape=TINY)
    controller = Controller(tmp_path)  # never started: a missing controller is no reason not to serve
    taken = socket.create_server((HOST, 0))
    port = taken.getsockname()[1]
    small = {"max_local_cpu_size": 0.1}
    cases = {
        "misspelt": (instance_config(1, controller, chunk_sise=256, **small), ["chunk_sise", "chunk_size"]),
        "uneven": (instance_config(2, controller, chunk_size=200, **small), ["chunk_tokens", "200", "multiple"]),
        "busy": (instance_config(3, controller, **small) | {"p2p_init_ports": port}, [str(port), "in use"]),
    }
    instances = {
        name: PreforkedInstance(name, model, tmp_path, config, core=number, max_model_len=2048)
        for number, (name, (config, _)) in enumerate(cases.items())
    }
    try:
        for instance in instances.values():
            instance.start()
        for name, instance in instances.items():
            assert instance.popen is not None
            assert instance.popen.wait(timeout=500) != 0
            log = instance.log()
            for word in cases[name][1]:
                assert word in log, f"{name}: {word!r} is not in the log\n{tail(log)}"
    finally:
        for instance in instances.values():
            instance.stop()
        taken.close()


def test_another_model_at_the_peer_is_refused_by_name(tmp_path: Path) -> None:
    """Two instances of different weights under the same served name: nothing is shared, and logs and API name the
    field.
    """
    controller = Controller(tmp_path)
    models = [make_tiny_llama(tmp_path / f"seed{seed}" / "tiny", seed=seed, shape=TINY) for seed in (0, 1)]
    controller.start()
    instances = [
        PreforkedInstance(
            f"instance-{number}",
            model,
            tmp_path,
            instance_config(number, controller, max_local_cpu_size=0.1),
            core=number,
            max_model_len=4096,
        )
        for number, model in enumerate(models, start=1)
    ]
    try:
        for instance in instances:
            instance.start()
        wait_healthy(controller, *instances)
        prompt = token_prompt(1100, 1)
        for instance in instances:
            complete(instance.url, prompt)
        for instance in instances:
            assert metric(instance.url, "kvmesh_fetched_chunks_total") == 0
            assert metric(instance.url, "kvmesh_lookup_chunks_total", reason="no_peers") >= 1
            until_s = time.monotonic() + 20
            while "formats differ in model_weights" not in instance.log():
                assert time.monotonic() < until_s, tail(instance.log())
                time.sleep(0.1)
        listed = controller.instances()
        assert len(listed) == 2
        for one in listed:
            assert "model_weights" in str(one["incompatible_with"])
    finally:
        for instance in instances:
            instance.stop()
        controller.stop()
