"""Feed, API and health in this process, over real sockets on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import time

import httpx
import msgspec
import pytest
import zmq
import zmq.asyncio

from kvmesh.config import make_controller_config
from kvmesh.controller import feed as feed_module
from kvmesh.controller.api import Context, create_app
from kvmesh.controller.feed import Feed
from kvmesh.controller.instances import Send
from kvmesh.controller.registry import Registry
from kvmesh.controller.sockets import open_sockets
from kvmesh.errors import StartupError
from kvmesh.wire import directory as wire
from unit.controller.makers import make_keys, make_member


@contextlib.asynccontextmanager
async def running_feed():
    config = make_controller_config(host="127.0.0.1", port=0, monitor_ports='{"pull": 0, "reply": 0, "heartbeat": 0}')
    sockets = open_sockets(config)
    registry = Registry(incarnation="c" * 16, heartbeat_interval_s=2.0, instance_timeout_s=7.0)
    feed = Feed(registry, sockets)
    feed.start()
    context = zmq.asyncio.Context()
    try:
        dealer = context.socket(zmq.DEALER)
        dealer.connect(f"tcp://127.0.0.1:{sockets.reply_port}")
        yield feed, registry, dealer
    finally:
        context.destroy(linger=0)
        await feed.stop()
        sockets.close()


async def ask(dealer, message: wire.Message) -> wire.Notice:
    await dealer.send(wire.encode(message))
    return wire.notice_decoder.decode(await dealer.recv())


async def get(feed: Feed, registry: Registry, path: str) -> httpx.Response:
    transport = httpx.ASGITransport(create_app(Context(registry, feed)))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.get(path)


async def test_error_of_ours_costs_one_message(monkeypatch, caplog):
    """A bug that one message meets is logged and counted; the next message is handled."""
    async with running_feed() as (feed, registry, dealer):
        with monkeypatch.context() as patch:
            patch.setattr(registry, "on_request", lambda *_: 1 / 0)
            await dealer.send(wire.encode(wire.Register(make_member("a"))))
            while not feed.statistics().handler_errors:
                await asyncio.sleep(0)
        assert isinstance(await ask(dealer, wire.Register(make_member("a"))), wire.Registered)
        assert "event=handler_error" in caplog.text
        assert feed.problems() == []


@pytest.mark.parametrize("task", ["intake_reply", "intake_heartbeat", "intake_pull", "ticker", "snapshots"])
async def test_dead_task_makes_the_controller_unhealthy(task):
    """/healthz answers 503 and names the part, so that whoever watches restarts the process."""
    async with running_feed() as (feed, registry, _):
        assert (await get(feed, registry, "/healthz")).status_code == 200
        feed._tasks[task].cancel()
        await asyncio.wait([feed._tasks[task]])
        answer = await get(feed, registry, "/healthz")
        assert answer.status_code == 503
        assert answer.json()["status"] == "unhealthy"
        assert task in answer.json()["problems"][0]


async def test_answers_over_a_closed_connection_end_nothing():
    """A member whose connection is gone is found out by the next send, and is told to register again."""
    async with running_feed() as (feed, registry, dealer):
        member = make_member("a")
        await ask(dealer, wire.Register(member))
        other = dealer.context.socket(zmq.DEALER)
        other.connect(dealer.getsockopt_string(zmq.LAST_ENDPOINT))
        dealer.close(linger=0)
        newcomer = make_member("b")
        while not registry.instances["a"].downstream.lost:
            # Each round another port, so that "a" has to be told.
            newcomer = msgspec.structs.replace(newcomer, peer_port=newcomer.peer_port + 1)
            await ask(other, wire.Register(newcomer))
        ack = await ask(other, wire.Heartbeat("a", member.incarnation, 0, wire.NodeStatistics()))
        assert ack == wire.HeartbeatAck("c" * 16, known=False)
        assert feed.statistics().send_failures == {"gone": 1}
        other.close(linger=0)


async def test_members_that_come_together_share_one_snapshot(monkeypatch):
    """A crowd costs one encoding of each inventory, not one for each of them: requests for it gather for a moment."""
    monkeypatch.setattr(feed_module, "SNAPSHOT_PAUSE_S", 3.0)
    monkeypatch.setattr(feed_module, "LONGEST_GATHERING_S", 3.0)
    async with running_feed() as (feed, registry, dealer):
        holder, keys = make_member("holder"), make_keys(1000)
        await ask(dealer, wire.Register(holder))
        snapshot = wire.Snapshot("holder", holder.incarnation, 1, keys, first=True, last=True)
        feed.send(registry.on_event(snapshot, wire.encode(snapshot), time.monotonic()), time.monotonic())
        told: list[Send] = []
        next_snapshot = registry.next_snapshot

        def recorded(now_s: float) -> list[Send]:
            sends = next_snapshot(now_s)
            told.extend(sends)
            return sends

        monkeypatch.setattr(registry, "next_snapshot", recorded)
        crowd = []
        for number in range(4):
            one = dealer.context.socket(zmq.DEALER)
            one.connect(dealer.getsockopt_string(zmq.LAST_ENDPOINT))
            crowd.append(one)
            assert isinstance(await ask(one, wire.Register(make_member(f"newcomer-{number}"))), wire.Registered)
        for one in crowd:
            while not isinstance(notice := wire.notice_decoder.decode(await one.recv()), wire.Snapshot):
                pass
            assert (notice.instance_id, set(notice.keys)) == ("holder", set(keys))
            one.close(linger=0)
        assert [len(send.to) for send in told if send.message.instance_id == "holder"] == [4]


async def test_sockets_refuse_a_host_of_others():
    """A name that is no address of this machine is a StartupError that says so, and leaves nothing open."""
    with pytest.raises(StartupError, match="--host"):
        open_sockets(make_controller_config(host="192.0.2.1", port=0, insecure=True))
