"""The node's end of the link to its engine (see `kvmesh.wire.link`). Runs on the node's event loop."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Coroutine

import msgspec

from kvmesh.config import KVMeshConfig
from kvmesh.core.gate import Saved
from kvmesh.core.keys import ChunkKey
from kvmesh.core.ledger import SlotLedger
from kvmesh.errors import KVMeshError
from kvmesh.node.listener import NodeListener
from kvmesh.node.process import Node
from kvmesh.transfer.pool import HostPool, PoolSegment
from kvmesh.wire import link
from kvmesh.wire.control import ControlError
from kvmesh.wire.framing import pack_frame, read_frame
from kvmesh.wire.operations import AnyCommand

log = logging.getLogger("kvmesh.node")

VISIBLE_BATCH = 20_000
"""Keys per Visible message: a bulk change reaches the engine in pieces that each take it a millisecond or two."""
MAX_UNSENT_BYTES = 32 * 1024 * 1024
"""What may wait for an engine that does not read. Beyond it changes are dropped, and it gets the whole set later."""
PIECE_UNSENT_BYTES = 1024 * 1024
"""While so much waits, no further piece of the whole set is told: the end of a fetch does not wait for all of it."""
PARENT_POLL_S = 1.0
MAX_QUESTIONS = 1000
GOODBYE_S = 1.5
"""Longest time for telling the directories that this node ends; less than the engine waits for its end."""


class EngineLink(NodeListener):
    """Serves one engine over a connected unix socket until either side closes it."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._writer: asyncio.StreamWriter | None = None
        self._node: Node | None = None
        self._jobs: set[asyncio.Task[None]] = set()
        """Fetches that are out."""
        self._others: set[asyncio.Task[None]] = set()
        self._behind = False
        """Changes were dropped; `_catch_up` waits until the engine reads again."""
        self._telling = 0
        """Number of the whole set that is being told, or was told last."""
        self._untold: link.Directory | None = None
        self._key_number = 0
        self._key_makers: dict[int, asyncio.Future[link.KeysMade]] = {}
        """Who waits for keys; at most as many as questions are answered at a time."""

    async def serve(self) -> int:
        """Run a node for the engine; returns the process's exit status. Ends with the link or the engine."""
        reader, self._writer = await asyncio.open_unix_connection(sock=self._connection)
        self._writer.transport.set_write_buffer_limits(high=PIECE_UNSENT_BYTES)
        try:
            start = link.to_node_decoder.decode(await read_frame(reader, link.MAX_FRAME_BYTES) or b"")
            if not isinstance(start, link.Start):
                raise msgspec.ValidationError(f"Start expected, {type(start).__name__} came")
        except (OSError, ValueError, RecursionError) as error:
            log.error("engine sent no valid start: %s", error)
            return 2
        try:
            node = self._make_node(start)
            member = node.start()
        except Exception as error:  # the engine's person shall read it, whatever it is
            self._send(link.Failed(str(error) if isinstance(error, KVMeshError) else repr(error)))
            await self._flush()
            return 1
        self._node = node
        self._send(
            link.Ready(node.instance_id, node.incarnation, member.peer_host, member.peer_port, member.admin_port)
        )
        serving = asyncio.create_task(node.run(member))
        watching = asyncio.create_task(self._watch_parent(start.engine_pid))
        reading = asyncio.create_task(self._read(reader))
        try:
            await asyncio.wait((serving, watching, reading), return_when=asyncio.FIRST_COMPLETED)
            failure = serving.exception() if serving.done() else None
            if failure is not None:
                log.error("node stopped: %r", failure)
                return 1
            log.info("engine is gone or closed its link; node ends")
            return 0
        finally:
            for task in (serving, watching, reading):
                task.cancel()
            await asyncio.wait((serving,), timeout=GOODBYE_S)
            node.close()

    def _make_node(self, start: link.Start) -> Node:
        ledger = SlotLedger.attach(start.ledger_fd)
        segments = [PoolSegment(segment.fd, segment.offset_bytes, segment.length_bytes) for segment in start.segments]
        pool = HostPool(segments, chunk_bytes=ledger.chunk_bytes)
        if pool.slots != ledger.slots:
            raise ValueError(f"pool has {pool.slots} slots, its ledger {ledger.slots}")
        config = KVMeshConfig.from_wire(start.config)
        if start.peer_port:
            config = config.model_copy(update={"peer_port": start.peer_port})
        return Node(config, start.format, pool, ledger, self, sharing=start.sharing, tokenizer=start.tokenizer)

    # -- from the engine -----------------------------------------------------------------------------------------------

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while (frame := await read_frame(reader, link.MAX_FRAME_BYTES)) is not None:
                self._on_message(link.to_node_decoder.decode(frame))
        except (OSError, ValueError, RecursionError) as error:
            log.error("engine link broke: %s", error)

    def _on_message(self, message: link.ToNode) -> None:
        """Raises ValueError for what no engine would say."""
        assert self._node is not None
        match message:
            case link.Publish():
                self._check_slots(message.slots)
                self._node.inventory.published(message.slots, fetched=message.fetched)
            case link.Retract():
                self._check_slots(message.slots)
                self._node.inventory.retracted(message.slots)
            case link.Fetch():
                self._check_slots(message.slots)
                if not len(message.keys) == len(message.slots) == len(set(message.slots)):
                    raise ValueError(f"fetch of {len(message.keys)} keys into {len(message.slots)} slots")
                _start(self._fetch(self._node, message), self._jobs)
            case link.Ask():
                if len(self._others) < MAX_QUESTIONS:
                    _start(self._ask(self._node, message.keys), self._others)
            case link.Operated():
                self._node.operations.reported(message.operation_id, message.report)
            case link.KeysMade():
                self._keys_made(message)
            case link.RequestRecord():
                self._node.take_record(message)
            case link.GiveUp():
                _start(self._give_up(self._node), self._others)
            case link.Start():
                log.error("engine sent a second start; ignored")

    def _keys_made(self, message: link.KeysMade) -> None:
        maker = self._key_makers.get(message.number)
        if maker is not None and not maker.done():
            maker.set_result(message)

    def _check_slots(self, slots: list[int]) -> None:
        assert self._node is not None
        if slots and max(slots) >= self._node.slots:
            raise ValueError(f"slot {max(slots)} of a pool with {self._node.slots} slots")

    async def _fetch(self, node: Node, job: link.Fetch) -> None:
        try:
            saved = None if job.saved is None else Saved(*job.saved)
            result = await node.fetch(job.request_id, job.keys, job.slots, job.timeout_s, saved)
        except Exception:
            log.exception("fetch failed in an unforeseen way, so its slots are not safe; node ends")
            self._close()
            return
        reasons = [outcome.reason for outcome in result.outcomes]
        fetched_bytes = reasons.count(None) * node.chunk_bytes
        gate = None if result.gate is None else link.GateReport(*result.gate)
        self._send(link.FetchDone(job.job_id, reasons, fetched_bytes, result.seconds, result.holders, gate))

    async def _ask(self, node: Node, keys: list[bytes]) -> None:
        held = await node.asker.ask(keys)
        if held is not None:
            self.on_asked([key for key in keys if key in held], [key for key in keys if key not in held])

    async def _give_up(self, node: Node) -> None:
        """End the jobs that are out, wait for them, then accept new ones."""
        node.fetcher.give_up()
        while self._jobs:
            await asyncio.wait(set(self._jobs))
        node.fetcher.resume()

    async def _watch_parent(self, engine_pid: int) -> None:
        """The link's end tells of most deaths; this catches an engine whose end of the socket lives on in a child of
        its own.
        """
        while os.getppid() == engine_pid:
            await asyncio.sleep(PARENT_POLL_S)

    # -- NodeListener --------------------------------------------------------------------------------------------------

    def on_asked(self, held: list[bytes], missing: list[bytes]) -> None:
        self._send(link.Answered(held, missing))

    def on_visible(self, appeared: list[ChunkKey], vanished: list[ChunkKey]) -> None:
        if self._is_behind():
            return  # the whole set follows
        self._tell_visible(appeared, vanished)

    def on_directory(self, state: link.Directory) -> None:
        if self._is_behind():
            self._untold = state
            return
        self._send(state)

    def on_visible_reset(self, keys: list[ChunkKey]) -> None:
        if not self._is_behind() and self._node is not None:
            self._tell_all(self._node, keys)

    def operate(self, operation_id: str, command: AnyCommand, timeout_s: float) -> bool:
        self._send(link.Operate(operation_id, command, timeout_s))
        return True

    async def make_keys(self, tokens: list[int], cache_salt: str | None) -> list[bytes]:
        self._key_number += 1
        number = self._key_number
        made: asyncio.Future[link.KeysMade] = asyncio.get_running_loop().create_future()
        self._key_makers[number] = made
        try:
            self._send(link.MakeKeys(number, tokens, cache_salt))
            answer = await made
        finally:
            del self._key_makers[number]
        if answer.error:
            raise ControlError("no_keys", answer.error)
        return answer.keys

    def on_rates(self, rates: link.Rates) -> None:
        if not self._is_behind():
            self._send(rates)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _tell_all(self, node: Node, keys: list[ChunkKey]) -> None:
        """Begin anew with these keys. They may be millions, so most of them follow later, in pieces."""
        self._telling += 1
        self._send(link.Visible([], [], reset=True))
        _start(self._tell_pieces(node, keys, self._telling), self._others)

    async def _tell_pieces(self, node: Node, keys: list[ChunkKey], number: int) -> None:
        """Changes are told as they come, between the pieces, so what has vanished meanwhile is left out of these."""
        for start in range(0, len(keys), VISIBLE_BATCH):
            if self._behind or self._telling != number:
                return  # the whole set follows, or follows again
            self._tell_visible([key for key in keys[start : start + VISIBLE_BATCH] if key in node.replica], [])
            try:
                await self._flush()
            except OSError:
                return  # the reading task sees the same end

    def _tell_visible(self, appeared: list[ChunkKey], vanished: list[ChunkKey]) -> None:
        size = VISIBLE_BATCH
        for start in range(0, max(len(appeared), len(vanished)), size):
            batch = slice(start, start + size)
            self._send(link.Visible(list[bytes](appeared[batch]), list[bytes](vanished[batch]), reset=False))

    def _is_behind(self) -> bool:
        """Whether the engine has stopped reading; if so, see to it that it learns everything when it goes on."""
        if self._behind or self._writer is None or self._node is None:
            return self._behind
        if self._writer.transport.get_write_buffer_size() <= MAX_UNSENT_BYTES:
            return False
        self._behind = True
        log.warning("engine does not read its link; it learns what has changed when it does")
        _start(self._catch_up(self._node), self._others)
        return True

    async def _catch_up(self, node: Node) -> None:
        try:
            await self._flush()
        except OSError:
            return  # the reading task sees the same end
        self._behind = False
        self._tell_all(node, node.visible_keys())
        if self._untold is not None:
            state, self._untold = self._untold, None
            self._send(state)

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _send(self, message: link.Message) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(pack_frame(link.encode(message)))

    async def _flush(self) -> None:
        if self._writer is not None:
            await self._writer.drain()


def _start(work: Coroutine[None, None, None], tasks: set[asyncio.Task[None]]) -> None:
    """Run `work` as a task and keep it among `tasks` until it has ended."""
    task = asyncio.create_task(work)
    tasks.add(task)
    task.add_done_callback(tasks.discard)
