"""vLLM's own tiering manager with our spec, tier and policy, called as its scheduler does; only the node is a fake."""

from __future__ import annotations

from vllm.v1.kv_offload.base import LookupResult, ReqContext, ScheduleEndContext

from kvmesh.vllm.spec import KVMeshSpec
from support.vllm_fakes import FakeNode, configured_extra, make_offloading_config

SLOTS = 4
PAGE_BYTES = 1024  # of one block; four blocks are one chunk and one page of memory


class Engine:
    """The calls of vLLM's scheduler for one request after the other."""

    def __init__(self, **keys: object) -> None:
        extra = configured_extra(pool_size_gb=SLOTS * 4096 / 1024**3, **keys)
        self.manager = KVMeshSpec(make_offloading_config(extra=extra, page_bytes=PAGE_BYTES)).get_manager()
        (self.tier,) = self.manager.secondary_tiers
        self.node: FakeNode = self.tier.node
        self.requests = 0

    def request(self, *keys: bytes) -> ReqContext:
        self.requests += 1
        context = ReqContext(f"r{self.requests}")
        for position, key in enumerate(keys):
            context.set_offload_key_position(key, (position + 1) * 64)
        self.manager.on_new_request(context)
        return context

    def look_up(self, context: ReqContext, *keys: bytes) -> list[LookupResult]:
        found = [self.manager.lookup(key, context) for key in keys]
        self.step()
        return found

    def step(self) -> None:
        self.manager.on_schedule_end(ScheduleEndContext(new_req_ids=(), preempted_req_ids=()))

    def compute(self, *keys: bytes) -> list[int]:
        """A request whose chunks are computed and stored; the slots that they went to."""
        context = self.request(*keys)
        output = self.manager.prepare_store(keys, context)
        self.manager.complete_store(output.keys_to_store, context)
        self.manager.on_request_finished(context)
        self.step()
        self.step()  # vLLM polls the tiers at most once per step
        return output.store_spec.chunk_ids.tolist()

    def readable(self) -> dict[bytes, int]:
        ledger = self.tier.ledger
        return {record.key: slot for slot in range(SLOTS) if (record := ledger.read(slot)) is not None}
