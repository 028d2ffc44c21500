"""A stand-in engine that does what operators want: its pool as `kvmesh.node.pool_operations` works on it."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Iterator

from kvmesh.bench.stand_in import StandInEngine, make_key
from kvmesh.core.reasons import MissReason
from kvmesh.node.engine_commands import EngineCommands
from kvmesh.node.pool_operations import SlotState

IDLE_S = 0.001
FETCH_TIMEOUT_S = 5.0


class OperatedStandIn:
    """Makes an engine obey; to be made before it is started. A thread of its own steps it: whoever uses the engine
    meanwhile holds `lock`.
    """

    def __init__(self, engine: StandInEngine, *, pin_max_share: float = 0.5) -> None:
        self.engine = engine
        self.lock = threading.Lock()
        self.slots = engine.pool.slots
        self.chunk_bytes = engine.chunk_bytes
        self._woken = threading.Event()
        self._closing = threading.Event()
        self._pulls: dict[bytes, tuple[int, int]] = {}
        """Job and slot of chunks that are on their way."""
        self._reasons: dict[bytes, MissReason] = {}
        self.commands = EngineCommands(engine.node, make_keys=self._make_keys, wake=self._woken.set)
        self.commands.attach(self, pin_max_share=pin_max_share)

    @contextlib.contextmanager
    def running(self) -> Iterator[OperatedStandIn]:
        """Step in a thread, as an engine would, until the block ends."""
        thread = threading.Thread(target=self._run, name="stand-in", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._closing.set()
            self._woken.set()
            thread.join()

    def _run(self) -> None:
        while not self._closing.is_set():
            self._woken.wait()
            self._woken.clear()
            while not self._closing.is_set():
                with self.lock:
                    self._take_pulled()
                    self.commands.step()
                    if not self.commands.has_work():
                        break
                self._closing.wait(IDLE_S)

    def _make_keys(self, tokens: list[int], cache_salt: str | None) -> list[bytes]:
        chunk = self.engine.format.chunk_tokens
        ends = range(chunk, len(tokens) + 1, chunk)
        names = (hashlib.sha256(repr((cache_salt, tokens[:end])).encode()).hexdigest() for end in ends)
        return [make_key(name) for name in names]

    # -- OperatedPool --------------------------------------------------------------------------------------------------

    def keys(self) -> list[bytes]:
        return self.engine.keys()

    def hottest(self, limit: int) -> list[bytes]:
        return self.engine.keys()[::-1][:limit]

    def state(self, key: bytes) -> SlotState:
        if key in self._pulls:
            return SlotState.WRITING
        if not self.engine.holds(key):
            return SlotState.ABSENT
        return SlotState.BUSY if key in self.engine.held else SlotState.READY

    def release(self, keys: list[bytes]) -> None:
        self.engine.forget(keys)

    def hold(self, key: bytes) -> None:
        self.engine.held.add(key)

    def let_go(self, key: bytes) -> None:
        self.engine.held.discard(key)

    def begin_warm(self, operation_id: str) -> None: ...

    def pull(self, operation_id: str, key: bytes) -> MissReason | None:
        if not self.engine.node.is_visible(key):
            return MissReason.NOT_PUBLISHED
        self._reasons.pop(key, None)
        self._pulls[key] = self.engine.start_fetch(key, f"warm-{operation_id}", FETCH_TIMEOUT_S)
        return None

    def pulled(self, operation_id: str, key: bytes) -> MissReason | None:
        del operation_id
        return self._reasons.get(key)

    def end_warm(self, operation_id: str) -> None: ...

    def _take_pulled(self) -> None:
        for key, (job_id, slot) in list(self._pulls.items()):
            finished = self.engine.take_result(job_id)
            if finished is None:
                continue
            del self._pulls[key]
            [reason] = finished.reasons
            self.engine.end_fetch(key, slot, is_here=reason is None)
            if reason is not None:
                self._reasons[key] = reason
