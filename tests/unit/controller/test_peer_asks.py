"""Questions over peer ports: every one ends, whatever the node does."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Iterator

import msgspec
import pytest

from kvmesh.controller.peer_asks import PeerAsks
from kvmesh.node.peer_server import PeerServer
from kvmesh.wire.control import MAX_QUESTION_BYTES, ControlError
from kvmesh.wire.directory import AskError, Member
from kvmesh.wire.peer import Answered, Ask
from support.transfer_holder import HOLDER, HOLDER_INCARNATION, Store, hello
from unit.controller.makers import make_member

CHUNK_BYTES = 1 << 16


class Questions:
    """A node's answers."""

    def __init__(self, answer: Callable[[Ask], Answered]) -> None:
        self.answer = answer


@contextlib.contextmanager
def node(answer: Callable[[Ask], Answered] | None) -> Iterator[Member]:
    """A node that answers so; None: one that answers nobody. As a directory names it."""
    store = Store(1, CHUNK_BYTES)
    ours = hello(CHUNK_BYTES)
    questions = None if answer is None else Questions(answer)
    server = PeerServer(store.pool, store.ledger, store.locate, ours, host="127.0.0.1", port=0, questions=questions)
    server.start()
    member = make_member(
        HOLDER, incarnation=HOLDER_INCARNATION, peer_host="127.0.0.1", peer_port=server.port, format=ours.format
    )
    try:
        yield member
    finally:
        server.close()
        store.close()


@pytest.fixture
def asks() -> Iterator[PeerAsks]:
    made = PeerAsks()
    yield made
    made.close()


async def code_of(asks: PeerAsks, member: Member, *, timeout_s: float = 5.0, question: bytes = b"?") -> str:
    with pytest.raises(ControlError) as caught:
        await asks.ask(member, question, timeout_s)
    return caught.value.code


async def test_an_answer_and_an_error_of_the_nodes(asks: PeerAsks) -> None:
    with node(lambda ask: Answered(ask.question + b"!")) as member:
        assert (await asks.ask(member, b"well", 5.0)).reply == b"well!"
    with node(lambda _: Answered(b"", AskError("busy", "later"))) as member:
        assert (await asks.ask(member, b"well", 5.0)).error == AskError("busy", "later")


async def test_another_incarnation_is_not_asked(asks: PeerAsks) -> None:
    """The address was reused: the question is for who was there before."""
    asked: list[Ask] = []
    with node(lambda ask: asked.append(ask) or Answered(b"")) as member:  # type: ignore[func-returns-value]
        assert await code_of(asks, msgspec.structs.replace(member, incarnation="f" * 16)) == "unreachable"
    assert not asked


async def test_nobody_there(asks: PeerAsks) -> None:
    with node(None) as member:
        assert await code_of(asks, member) == "unreachable", "it answers nobody"
    assert await code_of(asks, member) == "unreachable"


async def test_a_node_that_says_nothing(asks: PeerAsks) -> None:
    """Not when it is connected to, and not when it is asked."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        member = make_member("a", peer_port=listener.getsockname()[1])
        assert await code_of(asks, member, timeout_s=0.1) == "deadline"
    woken = threading.Event()
    with node(lambda _: Answered(str(woken.wait(20)).encode())) as member:
        assert await code_of(asks, member, timeout_s=0.2) == "deadline"
        woken.set()


async def test_the_end_of_the_controller_ends_questions() -> None:
    asks, asked, woken = PeerAsks(), threading.Event(), threading.Event()

    def wait(_: Ask) -> Answered:
        asked.set()
        woken.wait(20)
        return Answered(b"")

    with node(wait) as member:
        task = asyncio.create_task(code_of(asks, member, timeout_s=600.0))
        await asyncio.to_thread(asked.wait, 10)
        asks.close()
        assert await asyncio.wait_for(task, 10) == "stopping"
        assert await code_of(asks, member) == "stopping"
        woken.set()


async def test_a_question_that_fits_in_no_frame(asks: PeerAsks) -> None:
    with node(lambda _: Answered(b"")) as member:
        assert await code_of(asks, member, question=bytes(MAX_QUESTION_BYTES)) == "question_too_large"
        assert (await asks.ask(member, bytes(MAX_QUESTION_BYTES - 256), 5.0)).error is None
