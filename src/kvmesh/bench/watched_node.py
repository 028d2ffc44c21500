"""A node process that also measures how late its event loop is. `python -m kvmesh.bench.watched_node` in the place of
`kvmesh.node`; the latenesses go into the file that LAG_VARIABLE names when the node ends.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections import deque
from pathlib import Path

import msgspec

from kvmesh.config import KVMeshConfig
from kvmesh.core.format import Format
from kvmesh.core.ledger import SlotLedger
from kvmesh.node import __main__ as node_main
from kvmesh.node.engine_link import EngineLink
from kvmesh.node.handle import NodeHandle
from kvmesh.transfer.pool import HostPool

LAG_VARIABLE = "NODE_LAG_FILE"
SAMPLE_S = 0.005
MAX_SAMPLES = 100_000


class WatchedHandle(NodeHandle):
    """Starts such a node, whose latenesses go into `lag_path`."""

    def __init__(
        self, config: KVMeshConfig, kv_format: Format, ledger: SlotLedger, pool: HostPool, lag_path: Path
    ) -> None:
        super().__init__(config.to_wire(), kv_format, ledger, pool.segments, log_level=config.log_level)
        self._lag_path = lag_path

    def _command(self, link_fd: int) -> list[str]:
        command = [__name__ if part == "kvmesh.node" else part for part in super()._command(link_fd)]
        return ["env", f"{LAG_VARIABLE}={self._lag_path}", *command]


_lags: deque[float] = deque(maxlen=MAX_SAMPLES)


class _WatchedLink(EngineLink):
    async def serve(self) -> int:
        watching = asyncio.create_task(_watch())
        try:
            return await super().serve()
        finally:
            watching.cancel()


async def _watch() -> None:
    loop = asyncio.get_running_loop()
    while True:
        due_s = loop.time() + SAMPLE_S
        await asyncio.sleep(SAMPLE_S)
        _lags.append(max(0.0, loop.time() - due_s))


def main() -> int:
    """Serve as a node does, then write down how late its loop was; returns the exit status."""
    vars(node_main)["EngineLink"] = _WatchedLink
    status = node_main.main()
    Path(os.environ[LAG_VARIABLE]).write_bytes(msgspec.json.encode(list(_lags)))
    return status


if __name__ == "__main__":
    sys.exit(main())
