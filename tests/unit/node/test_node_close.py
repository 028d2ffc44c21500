"""The end of a node while somebody waits for its answer."""

from __future__ import annotations

import asyncio
import time

from kvmesh.bench.stand_in import stand_in_format
from kvmesh.core.ledger import SlotLedger
from kvmesh.errors import KVMeshError
from kvmesh.node.process import Node
from kvmesh.transfer.base import Deadline
from kvmesh.transfer.link import PeerLink, PeerTarget
from kvmesh.transfer.pool import HostPool
from kvmesh.wire import control
from kvmesh.wire.peer import Answered, Ask, Hello
from support.keys import environment_security
from support.stand_ins import make_config

SLOTS, CHUNK_BYTES = 8, 4096


async def test_a_question_that_is_out_does_not_hold_up_the_end() -> None:
    """`close` runs on the loop that the answer would come from, and waits for the thread that waits for the answer."""
    kv_format = stand_in_format(CHUNK_BYTES)
    pool, ledger = HostPool.create(SLOTS, CHUNK_BYTES), SlotLedger.create(SLOTS, CHUNK_BYTES)
    node = Node(make_config(None, "me"), kv_format, pool, ledger)
    asked = asyncio.Event()

    async def never(_: control.Ping) -> control.Pong:
        asked.set()
        await asyncio.Event().wait()
        raise AssertionError

    node.control.add(control.Ping, never)
    member = node.start()
    running = asyncio.create_task(node.run(member))

    def ask() -> Answered | None:
        deadline = Deadline(time.monotonic() + 50, 50)
        ours = Hello.of("asking", "0" * 16, kv_format)
        try:
            link = PeerLink.dial(PeerTarget.of(member), ours, deadline, environment_security())
            try:
                return link.request(Ask(control.encode_question(control.Ping()), 50.0), Answered, deadline)
            finally:
                link.close()
        except KVMeshError:
            return None

    asking = asyncio.create_task(asyncio.to_thread(ask))
    await asyncio.wait_for(asked.wait(), 20)
    started_s = time.monotonic()
    node.close()
    assert time.monotonic() - started_s < 20, "and not until the question's time is up"
    answer = await asyncio.wait_for(asking, 20)
    assert answer is None or answer.error is not None
    running.cancel()
    await asyncio.wait((running,))
    pool.close()
    ledger.close()
