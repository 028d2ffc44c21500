"""Both ends of the engine link, in this process, against anything at the other end."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuzz.effort import fuzz
from fuzz.inputs import frames, hostile
from kvmesh.bench.stand_in import make_key, stand_in_format
from kvmesh.config import KVMeshConfig
from kvmesh.core.ledger import SlotLedger
from kvmesh.core.reasons import MissReason
from kvmesh.errors import ConfigError
from kvmesh.node.engine_link import EngineLink
from kvmesh.node.handle import NodeHandle
from kvmesh.node.process import Node
from kvmesh.node.state import NodeState
from kvmesh.transfer.pool import HostPool
from kvmesh.wire import link
from support.stand_ins import make_config

SLOTS, CHUNK_BYTES = 8, 4096
KEY = make_key("a")
TO_ENGINE = [
    link.encode(message)
    for message in (
        link.Visible([KEY], [], reset=False),
        link.Visible([], [KEY], reset=True),
        link.FetchDone(1, [None, MissReason.STALE], 4096, 0.1, ["b"]),
        link.FetchDone(1, [None], 4096, 0.1, ["b"]),
        link.Directory(connected=True, ever_connected=True, peers=3),
        link.Ready("a", "0" * 16, "127.0.0.1", 1, 2),
    )
]
TO_NODE = [
    link.encode(message)
    for message in (
        link.Publish([1, 2], fetched=True),
        link.Retract([3]),
        link.Fetch(1, "r", [KEY], [0], 5.0),
        link.GiveUp(),
        link.RequestRecord(
            request_id="r",
            prompt_tokens=600,
            keys=[KEY, make_key("b")],
            loaded_tokens=256,
            misses=[link.Miss(make_key("b"), MissReason.NOT_PUBLISHED, {"why": "x"})],
            tokens_hash=b"t" * 16,
        ),
    )
]


@pytest.fixture
def memory() -> Iterator[tuple[HostPool, SlotLedger]]:
    pool, ledger = HostPool.create(SLOTS, CHUNK_BYTES), SlotLedger.create(SLOTS, CHUNK_BYTES)
    yield pool, ledger
    pool.close()
    ledger.close()


@given(stream=frames(hostile(get_args(link.ToEngine), TO_ENGINE)))
@fuzz(100)
def test_a_node_that_says_anything(memory: tuple[HostPool, SlotLedger], stream: bytes) -> None:
    """The reading thread comes back to look after the process, and a job that was out ends at most once."""
    pool, ledger = memory
    handle = NodeHandle(KVMeshConfig().to_wire(), stand_in_format(CHUNK_BYTES), ledger, pool.segments)
    ours, theirs = socket.socketpair()
    with contextlib.closing(ours), contextlib.closing(theirs):
        handle._child.connection, handle._state = ours, NodeState(True, False, False, 0)
        handle._jobs.add(1, chunks=1, timeout_s=float("inf"))
        theirs.sendall(stream)
        theirs.shutdown(socket.SHUT_WR)
        handle._read_until_closed()
        handle._jobs.fail_all(MissReason.NODE_DOWN)  # as `_watch` does when the process is dead
        (finished,) = handle.take_finished()
        assert (finished.job_id, len(finished.reasons)) == (1, 1)
        assert not handle.has_jobs()
        assert all(isinstance(key, bytes) and 8 <= len(key) <= 40 for key in handle._visible)


@given(stream=frames(hostile(get_args(link.ToNode), TO_NODE)))
@fuzz(60)
async def test_an_engine_that_says_anything(memory: tuple[HostPool, SlotLedger], stream: bytes) -> None:
    """Reading ends without an exception, every fetch that was accepted ends, and the node's books are in order."""
    pool, ledger = memory
    with socket.socket() as unused:
        engine_link = EngineLink(unused)
        node = Node(make_config(None, "me"), stand_in_format(CHUNK_BYTES), pool, ledger, engine_link)
        engine_link._node = node
        reader = asyncio.StreamReader()
        reader.feed_data(stream)
        reader.feed_eof()
        try:
            await engine_link._read(reader)
            while engine_link._jobs or engine_link._others:
                await asyncio.wait({*engine_link._jobs, *engine_link._others})
            assert not node.fetcher._giving_up
            assert set(node.inventory._keys) <= set(range(SLOTS))
        finally:
            node.close()


@given(payload=hostile([link.Start], [link.encode(link.Start(b"{}", stand_in_format(1), 0, (), 1))]))
@fuzz(60)
async def test_a_start_that_is_anything(payload: bytes) -> None:
    """Refused, or a Start whose numbers are numbers. What they name is the business of the engine that starts us."""
    with contextlib.suppress(ValueError, RecursionError):
        message = link.to_node_decoder.decode(payload)
        if isinstance(message, link.Start):
            for segment in message.segments:
                assert isinstance(segment.fd, int)
            assert 0 <= message.peer_port <= 65535


@given(data=st.binary(max_size=300))
@fuzz(100)
def test_a_configuration_over_the_link(data: bytes) -> None:
    """ConfigError, which the node reports to its engine."""
    with contextlib.suppress(ConfigError):
        KVMeshConfig.from_wire(data)
