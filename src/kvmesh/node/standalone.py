"""`kvmesh node`: a node over a pool of its own, without an engine."""

from __future__ import annotations

import asyncio
import logging
import signal

from kvmesh.bench.stand_in import content, make_key, stand_in_format
from kvmesh.config import KVMeshConfig
from kvmesh.core.ledger import SlotLedger
from kvmesh.logs import configure_logging
from kvmesh.node.process import Node
from kvmesh.transfer.pool import HostPool

log = logging.getLogger("kvmesh.node")


def run_standalone(config: KVMeshConfig, *, slots: int, chunk_bytes: int, fill: int = 0) -> None:
    """Serve until SIGINT or SIGTERM. The first `fill` slots (at most all) hold chunks whose bytes follow from their
    keys.

    Raises StartupError when a port is taken.
    """
    configure_logging(config.log_level, process="node")
    for warning in config.warnings:
        log.warning("%s", warning)
    pool = HostPool.create(slots, chunk_bytes)
    ledger = SlotLedger.create(slots, chunk_bytes)
    for slot in range(min(fill, slots)):
        key = make_key(f"fill-{slot}")
        pool.row(slot)[:] = content(key, chunk_bytes)
        ledger.publish(slot, key)
    asyncio.run(_serve(Node(config, stand_in_format(chunk_bytes), pool, ledger)))


async def _serve(node: Node) -> None:
    member = node.start()
    serving = asyncio.create_task(node.run(member))
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, serving.cancel)
    try:
        await serving
    except asyncio.CancelledError:
        log.info("node ends")
    finally:
        node.close()
