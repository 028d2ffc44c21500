"""vLLM's host pool, as `kvmesh.node.pool_operations` works on it. Everything here runs on the scheduler thread.

When that is safe. vLLM lets its tiers work in `serve_external_requests`, at the end of each schedule() and before what
was looked up is submitted: no request is between "this chunk is here" and "hold it for me" then, so a chunk whose
reference count is zero can be freed as an eviction would free it, which happens at the same place. Chunks that are
being read or written have another count and are left alone.

What is done how:

- A warm is what a request does, without the request: `on_new_request`, `lookup` of each chunk, which reserves a slot
  and starts the fetch, `on_request_finished`. Deadlines, publishing, reasons and metrics are those of any fetch.
- A pin is a reference, taken and given back as for a transfer to another tier, so that vLLM's eviction passes the chunk
  by without looking at it.
- A clear is an eviction of chosen chunks. vLLM has no call for it; `release` does what its `prepare_store` does with
  evicted chunks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmesh.core.reasons import MissReason
from kvmesh.node.pool_operations import SlotState
from kvmesh.vllm.compat import LookupResult, OffloadingEvent, OffloadKey, ReqContext, TieringOffloadingManager

if TYPE_CHECKING:
    from kvmesh.vllm.policy import _Publishing


class WarmState:
    """What the tier notes in the request context of a warm; requests of users have none."""

    def __init__(self) -> None:
        self.reasons: dict[OffloadKey, MissReason] = {}
        """Why chunks did not come."""


class VllmPool:
    """The primary tier of one engine."""

    def __init__(self, manager: TieringOffloadingManager, policy: _Publishing, chunk_bytes: int) -> None:
        self._manager = manager
        self._primary = manager.primary_tier
        self._policy = policy
        self._pins = ReqContext(req_id="kvmesh-pins")
        self._warms: dict[str, ReqContext] = {}
        self.slots: int = self._primary._num_chunks  # noqa: SLF001 - vLLM tells it nobody
        self.chunk_bytes = chunk_bytes

    def keys(self) -> list[bytes]:
        return self._policy.all_keys()

    def hottest(self, limit: int) -> list[bytes]:
        return self._policy.most_recent(limit)

    def state(self, key: bytes) -> SlotState:
        chunk = self._policy.get(OffloadKey(key))
        if chunk is None:
            return SlotState.ABSENT
        if not chunk.is_ready:
            return SlotState.WRITING
        return SlotState.BUSY if chunk.ref_cnt else SlotState.READY

    def release(self, keys: list[bytes]) -> None:
        released = [OffloadKey(key) for key in keys]
        chunks = self._policy.remove_all(released)
        primary = self._primary
        primary._num_evictable_cache_chunks -= len(chunks)  # noqa: SLF001 - as vLLM does for what it evicts
        for chunk in chunks:
            primary._free_chunk(chunk)  # noqa: SLF001  (as above)
        if released and primary.events is not None:
            primary.events.append(OffloadingEvent(keys=released, medium=primary.medium, removed=True))

    def hold(self, key: bytes) -> None:
        self._primary.prepare_read([OffloadKey(key)], self._pins)

    def let_go(self, key: bytes) -> None:
        self._primary.complete_read([OffloadKey(key)], self._pins)

    def begin_warm(self, operation_id: str) -> None:
        context = self._warms[operation_id] = ReqContext(req_id=f"warm-{operation_id}")
        self._manager.on_new_request(context)
        context.set_state(WarmState())

    def pull(self, operation_id: str, key: bytes) -> MissReason | None:
        context, chunk_key = self._warms[operation_id], OffloadKey(key)
        context.set_offload_key_position(chunk_key, len(context._offload_key_positions) + 1)  # noqa: SLF001
        if self._manager.lookup(chunk_key, context) is not LookupResult.MISS:
            return None
        return self.pulled(operation_id, key) or MissReason.POOL_FULL

    def pulled(self, operation_id: str, key: bytes) -> MissReason | None:
        state = self._warms[operation_id].get_state(WarmState)
        return None if state is None else state.reasons.get(OffloadKey(key))

    def end_warm(self, operation_id: str) -> None:
        self._manager.on_request_finished(self._warms.pop(operation_id))
