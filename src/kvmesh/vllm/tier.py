"""`PeerTier`: the secondary tier through which vLLM looks up, fetches and publishes chunks.

All of it runs on the scheduler thread and none of it waits: a lookup reads a set, everything else appends to a queue.
What happens to one request, in vLLM's order:

    lookup (per chunk)  HIT when some other instance is known to hold the chunk
    submit_load         the request's chunks with the slots vLLM allocated for them: a fetch job for the node
    tell                once vLLM knows what it loads: the request's record goes to the node, for explanations
    get_finished_jobs   what has come; those chunks are published in turn, the others will be computed
    submit_store        chunks that this engine has computed: published
"""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Iterable
from typing import Any

from kvmesh.core.gate import GateDecision, Prefill, Verdict, decide
from kvmesh.core.keys import group_of
from kvmesh.core.ledger import SlotLedger
from kvmesh.core.reasons import MissReason
from kvmesh.node.engine_commands import EngineCommands
from kvmesh.node.fetch_jobs import FinishedJob
from kvmesh.node.handle import NodeHandle
from kvmesh.vllm import fingerprint
from kvmesh.vllm.compat import (
    HIT_SOURCE,
    JobResult,
    LookupResult,
    OffloadingConnectorStats,
    OffloadingMetricMetadata,
    OffloadKey,
    ParentManager,
    ReqContext,
    RequestOffloadingContext,
    ScheduleEndContext,
    SecondaryTierManager,
    TieringOffloadingManager,
    TransferJob,
    init_logger,
)
from kvmesh.vllm.connector import FACTS_KEY, tier_config
from kvmesh.vllm.engine import engine_under_construction
from kvmesh.vllm.operated_pool import VllmPool, WarmState
from kvmesh.vllm.policy import _Publishing
from kvmesh.vllm.pool_files import find_segments
from kvmesh.vllm.prefill_watch import PrefillWatch
from kvmesh.vllm.request_records import RequestFacts, RequestState, hash_tokens, make_record
from kvmesh.vllm.tier_metrics import TierMetrics, metric_definitions
from kvmesh.wire.operations import Sharing

logger = init_logger("vllm.kvmesh.tier")

MAX_FAILED_KEYS = 100_000
"""Bound of the negative cache; beyond it the oldest entries go."""
ASK_WAIT_S = 0.1
"""How long a request waits for the directory's answer, which comes within a step of a busy engine."""
SLOW_S = 2.0
"""After an answer that did not come in time, requests ask without waiting for so long."""
ASK_AGAIN_S = 2.0
"""A request that has waited for its turn longer than answers are believed asks once more."""


class PeerTier(SecondaryTierManager):
    """The other instances' pools, as a tier below this engine's own."""

    cache_hit_source = HIT_SOURCE

    def __init__(
        self,
        offloading_spec: Any,
        primary_kv_view: memoryview,
        tier_type: str,
        backpressure_detector: Any = None,
        **unknown: Any,
    ) -> None:
        """Start the node over vLLM's pool. Raises StartupError (busy port, no such address, ...), which ends the
        engine's start.
        """
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        if unknown:
            raise TypeError(f"PeerTier takes no options of its own; found {sorted(unknown)}")
        config = tier_config(offloading_spec)
        self._config = config
        self._policy = config.gate_policy
        self._fetches = config.fetches
        shape = primary_kv_view.shape
        assert shape is not None
        slots, chunk_bytes = shape
        make_format = fingerprint.make_int8_format if config.wire_codec == "int8" else fingerprint.make_format
        kv_format = make_format(
            offloading_spec.extra_config[FACTS_KEY], offloading_spec.config, chunk_bytes=chunk_bytes
        )
        self._chunk_tokens = kv_format.chunk_tokens
        self._chunk_bytes = chunk_bytes
        self.ledger = SlotLedger.create(slots, chunk_bytes)
        address = ctypes.addressof(ctypes.c_char.from_buffer(primary_kv_view))
        self._node = NodeHandle(
            config.to_wire(),
            kv_format,
            self.ledger,
            find_segments(address, slots * chunk_bytes),
            log_level=config.log_level,
        )
        self._node.tokenizer = offloading_spec.extra_config[FACTS_KEY].get("tokenizer", "")
        engine = engine_under_construction()
        self._commands = EngineCommands(
            self._node, make_keys=engine.key_maker(offloading_spec.config), wake=engine.wake
        )
        self._loads: dict[int, TransferJob] = {}
        self._stored: list[JobResult] = []
        self._failed_until_s: dict[OffloadKey, tuple[float, MissReason]] = {}
        self._requests: dict[str, RequestState] = {}
        """Of the requests that vLLM has not finished, by its id."""
        self._slow_until_s = -math.inf
        """The directory was too slow for a request a moment ago: nobody waits for it until then."""
        self._held = False
        """The pool was thrown away, and copies of before may still be under way (see `drain_jobs`)."""
        self._metrics = TierMetrics()
        self._prefill = Prefill(fingerprint.attention(offloading_spec.extra_config[FACTS_KEY]))
        self._watch = PrefillWatch(self._prefill)
        ready = self._node.start()
        logger.info(
            "KVMesh node is up: instance %s, incarnation %s, peers connect to %s:%d; "
            "pool of %d slots x %d bytes, %d tokens per chunk, format %s",
            ready.instance_id,
            ready.incarnation,
            ready.peer_host,
            ready.peer_port,
            slots,
            chunk_bytes,
            self._chunk_tokens,
            kv_format.format_id(),
        )

    @property
    def node(self) -> NodeHandle:
        return self._node

    def on_retract(self, slots: list[int]) -> None:
        """The policy has taken slots back; the ledger says so already."""
        self._node.retract(slots)

    def attach(self, manager: TieringOffloadingManager, policy: _Publishing) -> None:
        """The pool is complete: from now on operators may have something done to it."""
        pool = VllmPool(manager, policy, self._chunk_bytes)
        self._commands.attach(pool, pin_max_share=self._config.pin_max_share)

    def serve_external_requests(self, parent: ParentManager) -> None:
        """Carry out what operators want: the one moment of a step at which no request relies on a lookup."""
        del parent
        self._commands.step()

    # -- SecondaryTierManager: lookups ---------------------------------------------------------------------------------

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        """Nothing to decide: chunks are offered one by one."""
        self._requests[req_context.req_id] = self._request(req_context)
        return RequestOffloadingContext()

    def on_request_finished(self, req_context: ReqContext) -> None:
        """A request that ends before vLLM knew what it would load is told of here."""
        state = self._requests.pop(req_context.req_id, None)
        if state is None or state.told or state.facts is None:
            return
        state.told = True
        self._node.record(
            make_record(req_context.req_id, state, state.facts, chunk_tokens=self._chunk_tokens, ended_early=True)
        )

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        request = self._request(req_context)
        if self._node.state.asks and self._must_wait(key, request, req_context):
            return LookupResult.RETRY
        warm = req_context.get_state(WarmState)
        if warm is None and not request.counted:
            self._watch.looked_up(req_context.req_id, _last_token(req_context), time.monotonic())
        reason = self._miss_reason(key, request, req_context, is_warm=warm is not None)
        if warm is not None:  # an operator's doing: no request has missed anything
            if reason is not None:
                warm.reasons[key] = reason
            return LookupResult.HIT if reason is None else LookupResult.MISS
        if key not in request.counted:
            request.counted.add(key)
            self._metrics.looked_up(reason)
        if reason is not None:
            request.missed[key] = reason
        elif request.missed:
            request.missed.pop(key, None)
        return LookupResult.HIT if reason is None else LookupResult.MISS

    def _must_wait(self, key: OffloadKey, request: RequestState, req_context: ReqContext) -> bool:
        """Whether the answer to who holds the chunk is still out. All chunks of the request are asked for at once; an
        answer comes within a step of a busy engine, and later ones are not waited for.
        """
        state = self._node.state
        if self._node.is_known(key) or not self._fetches or not state.directory_connected:
            return False
        if state.sharing is not Sharing.ON:
            return False
        now_s = time.monotonic()
        if now_s - request.asked_at_s > ASK_AGAIN_S:
            request.asked_at_s = now_s
            keys = list(req_context._offload_key_positions)  # noqa: SLF001  (vLLM keeps the order there only)
            self._node.ask(keys[keys.index(key) :] if key in keys else [key])
        if now_s < self._slow_until_s:
            return False
        if now_s - request.asked_at_s < ASK_WAIT_S:
            return True
        self._slow_until_s = now_s + SLOW_S
        return False

    # -- explanations: called by the connector -------------------------------------------------------------------------

    def meet(self, request: Any) -> None:
        """Learn of a request (vLLM's `Request`) that vLLM has taken in."""
        state = self._requests.get(request.request_id)
        if state is not None:
            state.facts = RequestFacts.of(request)

    def tell(self, request: Any, device_tokens: int, loaded_tokens: int) -> None:
        """Called when vLLM knows how much of the request it has on the device and how much it loads. Only the first
        time counts: what a preempted request finds later is its own.
        """
        state = self._requests.get(request.request_id)
        if state is None or state.told or state.facts is None:
            return
        state.told = True
        self._node.record(
            make_record(
                request.request_id,
                state,
                state.facts,
                chunk_tokens=self._chunk_tokens,
                device_tokens=device_tokens,
                loaded_tokens=loaded_tokens,
                tokens_hash=hash_tokens(request.prompt_token_ids, self._chunk_tokens),
                wait_s=max(0.0, time.monotonic() - state.made_at_s),
            )
        )

    # -- inside --------------------------------------------------------------------------------------------------------

    def _miss_reason(
        self, key: OffloadKey, request: RequestState, req_context: ReqContext, *, is_warm: bool
    ) -> MissReason | None:
        if not self._fetches:
            return MissReason.SHARING_OFF
        if not self._node.is_visible(key):
            return self._why_invisible(key)
        if self._held:
            return MissReason.DRAINING
        if is_warm:
            return None
        if (request.failed and key in request.failed) or (self._failed_until_s and self._failed_recently(key)):
            if key in self._failed_until_s:
                failed_with = self._failed_until_s[key][1].value
                request.details[MissReason.RECENTLY_FAILED] = {"failed_with": failed_with}
            return MissReason.RECENTLY_FAILED
        if request.worthwhile is None:
            request.worthwhile = self._is_worthwhile(key, req_context)
        if not request.worthwhile:
            return MissReason.BELOW_MINIMUM
        if request.gate is None:
            request.gate = self._decide(key, request, req_context)
        if request.until_token < math.inf and (req_context.get_offload_key_position(key) or 0) > request.until_token:
            return MissReason.GATE_REFUSED
        return None

    def _decide(self, first: OffloadKey, request: RequestState, req_context: ReqContext) -> GateDecision:
        """Whether it pays to fetch what peers hold from `first` on, by the fastest of them; the node, which knows who
        holds what, decides again. Once per request; notes in `request` where to stop.
        """
        end = req_context.get_offload_key_position(first)
        request.start_token = max(0, (end or self._chunk_tokens) - self._chunk_tokens)
        source = self._node.fastest() if self._policy.is_on and end is not None else None
        saved = self._prefill.saved(request.start_token, self._chunk_tokens)
        if source is None or source.rate is None or saved is None:
            chunks = 0  # nothing to count for: whatever there is may be fetched
            verdict = Verdict.UNMEASURED if self._policy.is_on else Verdict.OFF
            decision = GateDecision(verdict, chunks, chunks, None, None)
        else:
            source = source._replace(chunks=self._visible_run(first, req_context))
            decision = decide(
                self._policy,
                [source],
                saved,
                chunk_bytes=self._chunk_bytes,
                timeout_s=self._config.fetch_timeout_s,
            )
            if decision.refused:
                request.until_token = request.start_token + decision.chunks * self._chunk_tokens
                request.details[MissReason.GATE_REFUSED] = decision.detail()
                logger.info(
                    "Left %d out of %d tokens that peers hold to be computed (fetch_gate): %s; request %s",
                    decision.refused * self._chunk_tokens,
                    decision.asked * self._chunk_tokens,
                    decision,
                    req_context.req_id,
                )
        self._metrics.decided(decision.verdict)
        return decision

    def _visible_run(self, first: OffloadKey, req_context: ReqContext) -> int:
        """How many chunks from `first` on peers hold without a gap."""
        run = 0
        is_after = False
        for key in req_context._offload_key_positions:  # noqa: SLF001  (vLLM keeps the order there only)
            is_after = is_after or key == first
            if is_after:
                if not self._node.is_visible(key) or group_of(key) != group_of(first):
                    break
                run += 1
        return run

    def _why_invisible(self, key: OffloadKey) -> MissReason:
        reason = self._node.state.why_invisible()
        is_unanswered = reason is MissReason.NOT_PUBLISHED and not self._node.is_known(key)
        return MissReason.DIRECTORY_SLOW if is_unanswered else reason

    def _failed_recently(self, key: OffloadKey) -> bool:
        failed = self._failed_until_s.get(key)
        if failed is None:
            return False
        if time.monotonic() < failed[0]:
            return True
        del self._failed_until_s[key]
        return False

    def _is_worthwhile(self, first: OffloadKey, req_context: ReqContext) -> bool:
        """Whether the peers hold at least `min_retrieve_tokens` from `first` on. Positions are in prefix order within
        a group.
        """
        wanted = self._config.min_retrieve_tokens
        if wanted <= self._chunk_tokens:
            return True
        held = self._visible_run(first, req_context) * self._chunk_tokens
        if held < wanted:
            detail: dict[str, str | float] = {"held_tokens": float(held), "min_retrieve_tokens": float(wanted)}
            self._request(req_context).details[MissReason.BELOW_MINIMUM] = detail
        return held >= wanted

    def _request(self, req_context: ReqContext) -> RequestState:
        request: RequestState | None = req_context.get_state(RequestState)
        if request is None:
            positions = req_context._offload_key_positions  # noqa: SLF001  (as above)
            request = RequestState(positions, made_at_s=time.monotonic())
            req_context.set_state(request)
        return request

    # -- SecondaryTierManager: jobs ------------------------------------------------------------------------------------

    def submit_load(self, job_metadata: TransferJob) -> None:
        slots: list[int] = job_metadata.chunk_ids.tolist()
        for slot in slots:
            self.ledger.retract(slot)  # the policy has done so; a slot that is written into must never be readable
        self._loads[job_metadata.job_id] = job_metadata
        self._watch.fetched(job_metadata.req_context.req_id)
        request = self._request(job_metadata.req_context)
        is_warm = job_metadata.req_context.get_state(WarmState) is not None  # an operator has decided already
        is_gated = self._policy.is_on and not is_warm
        self._node.fetch(
            job_metadata.job_id,
            job_metadata.req_context.req_id,
            list[bytes](job_metadata.keys),
            slots,
            self._config.fetch_timeout_s,
            self._prefill.saved(request.start_token, self._chunk_tokens) if is_gated else None,
        )

    def submit_store(self, job_metadata: TransferJob) -> None:
        """Publish what the engine has computed. Nothing is copied, so the job is done at once and pins nothing."""
        self._held = False
        self._publish(job_metadata.keys, job_metadata.chunk_ids.tolist(), fetched=False)
        ends = map(job_metadata.req_context.get_offload_key_position, job_metadata.keys)
        found = [end for end in ends if end is not None]
        self._watch.stored(job_metadata.req_context.req_id, found, self._chunk_tokens, time.monotonic())
        self._stored.append(JobResult(job_metadata.job_id, True, transfer_time=0.0, transfer_bytes=0))

    def get_finished_jobs(self) -> Iterable[JobResult]:
        self._commands.expire_pins()  # vLLM asks for this before it evicts
        results, self._stored = self._stored, []
        for finished in self._node.take_finished():
            job = self._loads.pop(finished.job_id, None)
            if job is not None:
                results.append(self._finish_load(job, finished))
        return results

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        """For the measurement of prefill."""
        if context.new_req_ids:
            self._watch.scheduled(context.new_req_ids, time.monotonic())
        self._watch.forget(context.preempted_req_ids)

    def has_pending_work(self) -> bool:
        return self._node.has_jobs() or self._commands.has_work()

    def drain_jobs(self) -> None:
        """Called before vLLM throws the pool away. From then on nothing is fetched until a new chunk has been stored.

        vLLM 0.31 and 0.32 let their workers finish old copies into slots that are free again; a completed store says
        that the workers have been flushed since.
        """
        self._held = True
        self._commands.forget()
        self._node.drain()

    def shutdown(self) -> None:
        self._node.close()

    def _publish(self, keys: Iterable[OffloadKey], slots: list[int], *, fetched: bool) -> None:
        for key, slot in zip(keys, slots, strict=True):
            self.ledger.publish(slot, key)
        if slots:
            self._node.publish(slots, fetched=fetched)

    def _finish_load(self, job: TransferJob, finished: FinishedJob) -> JobResult:
        """Publish what has come (fetched chunks spread hot prefixes by use), remember what has not."""
        keys: list[OffloadKey] = list(job.keys)
        slots: list[int] = job.chunk_ids.tolist()
        good = [index for index, reason in enumerate(finished.reasons) if reason is None]
        good_keys = [keys[index] for index in good]
        self._publish(good_keys, [slots[index] for index in good], fetched=True)
        self._remember_failed(
            job.req_context, [(keys[i], reason) for i, reason in enumerate(finished.reasons) if reason is not None]
        )
        warm = job.req_context.get_state(WarmState)
        if warm is not None:
            failed = zip(keys, finished.reasons, strict=True)
            warm.reasons.update({key: reason for key, reason in failed if reason is not None})
        self._metrics.fetched(finished)
        if finished.gate is not None and finished.gate.chunks < finished.gate.asked:
            self._metrics.decided(finished.gate.verdict)
        self._log(job, finished, len(good))
        return JobResult(
            job.job_id,
            success=len(good) == len(keys),
            successful_keys=good_keys,
            transfer_time=finished.seconds,
            transfer_bytes=finished.fetched_bytes,
        )

    def _remember_failed(self, req_context: ReqContext, failed: list[tuple[OffloadKey, MissReason]]) -> None:
        if not failed:
            return
        request = self._request(req_context)
        until_s = time.monotonic() + self._config.negative_cache_s
        for key, reason in failed:
            request.failed.add(key)
            self._failed_until_s[key] = (until_s, reason)
        while len(self._failed_until_s) > MAX_FAILED_KEYS:
            del self._failed_until_s[next(iter(self._failed_until_s))]

    def _log(self, job: TransferJob, finished: FinishedJob, fetched: int) -> None:
        reasons = {reason.value: finished.reasons.count(reason) for reason in finished.reasons if reason is not None}
        logger.info(
            "Retrieved %d out of %d requested tokens from peers. size: %.4f gb, cost %.4f ms, throughput: %.4f GB/s; "
            "request %s, holders %s%s",
            fetched * self._chunk_tokens,
            len(finished.reasons) * self._chunk_tokens,
            finished.fetched_bytes / 1e9,
            finished.seconds * 1e3,
            finished.fetched_bytes / max(finished.seconds, 1e-9) / 1e9,
            job.req_context.req_id,
            ", ".join(finished.holders) or "none",
            f"; missed chunks {reasons}" if reasons else "",
        )

    # -- SecondaryTierManager: metrics ---------------------------------------------------------------------------------

    @classmethod
    def build_metric_definitions(cls, extra_config: dict[str, Any]) -> dict[str, OffloadingMetricMetadata]:
        """What vLLM needs to know of our metrics; the same for every configuration."""
        del extra_config
        return metric_definitions()

    def get_stats(self) -> OffloadingConnectorStats | None:
        return self._metrics.take(self._node, self._prefill)


def _last_token(req_context: ReqContext) -> int:
    """Where the last whole chunk of the prompt ends; at its first lookup, a request has no others."""
    positions = req_context._offload_key_positions  # noqa: SLF001  (as above)
    return next(reversed(positions.values()), 0)
