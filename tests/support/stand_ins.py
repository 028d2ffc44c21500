"""A controller process and stand-in engines with real node processes, for the process tests."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from kvmesh.bench.cluster import Controller, wait_healthy
from kvmesh.bench.stand_in import StandInEngine
from kvmesh.config import KVMeshConfig
from kvmesh.core.format import Format
from support.keys import environment_key

CHUNK_BYTES = 64 * 1024


@contextlib.contextmanager
def running_controller(folder: Path, **options: object) -> Iterator[Controller]:
    """A controller process on free ports; stopped at the end. Options as of `Controller`."""
    controller = Controller(folder, **options)  # type: ignore[arg-type]
    controller.start()
    try:
        wait_healthy(controller, timeout_s=60)
        yield controller
    finally:
        controller.stop()


def make_config(controller: Controller | None, instance_id: str, **changed: object) -> KVMeshConfig:
    """A quick configuration on loopback: short heartbeats and time-outs."""
    fields: dict[str, object] = {
        "instance_id": instance_id,
        "host": "127.0.0.1",
        "transfer_channel": "tcp",
        "stall_timeout_s": 1.0,
        "cluster_key": environment_key(),
    }
    if controller is not None:
        fields |= {
            "enable_controller": True,
            "controller_pull_url": f"tcp://127.0.0.1:{controller.pull_port}",
            "controller_reply_url": f"tcp://127.0.0.1:{controller.reply_port}",
        }
    return KVMeshConfig(**(fields | changed))  # type: ignore[arg-type]


@contextlib.contextmanager
def running_engine(
    config: KVMeshConfig, *, slots: int = 64, chunk_bytes: int = CHUNK_BYTES, kv_format: Format | None = None
) -> Iterator[StandInEngine]:
    """A stand-in engine with its node process; both end with the block."""
    engine = StandInEngine(config, slots=slots, chunk_bytes=chunk_bytes, kv_format=kv_format)
    try:
        engine.start()
        yield engine
    finally:
        engine.close()
