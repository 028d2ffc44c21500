"""The node's end of the link against engines that stop and lie."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator
from typing import NamedTuple

import pytest

from kvmesh.bench.stand_in import make_key, stand_in_format
from kvmesh.core.ledger import SlotLedger
from kvmesh.core.reasons import MissReason
from kvmesh.node import engine_link as engine_link_module
from kvmesh.node.engine_link import EngineLink
from kvmesh.transfer.pool import HostPool
from kvmesh.wire import directory, link
from kvmesh.wire.framing import pack_frame, read_frame
from support.stand_ins import make_config
from unit.controller.makers import make_member

SLOTS, CHUNK_BYTES = 8, 4096
KEY = make_key("a")


class Engine(NamedTuple):
    """The test's end of a link, and the node at the other one."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    node: EngineLink
    serving: asyncio.Task[int]

    def say(self, *messages: link.Message) -> None:
        self.writer.write(b"".join(pack_frame(link.encode(message)) for message in messages))

    async def hear(self, kind: type | tuple[type, ...]) -> link.Message:
        while True:
            frame = await asyncio.wait_for(read_frame(self.reader, link.MAX_FRAME_BYTES), 20)
            assert frame is not None, "the node has ended"
            message = link.to_engine_decoder.decode(frame)
            if isinstance(message, kind):
                return message


@contextlib.asynccontextmanager
async def connected() -> AsyncIterator[tuple[Engine, link.Start]]:
    pool, ledger = HostPool.create(SLOTS, CHUNK_BYTES), SlotLedger.create(SLOTS, CHUNK_BYTES)
    ours, theirs = socket.socketpair()
    node = EngineLink(theirs)
    serving = asyncio.create_task(node.serve())
    reader, writer = await asyncio.open_unix_connection(sock=ours)
    start = link.Start(
        config=make_config(None, "me").to_wire(),
        format=stand_in_format(CHUNK_BYTES),
        ledger_fd=os.dup(ledger.fd),
        segments=tuple(link.Segment(os.dup(each.fd), each.offset_bytes, each.length_bytes) for each in pool.segments),
        engine_pid=os.getppid(),  # the node ends when its parent is another one
    )
    try:
        yield Engine(reader, writer, node, serving), start
    finally:
        writer.close()
        await asyncio.wait_for(serving, 20)
        pool.close()
        ledger.close()


@pytest.fixture
async def engine() -> AsyncIterator[Engine]:
    async with connected() as (made, start):
        made.say(start)
        await made.hear(link.Ready)
        yield made


async def test_giving_up_twice_at_once_ends(engine: Engine) -> None:
    """Neither waits for the other, and fetches are taken again afterwards."""
    engine.say(link.GiveUp(), link.GiveUp(), link.GiveUp())
    for job_id in range(100):
        engine.say(link.Fetch(job_id, "r", [KEY], [0], 5.0))
        done = await engine.hear(link.FetchDone)
        if done.reasons != [MissReason.DRAINING]:
            assert done.reasons == [MissReason.NOT_PUBLISHED]
            return
    pytest.fail("the node gives up for ever")


async def test_what_an_engine_has_measured_does_not_spoil_the_nodes_heartbeats(engine: Engine) -> None:
    """A slope that noise has made nearly nothing is no reason for a controller to refuse them, and forget the node."""
    assert engine.node._node is not None
    engine.say(link.Fetch(1, "r", [KEY], [0], 5.0, link.SavedPrefill(0.0, 1e-12, 0.0)))
    await engine.hear(link.FetchDone)
    node = engine.node._node
    beat = directory.Heartbeat(node.instance_id, node.incarnation, 0, node.statistics())
    assert directory.request_decoder.decode(directory.encode(beat)) == beat


LIES = {
    "no msgpack": b"\xc1",
    "nested too deep": b"\x92\xa6GiveUp" + b"\x91" * 20_000 + b"\x90",
    "wrong direction": link.encode(link.Directory(connected=True, ever_connected=True, peers=1)),
    "a slot outside": link.encode(link.Publish([SLOTS], fetched=False)),
    "a huge slot": link.encode(link.Retract([2**63])),
    "a negative slot": link.encode(link.Retract([-1])),
    "fetch outside": link.encode(link.Fetch(1, "r", [KEY], [SLOTS], 1.0)),
    "more slots than keys": link.encode(link.Fetch(1, "r", [KEY], [0, 1], 1.0)),
    "one slot twice": link.encode(link.Fetch(1, "r", [KEY, make_key("b")], [0, 0], 1.0)),
    "a long key": link.encode(link.Fetch(1, "r", [b"x" * 41], [0], 1.0)),
    "a deadline that is no number": link.encode(link.Fetch(1, "r", [KEY], [0], float("nan"))),
    "an endless deadline": link.encode(link.Fetch(1, "r", [KEY], [0], float("inf"))),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
async def test_an_engine_that_lies_has_no_node_any_more(engine: Engine, lie: bytes) -> None:
    """One logged reason and an orderly end: the process that started it decides what comes next."""
    engine.writer.write(pack_frame(lie))
    assert await asyncio.wait_for(engine.serving, 20) == 0


@pytest.mark.parametrize("lie", [b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x09\0\0\0half"])
async def test_what_is_no_frame_ends_the_node(engine: Engine, lie: bytes) -> None:
    engine.writer.write(lie)
    engine.writer.write_eof()
    assert await asyncio.wait_for(engine.serving, 20) == 0


async def test_what_is_no_start_ends_the_node() -> None:
    for frame in (b"\xc1", b"\x91" * 20_000, link.encode(link.GiveUp())):
        async with connected() as (engine, _):
            engine.writer.write(pack_frame(frame))
            assert await asyncio.wait_for(engine.serving, 20) == 2


@pytest.mark.parametrize(
    "changed",
    [
        {"ledger_fd": -1},
        {"ledger_fd": 10**6},
        {"ledger_fd": 2**70 % 2**63},
        {"segments": ()},
        {"segments": (link.Segment(-1, 0, SLOTS * CHUNK_BYTES),)},
        {"segments": (link.Segment(0, -(2**62), SLOTS * CHUNK_BYTES),)},
        {"segments": (link.Segment(0, 0, 2**62),)},
        {"config": b"{"},
        {"config": b'{"peer_port": -1}'},
    ],
)
async def test_a_start_that_cannot_be_is_told_in_words(changed: dict[str, object]) -> None:
    async with connected() as (engine, start):
        with open("/dev/null", "rb") as other:  # noqa: PTH123, ASYNC230
            if "segments" in changed and changed["segments"] and changed["segments"][0].fd == 0:
                changed = {"segments": (changed["segments"][0]._replace(fd=os.dup(other.fileno())),)}
            fields = {name: getattr(start, name) for name in start.__struct_fields__}
            engine.say(link.Start(**(fields | changed)))
            failed = await engine.hear(link.Failed)
        assert failed.text
        assert await asyncio.wait_for(engine.serving, 20) == 1


async def test_an_engine_that_stops_costs_bounded_memory_and_then_knows_everything(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Changes are dropped beyond a limit; when it reads again it gets the whole set and the state."""
    monkeypatch.setattr(engine_link_module, "MAX_UNSENT_BYTES", 200_000)
    assert engine.node._writer is not None
    assert engine.node._node is not None
    transport, node = engine.node._writer.transport, engine.node._node
    transport.set_write_buffer_limits(high=200_000)
    member = make_member("other", format=stand_in_format(CHUNK_BYTES))
    node.on_member_up(member)
    node.on_snapshot(directory.Snapshot("other", member.incarnation, 0, [], first=True, last=True))
    known: list[bytes] = []
    for sequence in range(1, 501):
        added = [make_key(f"{sequence}-{number}") for number in range(100)]
        removed, known = known, added
        node.on_changes(directory.Changes("other", member.incarnation, sequence, added, removed))
        node.on_connection(connected=sequence % 2 == 0)
        assert transport.get_write_buffer_size() < 300_000
    visible: set[bytes] = set()
    connections: list[bool] = []
    while visible != set(node.replica.keys()) or not connections or not connections[-1]:
        message = await engine.hear((link.Visible, link.Directory))  # type: ignore[arg-type]
        if isinstance(message, link.Directory):
            connections.append(message.connected)
            continue
        if message.reset:
            visible.clear()
        visible -= set(message.vanished)
        visible |= set(message.appeared)
    assert visible == set(known)
    node.on_changes(directory.Changes("other", member.incarnation, 501, [KEY], []))
    assert (await engine.hear(link.Visible)).appeared == [KEY], "and it is told of changes again"


async def test_a_set_that_is_larger_than_what_may_wait_is_told_once(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However much others hold: changes that come while an engine reads the whole set do not make it begin again."""
    assert engine.node._writer is not None
    assert engine.node._node is not None
    node, member = engine.node._node, make_member("other", format=stand_in_format(CHUNK_BYTES))
    node.on_member_up(member)
    keys = [make_key(str(number)) for number in range(50_000)]  # 1.9 MB, more than a socket takes at once
    monkeypatch.setattr(engine_link_module, "MAX_UNSENT_BYTES", 400_000)
    monkeypatch.setattr(engine_link_module, "VISIBLE_BATCH", 1_000)
    transport = engine.node._writer.transport
    transport.set_write_buffer_limits(high=50_000)
    node.on_snapshot(directory.Snapshot("other", member.incarnation, 0, keys, first=True, last=True))
    resets, visible, sequence = 0, set[bytes](), 0
    message = link.Visible([], [], reset=False)
    while not resets or not visible.issuperset(keys) or [KEY] not in (message.appeared, message.vanished):
        sequence += 1  # the cluster is busy: a change with each word that the engine reads
        added, removed = ([KEY], []) if sequence % 2 else ([], [KEY])
        node.on_changes(directory.Changes("other", member.incarnation, sequence, added, removed))
        heard = await engine.hear(link.Visible)
        assert isinstance(heard, link.Visible)
        message = heard
        resets += message.reset
        assert resets <= 1, "the whole set is told again and again"
        assert not resets or transport.get_write_buffer_size() < 200_000, "the end of a fetch would wait for all of it"
        if message.reset:
            visible.clear()
        visible |= set(message.appeared)


async def test_the_result_of_a_fetch_comes_before_what_it_has_taught(engine: Engine) -> None:
    """A request waits for the one; rates, logs and reports can wait for it."""
    engine.say(link.Fetch(1, "r", [KEY], [0], 5.0))
    first = await engine.hear((link.FetchDone, link.Rates))
    assert isinstance(first, link.FetchDone)
    await engine.hear(link.Rates)
