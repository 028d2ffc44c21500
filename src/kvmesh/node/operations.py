"""What the controller can have done here, and how far it is. Lives on the node's event loop.

The node does at once what is its own (it stops announcing what is to be cleared) and hands the rest to its engine,
which owns the pool and gets to it at its next step. What the engine reports is kept for the controller to ask for.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections import OrderedDict
from typing import TYPE_CHECKING

import msgspec

from kvmesh.core.keys import ChunkKey
from kvmesh.node.tokens import tokenize
from kvmesh.wire import control
from kvmesh.wire.control import ControlError
from kvmesh.wire.operations import (
    MAX_HOT,
    AnyCommand,
    ClearChunks,
    PinChunks,
    Report,
    RunState,
    Sharing,
    UnpinChunks,
    WarmChunks,
)

if TYPE_CHECKING:
    from kvmesh.node.listener import NodeListener
    from kvmesh.node.process import Node

log = logging.getLogger("kvmesh.operations")

MAX_KEPT = 256
"""Commands that are remembered; the oldest that have ended go first."""
GRACE_S = 1.0
"""So long after a command's time is up the engine may still say how it ended."""
EXPIRY_DELAY_S = 0.1
"""After the end of a pin: it began a moment after the command came."""
INVENTORIES_S, POLL_S = 5.0, 0.02
"""So long a warm waits for the inventories of others, when its instance has just joined."""
KEYS_KEPT_S = 60.0
"""So long a list of keys can be asked for."""
LEAVE_DELAY_S = 0.1
"""The answer goes first."""
WAITING = "waiting for the engine's next step"


class _Entry:
    def __init__(self, give_up_s: float) -> None:
        self.give_up_s = give_up_s
        self.report = Report(state=RunState.PENDING, text=WAITING)
        self.ended = asyncio.Event()

    def forget_keys(self) -> None:
        """Half a megabyte that has been told by now."""
        self.report = msgspec.structs.replace(self.report, keys=[])


class NodeOperations:
    """Answers the questions that have to do with operations."""

    def __init__(self, node: Node, listener: NodeListener) -> None:
        self._node = node
        self._listener = listener
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._making_keys = asyncio.Lock()
        """One prompt at a time: whoever asks for many cannot take the engine's time for it."""
        self.pinned_chunks = 0
        """As the engine last said."""
        node.control.add(control.StartOperation, self._start)
        node.control.add(control.TellOperation, self._tell)
        node.control.add(control.ChangeSharing, self._change_sharing)
        node.control.add(control.MakeKeys, self._make_keys)
        node.control.add(control.Inspect, self._inspect)

    def reported(self, operation_id: str, report: Report) -> None:
        """The engine says how far a command is."""
        entry = self._entries.get(operation_id)
        self.pinned_chunks = report.pinned_chunks
        if entry is None or entry.report.state.is_final:
            return
        entry.report = report
        if report.state.is_final:
            entry.ended.set()
        if report.keys:
            asyncio.get_running_loop().call_later(KEYS_KEPT_S, entry.forget_keys)

    async def begin(self, command: AnyCommand, timeout_s: float) -> str:
        """Hand a command to the engine; returns the operation's id. Raises ControlError."""
        operation_id = secrets.token_hex(8)
        await self._start(control.StartOperation(operation_id=operation_id, command=command, timeout_s=timeout_s))
        return operation_id

    async def finish(self, command: AnyCommand, timeout_s: float) -> Report:
        """Have the engine carry out a command to its end, or until its time is up. Raises ControlError."""
        tell = control.TellOperation(operation_id=await self.begin(command, timeout_s), wait_s=timeout_s + GRACE_S)
        return (await self._tell(tell)).report

    async def _start(self, question: control.StartOperation) -> control.Told:
        known = self._entries.get(question.operation_id)
        if known is not None:
            return control.Told(report=self._current(known))
        self._make_room()
        entry = self._entries[question.operation_id] = _Entry(time.monotonic() + question.timeout_s)
        if isinstance(question.command, WarmChunks):
            await self._find_holders(question.command.keys)
        if not self._listener.operate(question.operation_id, question.command, question.timeout_s):
            del self._entries[question.operation_id]
            raise ControlError("no_engine", "this node has no engine, so nobody can change its pool")
        if isinstance(question.command, ClearChunks):
            keys = question.command.keys
            self._node.inventory.withdraw(None if keys is None else [ChunkKey(key) for key in keys])
        if isinstance(question.command, PinChunks):
            loop = asyncio.get_running_loop()
            loop.call_later(question.command.seconds + EXPIRY_DELAY_S, self._expire_pins)
        log.info("operation id=%s command=%s", question.operation_id, type(question.command).__name__)
        return control.Told(report=entry.report)

    async def _find_holders(self, keys: list[bytes]) -> None:
        """An instance that has just joined would find most chunks nowhere, and one that asks all of them."""
        if self._node.asks:
            held = await self._node.asker.ask(keys) or set[bytes]()
            self._listener.on_asked([key for key in keys if key in held], [])
            return
        until_s = time.monotonic() + INVENTORIES_S
        while not self._node.knows_all_inventories() and time.monotonic() < until_s:
            await asyncio.sleep(POLL_S)

    def _expire_pins(self) -> None:
        """Have the engine look at its pins, also when it is idle, so that what is shown of them is true."""
        self._listener.operate(secrets.token_hex(8), UnpinChunks(keys=[]), GRACE_S)

    def _make_room(self) -> None:
        while len(self._entries) >= MAX_KEPT:
            ended = next((name for name, entry in self._entries.items() if entry.report.state.is_final), None)
            if ended is None:
                raise ControlError("busy", f"{len(self._entries)} operations are under way here: try again later")
            del self._entries[ended]

    async def _tell(self, question: control.TellOperation) -> control.Told:
        entry = self._entries.get(question.operation_id)
        if entry is None:
            raise ControlError("unknown_operation", "this node knows of no such operation: was it started anew?")
        left_s = entry.give_up_s + GRACE_S - time.monotonic()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(entry.ended.wait(), max(0.0, min(question.wait_s, left_s)))
        return control.Told(report=self._current(entry))

    def _current(self, entry: _Entry) -> Report:
        """Its last report; past its time, one that says so: the engine may never take a step again."""
        if not entry.report.state.is_final and time.monotonic() > entry.give_up_s + GRACE_S:
            text = f"the engine did not finish in time; it was last {entry.report.state.value}"
            state = RunState.PARTLY if entry.report.chunks_done else RunState.FAILED
            entry.report = msgspec.structs.replace(entry.report, state=state, text=text)
            entry.ended.set()
        return entry.report

    async def _change_sharing(self, question: control.ChangeSharing) -> control.SharingIs:
        if self._node.sharing is Sharing.LEFT:
            raise ControlError("left", "this instance has left; it comes back when its engine is started anew")
        if question.sharing is Sharing.LEFT:
            self._node.set_sharing(Sharing.DRAINED)
            asyncio.get_running_loop().call_later(LEAVE_DELAY_S, self._node.leave)
        else:
            self._node.set_sharing(question.sharing)
        return control.SharingIs(sharing=question.sharing, published_chunks=len(self._node.inventory))

    async def _make_keys(self, question: control.MakeKeys) -> control.KeysAre:
        if (question.text is None) == (question.tokens is None):
            raise ControlError("bad_question", "either text or tokens")
        tokens = question.tokens
        async with self._making_keys:
            if tokens is None:
                assert question.text is not None
                tokens = await tokenize(self._node.tokenizer, question.text)
            keys = await self._listener.make_keys(tokens, question.cache_salt)
        if len(keys) > MAX_HOT:
            raise ControlError("too_many_keys", f"the prompt has {len(keys)} chunks; at most {MAX_HOT} can be told")
        return control.KeysAre(keys=keys, tokens=len(tokens))

    async def _inspect(self, question: control.Inspect) -> control.Inspected:
        chunks: list[control.InspectedChunk | None] = []
        for key in question.keys:
            found = self._node.inventory.locate(key)
            if found is None:
                chunks.append(None)
                continue
            chunks.append(control.InspectedChunk(slot=found.slot, generation=found.generation, checksum=found.checksum))
        return control.Inspected(chunks=chunks)
