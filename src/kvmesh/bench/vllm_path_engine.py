"""The measured process of `kvmesh bench vllm-path`: vLLM with its engine core in this process, and a clock around it.

Runs as `python -m kvmesh.bench.vllm_path_engine`, because vLLM and its worker are best ended with the process that
started them. What is measured is what the scheduler thread of a server does between two steps of the model:
`Scheduler.schedule` and `Scheduler.update_from_output`, which hold every call into a connector but the worker's.
"""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from kvmesh.wire import link

KEY_BYTES, GROUP_BYTES = 32, 4
TIER_CALLS = (
    "on_new_request",
    "lookup",
    "submit_load",
    "submit_store",
    "get_finished_jobs",
    "on_schedule_end",
    "serve_external_requests",
    "has_pending_work",
    "get_stats",
    "meet",
    "tell",
    "on_request_finished",
)
"""What vLLM and our connector call of a tier, all of it on the scheduler thread."""
LOOKUP_CHUNKS = 400
"""Of one request that is looked up: 100,000 tokens."""
LOOKUP_ROUNDS = 50
VISIBLE_BATCH = 20_000
"""Keys of one message from the node, as the node sends them."""


class EngineOptions(msgspec.Struct):
    """On standard input, as JSON."""

    model: str
    connector: bool
    requests: int
    prompt_tokens: int
    output_tokens: int
    at_a_time: int
    visible: int
    """Chunks that other instances are made to hold, beside those that they do; none without sharing."""


class CallTime(msgspec.Struct):
    """One function of the tier, over all steps."""

    name: str
    each_s: list[float]


class EngineTimes(msgspec.Struct):
    """What was measured, on standard output, as JSON."""

    steps: int
    step_s: list[float]
    """What the scheduler thread did in each step besides waiting for the model."""
    prefill_step_s: list[float]
    """Those of them in which a request was scheduled for the first time."""
    calls: list[CallTime]
    hit_s: list[float]
    """Per chunk, for each of some lookups of a request's chunks, all of which a peer holds."""
    miss_s: list[float]
    """The same for chunks that nobody holds, each by a request of its own."""
    set_s: list[float]
    """A yardstick in the same process: a bare set of as many keys."""


class _Clock:
    """Notes what calls take. One thread."""

    def __init__(self) -> None:
        self.each_s: dict[str, list[float]] = {}

    def wrap(self, owner: Any, name: str) -> None:
        inner: Callable[..., Any] = getattr(owner, name)
        each_s = self.each_s.setdefault(name, [])

        def timed(*args: Any, **kwargs: Any) -> Any:
            started_s = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                each_s.append(time.perf_counter() - started_s)

        setattr(owner, name, timed)


class _Steps(NamedTuple):
    all_s: list[float]
    prefill_s: list[float]


@contextmanager
def _timed_steps(scheduler: Any) -> Iterator[_Steps]:
    """While the block runs, what the scheduler does in each step is timed."""
    steps = _Steps([], [])
    schedule, update = scheduler.schedule, scheduler.update_from_output
    begun: dict[str, Any] = {}

    def timed_schedule(*args: Any, **kwargs: Any) -> Any:
        started_s = time.perf_counter()
        output = schedule(*args, **kwargs)
        begun["s"], begun["new"] = time.perf_counter() - started_s, bool(output.scheduled_new_reqs)
        return output

    def timed_update(*args: Any, **kwargs: Any) -> Any:
        started_s = time.perf_counter()
        outputs = update(*args, **kwargs)
        took_s = begun.get("s", 0.0) + time.perf_counter() - started_s
        (steps.prefill_s if begun.get("new") else steps.all_s).append(took_s)
        return outputs

    scheduler.schedule, scheduler.update_from_output = timed_schedule, timed_update
    try:
        yield steps
    finally:
        scheduler.schedule, scheduler.update_from_output = schedule, update


def measure(options: EngineOptions) -> EngineTimes:
    """Run the workload. The connector's configuration is in KVMESH_CONFIG_FILE, as for a server."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams  # noqa: PLC0415 - takes seconds, and the variable above must be set
    from vllm.config import KVTransferConfig  # noqa: PLC0415 - as above

    connector = KVTransferConfig(kv_connector="KVMeshConnector", kv_role="kv_both") if options.connector else None
    llm = LLM(
        model=options.model,
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=options.prompt_tokens + options.output_tokens + 16,
        max_num_seqs=options.at_a_time,
        enable_prefix_caching=False,
        kv_transfer_config=connector,
        disable_log_stats=True,
    )
    core: Any = llm.llm_engine.engine_core
    scheduler = core.engine_core.scheduler
    tier = _find_tier(scheduler)
    keys = _keys(options.visible, seed=1) if tier is not None else []
    if tier is not None:
        show(tier.node, keys)
    chosen = random.Random(2)
    prompts = [
        {"prompt_token_ids": chosen.choices(range(10, 1000), k=options.prompt_tokens)} for _ in range(options.requests)
    ]
    sampling = SamplingParams(temperature=0.0, max_tokens=options.output_tokens, ignore_eos=True)
    llm.generate(prompts[:2], sampling, use_tqdm=False)  # whatever happens only once
    clock = _Clock()
    for name in TIER_CALLS if tier is not None else ():
        clock.wrap(tier, name)
    with _timed_steps(scheduler) as steps:
        llm.generate(prompts[2:], sampling, use_tqdm=False)
    times = EngineTimes(
        steps=len(steps.all_s) + len(steps.prefill_s),
        step_s=steps.all_s + steps.prefill_s,
        prefill_step_s=steps.prefill_s,
        calls=[CallTime(name, each_s) for name, each_s in clock.each_s.items()],
        hit_s=[],
        miss_s=[],
        set_s=[],
    )
    if tier is not None:
        for name in TIER_CALLS:
            delattr(tier, name)  # the lookups below are measured without a clock around each
        times.hit_s = [_lookup_s(tier, chunks) for chunks in _samples(keys)]
        unknown = _keys(LOOKUP_CHUNKS * 4, seed=3)
        times.miss_s = [_lookup_s(tier, [key]) for key in unknown]
        times.set_s = [_set_s(set(keys), chunks) for chunks in _samples(keys)[:5]]
    return times


def show(node: Any, keys: Sequence[bytes]) -> None:
    """Have the engine's end of the link learn that others hold these, as it would from the node's messages."""
    for start in range(0, len(keys), VISIBLE_BATCH):
        message = link.encode(link.Visible(list(keys[start : start + VISIBLE_BATCH]), [], reset=False))
        node._on_message(link.to_engine_decoder.decode(message))  # noqa: SLF001 - the way in is a socket of its own


def _keys(count: int, *, seed: int) -> list[bytes]:
    chance = random.Random(seed)
    return [chance.randbytes(KEY_BYTES) + bytes(GROUP_BYTES) for _ in range(count)]


def _samples(keys: Sequence[bytes]) -> list[list[bytes]]:
    chance = random.Random(4)
    return [chance.sample(keys, min(LOOKUP_CHUNKS, len(keys))) for _ in range(LOOKUP_ROUNDS)]


def _lookup_s(tier: Any, keys: Sequence[bytes]) -> float:
    """Seconds per chunk of a request's first lookup, with what the gate does once."""
    from kvmesh.vllm.compat import LookupResult, ReqContext  # noqa: PLC0415 - as above

    context = ReqContext(f"bench-{random.getrandbits(64):x}")
    for position, key in enumerate(keys, start=1):
        context.set_offload_key_position(key, position * 256)
    tier.on_new_request(context)
    started_s = time.perf_counter()
    found = [tier.lookup(key, context) for key in keys]
    seconds = time.perf_counter() - started_s
    tier.on_request_finished(context)
    assert found.count(LookupResult.RETRY) == 0
    return seconds / len(keys)


def _set_s(visible: set[bytes], keys: Sequence[bytes]) -> float:
    started_s = time.perf_counter()
    found = [key in visible for key in keys]
    seconds = time.perf_counter() - started_s
    assert all(found)
    return seconds / len(keys)


def _find_tier(scheduler: Any) -> Any:
    connector = getattr(scheduler, "connector", None)
    return getattr(connector, "_tier", None)


def main() -> int:
    """Measure, print, and end without waiting for vLLM's threads."""
    options = msgspec.json.decode(sys.stdin.buffer.read(), type=EngineOptions)
    out = os.dup(1)
    os.dup2(2, 1)  # vLLM prints to standard output too
    times = measure(options)
    with Path(f"/proc/self/fd/{out}").open("wb") as file:
        file.write(msgspec.json.encode(times))
    return 0


if __name__ == "__main__":
    sys.exit(main())
