"""What each kind of operation does, step by step. Runs on the controller's loop.

Each step can be taken twice without harm, and each leaves the cluster as it should be if the next one never comes: what
is moved or handed over is at its new place before it goes from the old one.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Collection, Sequence
from functools import partial

import msgspec

from kvmesh.controller.carry_out import Commander
from kvmesh.controller.instances import FormatGroup, Instance
from kvmesh.controller.operation_bodies import (
    ClearBody,
    DrainBody,
    MoveBody,
    PinBody,
    ResumeBody,
    UnpinBody,
    WarmBody,
)
from kvmesh.controller.operations import Operation, Part
from kvmesh.controller.registry import Registry
from kvmesh.controller.selection import Selection, is_sharing
from kvmesh.core.keys import ChunkKey
from kvmesh.core.share_out import Room
from kvmesh.core.share_out import share_out as core_share_out
from kvmesh.wire.control import ControlError
from kvmesh.wire.operations import (
    MAX_HOT,
    AnyCommand,
    ClearChunks,
    PinChunks,
    RunState,
    Sharing,
    UnpinChunks,
    WarmChunks,
)

SETTLE_S = 3.0
"""What an instance has fetched is announced within milliseconds; a slow one gets so long."""
SETTLE_POLL_S = 0.05
ROUNDS = 3
"""Hand-overs of one drain: the first, and two more for what the receivers did not take."""
UNDO_S = 5.0


class Runs:
    """Carries out operations. `until_s` is always the clock's time at which the operation is to be over."""

    def __init__(
        self, registry: Registry, commander: Commander, selection: Selection, clock: Callable[[], float]
    ) -> None:
        self._registry = registry
        self._commander = commander
        self._selection = selection
        self._clock = clock

    async def run(self, operation: Operation) -> None:
        """Raises ControlError when the operation as a whole cannot be done."""
        until_s = operation.created_s + operation.body.timeout_s
        match operation.body:
            case ClearBody():
                await self._clear(operation, operation.body, until_s)
            case PinBody():
                await self._pin(operation, operation.body, until_s)
            case UnpinBody():
                await self._unpin(operation, operation.body, until_s)
            case WarmBody():
                await self._warm(operation, operation.body, until_s)
            case DrainBody():
                await self._drain(operation, operation.body, until_s)
            case ResumeBody():
                await self._resume(operation, operation.body, until_s)
            case MoveBody():
                await self._move(operation, operation.body, until_s)

    # -- kinds ---------------------------------------------------------------------------------------------------------

    async def _clear(self, operation: Operation, body: ClearBody, until_s: float) -> None:
        async def clear(instance: Instance, keys: list[bytes] | None) -> None:
            part = operation.part(instance.instance_id, "clear")
            await self._run_on(part, lambda some: ClearChunks(keys=some), keys, until_s)

        await self._everywhere(body, clear)

    async def _pin(self, operation: Operation, body: PinBody, until_s: float) -> None:
        async def pin(instance: Instance, keys: list[bytes] | None) -> None:
            assert keys is not None
            held = instance.group.replica.keys_of(instance.instance_id)
            if body.instance is None and not any(key in held for key in keys):
                return
            part = operation.part(instance.instance_id, "pin")
            await self._run_on(part, lambda some: PinChunks(keys=some or [], seconds=body.seconds), keys, until_s)

        await self._everywhere(body, pin)
        if not operation.parts:
            raise ControlError("not_held", "no instance holds any of these chunks: warm one first")

    async def _unpin(self, operation: Operation, body: UnpinBody, until_s: float) -> None:
        async def unpin(instance: Instance, keys: list[bytes] | None) -> None:
            part = operation.part(instance.instance_id, "unpin")
            await self._run_on(part, lambda some: UnpinChunks(keys=some), keys, until_s)

        await self._everywhere(body, unpin)

    async def _warm(self, operation: Operation, body: WarmBody, until_s: float) -> None:
        instance = self._member(body.instance)
        part = operation.part(instance.instance_id, "warm")
        if body.hottest is None:
            keys = await self._selection.keys_at(instance, body)
        else:
            wanted = body.sources
            sources = [
                other
                for other in _others(instance)
                if (wanted is None and is_sharing(other)) or (wanted is not None and other.instance_id in wanted)
            ]
            keys = await self._selection.hottest(sources, body.hottest, until_s)
        await self._warm_part(part, keys, until_s)

    async def _resume(self, operation: Operation, body: ResumeBody, until_s: float) -> None:
        part = operation.part(body.instance, "resume")
        await self._change_sharing(self._member(body.instance), Sharing.ON, until_s)
        part.end(RunState.DONE)

    async def _move(self, operation: Operation, body: MoveBody, until_s: float) -> None:
        source, target = self._member(body.source), self._member(body.to)
        if body.names_chunks:
            keys = await self._selection.keys_at(source, body)
        else:
            hot = await self._commander.hottest(body.source, MAX_HOT, until_s)
            keys = list(dict.fromkeys([*hot, *source.group.replica.keys_of(body.source)]))
        await self._warm_part(operation.part(body.to, "warm"), keys, until_s)
        arrived = await self._held_by({target.instance_id}, source.group, keys, until_s)
        part = operation.part(body.source, "clear")
        await self._run_on(part, lambda some: ClearChunks(keys=some), arrived, until_s)

    # -- drain ---------------------------------------------------------------------------------------------------------

    async def _drain(self, operation: Operation, body: DrainBody, until_s: float) -> None:
        instance = self._member(body.instance)
        part = operation.part(instance.instance_id, "drain")
        change = partial(self._change_sharing, instance, until_s=until_s)
        try:
            await change(Sharing.DRAINING)
            part.end(RunState.RUNNING, "publishes and fetches nothing any more; handing chunks over")
            if body.hand_over:
                await self._hand_over(operation, instance, body.hand_over, until_s)
            await change(Sharing.LEFT if body.leave else Sharing.DRAINED)
        except BaseException:
            await self._undo_drain(instance)
            raise
        if body.leave:
            await self._until_gone(instance, until_s)
        part.end(RunState.DONE, "has left" if body.leave else "shares nothing any more")

    async def _hand_over(self, operation: Operation, instance: Instance, limit: int, until_s: float) -> None:
        """Have others fetch what only this instance holds, hottest first. Raises ControlError when nobody is there."""
        group, me = instance.group, instance.instance_id
        hot = await self._commander.hottest(me, limit, until_s)
        receivers = {other.instance_id for other in _others(instance) if is_sharing(other)}
        for _ in range(ROUNDS):
            alone = [key for key in hot if not _held(group, key, without=me)]
            if not alone:
                return
            present = [group.members[name] for name in sorted(receivers) if name in group.members]
            if not present:
                hint = "start another instance of its format, or drain with hand_over 0 and lose them"
                text = f"there is nobody to hand over to, and {len(alone)} chunks are nowhere else: {hint}"
                raise ControlError("no_receiver", text)
            parts = [(operation.part(name, "warm"), keys) for name, keys in share_out(present, alone)]
            await asyncio.gather(*(self._warm_part(part, keys, until_s) for part, keys in parts))
            receivers -= {part.instance_id for part, _ in parts if part.report.state is not RunState.DONE}
            await self._held_by(None, group, alone, until_s, without=me)
            if not receivers:
                return  # the parts say what was not taken, and why

    async def _undo_drain(self, instance: Instance) -> None:
        """What cannot be drained goes on as before."""
        with contextlib.suppress(ControlError):
            await self._change_sharing(instance, Sharing.ON, self._clock() + UNDO_S)

    async def _change_sharing(self, instance: Instance, sharing: Sharing, until_s: float) -> None:
        await self._commander.change_sharing(instance.instance_id, sharing, until_s)
        # Its next heartbeat says so too, but what is started meanwhile should know.
        instance.statistics = msgspec.structs.replace(instance.statistics, sharing=sharing.value)

    async def _until_gone(self, instance: Instance, until_s: float) -> None:
        while self._registry.instances.get(instance.instance_id) is instance:
            if self._clock() >= until_s:
                raise ControlError("still_here", f"instance {instance.instance_id} said that it leaves and did not")
            await asyncio.sleep(SETTLE_POLL_S)

    # -- shared --------------------------------------------------------------------------------------------------------

    def _member(self, instance_id: str) -> Instance:
        """Raises ControlError when it has gone since the operation was started."""
        found = self._registry.instances.get(instance_id)
        if found is None:
            raise ControlError("lost", f"instance {instance_id} is no member any more")
        return found

    async def _everywhere(
        self,
        body: ClearBody | PinBody | UnpinBody,
        act: Callable[[Instance, list[bytes] | None], Awaitable[None]],
    ) -> None:
        """Act on the instance that is named, or on all, each with its own keys (None: no chunks are named)."""
        if body.instance is not None:
            instance = self._member(body.instance)
            await act(instance, await self._selection.keys_at(instance, body) if body.names_chunks else None)
            return
        for group in list(self._registry.groups.values()):
            keys = (await self._selection.keys_in(group, body)).keys if body.names_chunks else None
            await asyncio.gather(*(act(instance, keys) for instance in list(group.members.values())))

    async def _run_on(
        self,
        part: Part,
        make: Callable[[list[bytes] | None], AnyCommand],
        keys: list[bytes] | None,
        until_s: float,
    ) -> None:
        if keys is None:
            await self._commander.run(part, make(None), until_s)
        else:
            await self._commander.run_with(part, make, keys, until_s)

    async def _warm_part(self, part: Part, keys: Sequence[bytes], until_s: float) -> None:
        await self._commander.run_with(part, lambda some: WarmChunks(keys=some), keys, until_s)

    async def _held_by(
        self,
        wanted: Collection[str] | None,
        group: FormatGroup,
        keys: Sequence[bytes],
        until_s: float,
        *,
        without: str = "",
    ) -> list[bytes]:
        """Those of `keys` that the directory knows to be held by one of `wanted` (None: anybody but `without`). What
        was fetched a moment ago may still be on its way to the directory.
        """
        give_up_s = min(until_s, self._clock() + SETTLE_S)
        missing = list(keys)
        while True:
            missing = [key for key in missing if not _held(group, key, without=without, wanted=wanted)]
            if not missing or self._clock() >= give_up_s:
                lost = set(missing)
                return [key for key in keys if key not in lost]
            await asyncio.sleep(SETTLE_POLL_S)


def share_out(receivers: Sequence[Instance], keys: Sequence[bytes]) -> list[tuple[str, list[bytes]]]:
    """Who takes which (`kvmesh.core.share_out`)."""
    return core_share_out({other.instance_id: Room(other.member.slots, _chunks(other)) for other in receivers}, keys)


def _chunks(instance: Instance) -> int:
    return len(instance.group.replica.keys_of(instance.instance_id))


def _others(instance: Instance) -> list[Instance]:
    return [other for other in instance.group.members.values() if other is not instance]


def _held(group: FormatGroup, key: bytes, *, without: str, wanted: Collection[str] | None = None) -> bool:
    holders = group.replica.holders(ChunkKey(key))
    return any(name != without and (wanted is None or name in wanted) for name in holders)
