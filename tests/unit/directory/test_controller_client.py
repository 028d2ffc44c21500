"""A node's connection to the controller, against sockets that answer as the test says."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator

import pytest
import zmq
import zmq.asyncio

from kvmesh.bench.cluster import free_ports
from kvmesh.core.keys import ChunkKey
from kvmesh.directory.controller_client import ControllerClient
from kvmesh.directory.outbox import Outbox
from kvmesh.wire import directory as wire
from unit.controller.makers import make_keys, make_member

KEYS = [ChunkKey(key) for key in make_keys(3)]
INTERVAL_S = 0.5


class Node:
    """Listener and inventory of a node that holds three chunks."""

    def __init__(self) -> None:
        self.up: list[str] = []

    def on_connection(self, connected: bool) -> None: ...

    def on_member_up(self, member: wire.Member) -> None:
        self.up.append(member.instance_id)

    def statistics(self) -> wire.NodeStatistics:
        return wire.NodeStatistics()

    def take_use_report(self, *, whole: bool) -> None:
        del whole

    def take_changes(self, limit: int) -> tuple[list[ChunkKey], list[ChunkKey]]:
        del limit
        return [], []

    def keys(self) -> list[ChunkKey]:
        return KEYS


class Controller:
    """The sockets of one. That for events is bound when the test says so."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.member = make_member("a")
        self.context = zmq.asyncio.Context()
        self.reply = self.context.socket(zmq.ROUTER)
        port = self.reply.bind_to_random_port("tcp://127.0.0.1")
        self._pull_url = f"tcp://127.0.0.1:{free_ports(1)[0]}"
        self.peer = b""
        self.client = ControllerClient(
            pull_url=self._pull_url,
            reply_url=f"tcp://127.0.0.1:{port}",
            heartbeat_url=None,
            heartbeat_interval_s=INTERVAL_S,
            listener=node,  # type: ignore[arg-type] # as much of it as is needed here
            outbox=Outbox("a", self.member.incarnation, node),  # type: ignore[arg-type]
        )

    def bind_pull(self) -> zmq.asyncio.Socket:
        pull = self.context.socket(zmq.PULL)
        pull.bind(self._pull_url)
        return pull

    async def hear(self) -> wire.Request:
        self.peer, frame = await self.reply.recv_multipart()
        return wire.request_decoder.decode(frame)

    async def tell(self, notice: wire.Notice) -> None:
        await self.reply.send_multipart([self.peer, wire.encode(notice)])

    async def welcome(self) -> None:
        assert isinstance(await self.hear(), wire.Register)
        await self.tell(wire.Registered(secrets.token_hex(8), INTERVAL_S, 30.0, [], 1))


@pytest.fixture
async def controller() -> AsyncIterator[Controller]:
    made = Controller(Node())
    running = asyncio.create_task(made.client.run(made.member))
    yield made
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    made.context.destroy(linger=0)


async def test_an_inventory_that_no_connection_took_is_sent_when_there_is_one(controller):
    """The sockets of a restarted controller are found one by one; nobody need ask for what came too early."""
    await controller.welcome()
    assert isinstance(await controller.hear(), wire.Heartbeat)
    assert controller.client.dropped_frames
    snapshot = wire.event_decoder.decode(await asyncio.wait_for(controller.bind_pull().recv(), 30))
    assert isinstance(snapshot, wire.Snapshot)
    assert (snapshot.keys, snapshot.first, snapshot.last) == (KEYS, True, True)


async def test_all_newcomers_of_one_frame_are_heard(controller):
    await controller.welcome()
    await controller.tell(wire.MembersUp([make_member("b"), controller.member, make_member("c")]))
    while len(controller.node.up) < 2:
        await asyncio.sleep(0.01)
    assert controller.node.up == ["b", "c"], "and not itself"


async def test_who_waits_for_an_answer_asks_less_and_less_often(controller, monkeypatch):
    """Down to once per heartbeat interval: a controller that is behind is not asked for more the later it is."""
    pauses: list[float] = []
    real = asyncio.sleep

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)
        await real(0)

    for _ in range(2):
        assert isinstance(await controller.hear(), wire.Register)
    monkeypatch.setattr("kvmesh.directory.controller_client.asyncio.sleep", sleep)
    while len(pauses) < 3:
        await real(0.01)
    assert pauses[:3] == [INTERVAL_S] * 3
