"""What int8 does to the numbers in chunks of a real engine, fetched from it as another node would."""

from __future__ import annotations

import time

import httpx
import numpy as np

from kvmesh.bench.cluster import Controller
from kvmesh.core.format import Format, elements_of
from kvmesh.core.keys import ChunkKey
from kvmesh.errors import StartupError
from kvmesh.transfer.base import Deadline, FetchItem
from kvmesh.transfer.codec import Codec, Int8Codec, blocks
from kvmesh.transfer.link import PeerTarget
from kvmesh.transfer.pool import HostPool
from kvmesh.transfer.tcp import TcpTransport
from kvmesh.wire.peer import Hello

_PATIENCE_S = 30.0


def int8_error(controller: Controller, text: str, head_size: int) -> float:
    """The root of the mean square error of int8 over that of the numbers themselves, in the chunks of a prompt that an
    instance holds. Raises StartupError when they cannot be had.
    """
    asked = httpx.post(f"{controller.url}/api/v1/lookup", json={"text": text}, timeout=_PATIENCE_S).raise_for_status()
    found = asked.json()["formats"][0]
    held = [chunk for chunk in found["chunks"] if chunk["holders"]]
    holder = next(one for one in controller.instances() if held and one["instance_id"] in held[0]["holders"])
    view = holder["format"]
    assert isinstance(view, dict)
    kv_format = Format(**view["fields"])
    host, _, port = str(holder["peer_address"]).rpartition(":")
    pool = HostPool.create(len(held), kv_format.chunk_bytes)
    transport = TcpTransport(PeerTarget("", "", host, int(port)), Hello.of("bench", "0" * 16, kv_format), pool)
    try:
        items = [FetchItem(ChunkKey(bytes.fromhex(chunk["key"])), slot) for slot, chunk in enumerate(held)]
        outcomes = transport.fetch(items, Deadline(time.monotonic() + _PATIENCE_S, _PATIENCE_S))
        if any(outcome.reason for outcome in outcomes):
            raise StartupError("chunks of the engine", found=transport.statistics().last_error or "not there any more")
        codec = Int8Codec(elements_of(kv_format).dtype, head_size)
        different, whole = np.sum([_errors(pool.row(slot), codec) for slot in range(pool.slots)], axis=0)
        return float(np.sqrt(different / whole))
    finally:
        transport.close()
        pool.close()


def _errors(row: memoryview, codec: Codec) -> tuple[float, float]:
    """Squares of the differences, and of the numbers; of bfloat16."""
    different = whole = 0.0
    for block in blocks(row, codec.block_bytes):
        restored = memoryview(bytearray(len(block)))
        coded = codec.encode(block)
        if coded is None:
            continue
        codec.decode(memoryview(coded), restored)
        before, after = (
            (np.frombuffer(part, np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
            for part in (block, restored)
        )
        different += float(np.square(after - before).sum(dtype=np.float64))
        whole += float(np.square(before).sum(dtype=np.float64))
    return different, whole
