"""A fleet of engines on a virtual clock: what routing and sharing make of a stream of requests, for millions of chunks.

What is real here: the router's policies (`kvmesh.router`), which get the same queries as in the router. The rest is a
model:

    instance   prefills one prompt at a time, first come first served; a prompt takes tokens / rate, and the attention
               to all tokens before; decoding takes so long per token and disturbs nobody
    pool       whole chunks in host memory, least recently used goes first; a prefix is used up to its first hole
    fetch      when a prompt's turn comes, chunks that only others hold are pulled over both ends' links, which carry
               one fetch after another; other prompts are prefilled meanwhile; a pull slower than computing is not made
    directory  knows of a chunk some time after it was computed, and of an eviction at once

The model leaves out what hardly depends on routing: batches, GPU caches above the pool, stale entries.
"""

from __future__ import annotations

import heapq
import random
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple

from kvmesh.router.kv import Kv
from kvmesh.router.load import Load, Ticket
from kvmesh.router.policies import LeastLoad, Overlap, Policy, Query, RoundRobin, Session
from kvmesh.router.prefix import Prefix

SIMULATED_POLICIES = ("roundrobin", "leastload", "session", "prefix", "kv")
GATE_MARGIN = 0.15
"""A pull must be so much faster than computing (kvmesh's fetch gate)."""


class SimRequest(NamedTuple):
    """One request of a trace."""

    at_s: float
    prompt_tokens: int
    output_tokens: int
    chunks: Sequence[int]
    """Names of the prompt's whole chunks, in order; equal names mean equal prefixes."""
    session: str = ""


@dataclass(frozen=True)
class Fleet:
    """The machines."""

    instances: int = 8
    pool_chunks: int = 0
    """Per instance; 0: unlimited."""
    chunk_tokens: int = 512
    kv_bytes_per_token: int = 131_072
    prefill_tokens_per_s: float = 20_000.0
    attention_s_per_token2: float = 0.0
    """Seconds for each pair of tokens that attend to each other, on top of the rate."""
    decode_s_per_token: float = 0.02
    link_bytes_per_s: float = 25e9 / 8
    """Of an instance, in each direction."""
    fetch_latency_s: float = 0.002
    directory_delay_s: float = 0.05

    @property
    def chunk_bytes(self) -> int:
        return self.chunk_tokens * self.kv_bytes_per_token

    @property
    def fetch_cost(self) -> float:
        """Pulling a token's KV, of computing it."""
        return self.kv_bytes_per_token / self.link_bytes_per_s * self.prefill_tokens_per_s

    def prefill_s(self, cached_tokens: int, prompt_tokens: int) -> float:
        """Time to prefill the rest of a prompt."""
        new = prompt_tokens - cached_tokens
        pairs = (prompt_tokens**2 - cached_tokens**2) / 2
        return new / self.prefill_tokens_per_s + pairs * self.attention_s_per_token2


@dataclass(frozen=True)
class Outcome:
    """What came of a replay. Tokens are those of prompts; times are in seconds of the virtual clock."""

    policy: str
    sharing: bool
    instances: int
    pool_chunks: int
    requests: int
    prompt_tokens: int
    local_tokens: int
    peer_tokens: int
    moved_bytes: int
    gated_tokens: int
    """Held by a peer and computed all the same, because that was faster."""
    ttft_s: list[float] = field(repr=False)
    busiest_of_mean: float
    """Prefill time of the busiest instance, of the mean: 1 is perfect balance."""
    utilisation: float
    """Prefill time of all instances, of the time the replay took."""
    duration_s: float

    @property
    def hit_rate(self) -> float:
        return (self.local_tokens + self.peer_tokens) / max(1, self.prompt_tokens)

    @property
    def local_hit_rate(self) -> float:
        return self.local_tokens / max(1, self.prompt_tokens)

    def ttft(self, share: float) -> float:
        """A percentile of the time to the first token: `share` 0.5 is the median."""
        ordered = sorted(self.ttft_s)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0

    @property
    def mean_ttft_s(self) -> float:
        return sum(self.ttft_s) / max(1, len(self.ttft_s))


class _Job:
    """A request on its instance."""

    __slots__ = ("cached_tokens", "request", "ticket")

    def __init__(self, request: SimRequest, ticket: Ticket) -> None:
        self.request = request
        self.ticket = ticket
        self.cached_tokens = 0


class _Instance:
    """One engine with its pool; what policies see of it is `id` and `load`."""

    def __init__(self, number: int, half_life_s: float) -> None:
        self.id = f"instance-{number}"
        self.bit = 1 << number
        self.load = Load(half_life_s)
        self.pool: OrderedDict[int, None] = OrderedDict()
        self.waiting: deque[_Job] = deque()
        self.fetched: deque[_Job] = deque()
        self.is_prefilling = False
        self.prefill_s = 0.0
        self.upload_free_s = 0.0
        self.download_free_s = 0.0


class Simulator:
    """Replays requests once. Deterministic for a seed."""

    def __init__(
        self, fleet: Fleet, policy: str, *, sharing: bool, seed: int = 1, recent_half_life_s: float = 5.0
    ) -> None:
        self._fleet = fleet
        self._policy_name = policy
        self._sharing = sharing
        self._instances = [_Instance(number, recent_half_life_s) for number in range(fleet.instances)]
        self._by_id = {instance.id: instance for instance in self._instances}
        self._policy = make_policy(policy, random.Random(seed), fleet.fetch_cost if sharing else 1.0)
        self._masks: dict[int, int] = {}
        """Holders of each chunk, as bits, as the directory knows them."""
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()
        self._now_s = 0.0
        self._ttft_s: list[float] = []
        self._prompt_tokens = self._local_tokens = self._peer_tokens = self._gated_tokens = self._moved_bytes = 0

    def run(self, requests: Iterable[SimRequest]) -> Outcome:
        """Replay all requests, which come in the order of their times."""
        arrivals = iter(requests)
        coming = next(arrivals, None)
        first_s = self._now_s = coming.at_s if coming is not None else 0.0
        while coming is not None or self._events:
            if coming is not None and (not self._events or coming.at_s <= self._events[0][0]):
                self._now_s = max(self._now_s, coming.at_s)
                self._arrive(coming)
                coming = next(arrivals, None)
                continue
            self._now_s, _, happen = heapq.heappop(self._events)
            happen()
        return self._outcome(self._now_s - first_s)

    def check_integrity(self) -> None:
        """Raise AssertionError when pools and directory disagree; for tests, after `run`."""
        for chunk, mask in self._masks.items():
            assert mask
            for instance in self._instances:
                assert not mask & instance.bit or chunk in instance.pool
        for instance in self._instances:
            assert not instance.load.inflight
            assert not instance.load.waiting_tokens
            assert not self._fleet.pool_chunks or len(instance.pool) <= self._fleet.pool_chunks

    def _later(self, seconds: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self._now_s + seconds, next(self._numbers), happen))

    # -- routing -------------------------------------------------------------------------------------------------------

    def _arrive(self, request: SimRequest) -> None:
        query = Query(
            prompt_tokens=request.prompt_tokens,
            session=request.session or None,
            blocks=request.chunks if self._policy_name == "prefix" else (),
            block_tokens=self._fleet.chunk_tokens,
            overlap=self._overlap(request) if self._policy_name == "kv" else None,
        )
        choice = self._policy.choose(query, self._instances, self._now_s)
        instance = self._by_id[choice.id]
        instance.waiting.append(_Job(request, instance.load.start(choice.work_tokens, self._now_s)))
        self._prompt_tokens += request.prompt_tokens
        self._proceed(instance)

    def _overlap(self, request: SimRequest) -> Overlap:
        """What the controller's lookup answers."""
        size = self._fleet.chunk_tokens
        running, together, own = (1 << len(self._instances)) - 1, 0, dict[str, int]()
        for length, chunk in enumerate(request.chunks):
            mask = self._masks.get(chunk, 0)
            lost = running & ~mask
            if lost:
                for instance in self._instances:
                    if lost & instance.bit:
                        own[instance.id] = length * size
                running &= mask
            if not mask:
                break
            together = length + 1
        for instance in self._instances:
            if running & instance.bit:
                own[instance.id] = len(request.chunks) * size
        reachable = {instance.id: together * size for instance in self._instances} if self._sharing else own
        return Overlap(request.prompt_tokens, own, reachable, request.chunks, size)

    # -- instances -----------------------------------------------------------------------------------------------------

    def _proceed(self, instance: _Instance) -> None:
        """Start the next prefill, and the fetches of those whose turn comes."""
        while not instance.is_prefilling:
            if instance.fetched:
                self._prefill(instance, instance.fetched.popleft())
            elif instance.waiting:
                self._take_up(instance, instance.waiting.popleft())
            else:
                return

    def _take_up(self, instance: _Instance, job: _Job) -> None:
        """Look up what is there: in the own pool, then at peers."""
        fleet, request = self._fleet, job.request
        pool, masks, others = instance.pool, self._masks, ~instance.bit
        local = held = 0
        pulled: list[int] = []
        for chunk in request.chunks:
            if chunk in pool:
                local += 1
                held = held + 1 if not pulled else held
            elif self._sharing and masks.get(chunk, 0) & others:
                pulled.append(chunk)
            else:
                break
        pulls = len(pulled) * fleet.chunk_tokens
        if pulled and not self._pays(instance, pulled, job):
            self._gated_tokens += pulls
            local, pulls, pulled = held, 0, []
        # The last token of a prompt is computed in any case.
        job.cached_tokens = min(request.prompt_tokens - 1, local * fleet.chunk_tokens + pulls)
        from_peers = min(pulls, job.cached_tokens)
        self._peer_tokens += from_peers
        self._local_tokens += job.cached_tokens - from_peers
        if not pulled:
            self._prefill(instance, job)
            return
        self._moved_bytes += len(pulled) * fleet.chunk_bytes
        until_s = self._reserve_links(instance, pulled)

        def arrived() -> None:
            instance.fetched.append(job)
            self._proceed(instance)

        self._later(until_s - self._now_s, arrived)

    def _pays(self, instance: _Instance, pulled: Sequence[int], job: _Job) -> bool:
        """Whether pulling is faster than computing, by what the links have to do already."""
        fleet = self._fleet
        tokens = len(pulled) * fleet.chunk_tokens
        size_bytes = tokens * fleet.kv_bytes_per_token
        wait_s = max(0.0, instance.download_free_s - self._now_s)
        fetch_s = fleet.fetch_latency_s + wait_s + size_bytes / fleet.link_bytes_per_s
        end = min(job.request.prompt_tokens, len(job.request.chunks) * fleet.chunk_tokens)
        return fetch_s < (1 - GATE_MARGIN) * fleet.prefill_s(max(0, end - tokens), end)

    def _reserve_links(self, instance: _Instance, pulled: Sequence[int]) -> float:
        """Spread a fetch over the holders that have the least to send; returns when it is complete."""
        fleet = self._fleet
        seconds = fleet.chunk_bytes / fleet.link_bytes_per_s
        ends: dict[int, float] = {}
        for chunk in pulled:
            mask = self._masks.get(chunk, 0) & ~instance.bit
            best, best_s = -1, float("inf")
            while mask:
                number = (mask & -mask).bit_length() - 1
                mask &= mask - 1
                free_s = ends.get(number, max(self._now_s, self._instances[number].upload_free_s))
                if free_s < best_s:
                    best, best_s = number, free_s
            ends[best] = best_s + seconds
        for number, end_s in ends.items():
            self._instances[number].upload_free_s = end_s
        start_s = max(self._now_s, instance.download_free_s)
        instance.download_free_s = start_s + len(pulled) * seconds
        return fleet.fetch_latency_s + max(instance.download_free_s, *ends.values())

    def _prefill(self, instance: _Instance, job: _Job) -> None:
        instance.is_prefilling = True
        seconds = self._fleet.prefill_s(job.cached_tokens, job.request.prompt_tokens)
        instance.prefill_s += seconds

        def done() -> None:
            instance.is_prefilling = False
            self._ttft_s.append(self._now_s - job.request.at_s)
            job.ticket.first_byte()
            self._store(instance, job.request.chunks)
            self._later(job.request.output_tokens * self._fleet.decode_s_per_token, job.ticket.end)
            self._proceed(instance)

        self._later(seconds, done)

    def _store(self, instance: _Instance, chunks: Sequence[int]) -> None:
        """The prompt's chunks are in the pool now, the last ones used last."""
        pool, new = instance.pool, []
        for chunk in chunks:
            if chunk in pool:
                pool.move_to_end(chunk)
            else:
                pool[chunk] = None
                new.append(chunk)
        if self._fleet.pool_chunks:
            while len(pool) > self._fleet.pool_chunks:
                gone, _ = pool.popitem(last=False)
                self._retract(instance, gone)

        def publish() -> None:
            for chunk in new:
                if chunk in pool:
                    self._masks[chunk] = self._masks.get(chunk, 0) | instance.bit

        if new:
            self._later(self._fleet.directory_delay_s, publish)

    def _retract(self, instance: _Instance, chunk: int) -> None:
        mask = self._masks.get(chunk, 0) & ~instance.bit
        if mask:
            self._masks[chunk] = mask
        else:
            self._masks.pop(chunk, None)

    def _outcome(self, duration_s: float) -> Outcome:
        busy = [instance.prefill_s for instance in self._instances]
        mean_s = sum(busy) / len(busy)
        return Outcome(
            policy=self._policy_name,
            sharing=self._sharing,
            instances=len(self._instances),
            pool_chunks=self._fleet.pool_chunks,
            requests=len(self._ttft_s),
            prompt_tokens=self._prompt_tokens,
            local_tokens=self._local_tokens,
            peer_tokens=self._peer_tokens,
            moved_bytes=self._moved_bytes,
            gated_tokens=self._gated_tokens,
            ttft_s=self._ttft_s,
            busiest_of_mean=max(busy) / mean_s if mean_s else 1.0,
            utilisation=mean_s / duration_s if duration_s else 0.0,
            duration_s=duration_s,
        )


def make_policy(name: str, rng: random.Random, fetch_cost: float) -> Policy:
    """One of SIMULATED_POLICIES. Raises KeyError for others."""
    makers: dict[str, Callable[[], Policy]] = {
        "roundrobin": RoundRobin,
        "leastload": lambda: LeastLoad(rng),
        "session": lambda: Session(rng),
        "prefix": lambda: Prefix(rng),
        "kv": lambda: Kv(rng, fetch_cost=min(1.0, fetch_cost)),
    }
    return makers[name]()
