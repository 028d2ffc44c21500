"""Policies: who gets a request. Pure: no clock, no I/O, randomness from a generator that is handed in.

    roundrobin   in turns
    leastload    the one with the least work, see `load.py`
    session      the same one for the same session, as long as it is there
    prefix       the one that has seen a similar beginning, weighed against its load (`prefix.py`)
    kv           as prefix, but by what the directory says the instances hold (`kv.py`)

The same classes run in the router and in the simulator (`kvmesh.bench.simulator`).
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import xxhash

from kvmesh.router.load import Load

TIE_SHARE = 0.02
"""Costs that differ by less are equal: the choice among them is random, so that routers do not march in step."""


class Candidate(Protocol):
    """A backend as policies see it."""

    @property
    def id(self) -> str: ...

    @property
    def load(self) -> Load: ...


class Overlap(NamedTuple):
    """What of a prompt is held where."""

    prompt_tokens: int
    held_tokens: Mapping[str, int]
    """Leading tokens in a backend's own pool, by backend id; zeros may be left out."""
    reachable_tokens: Mapping[str, int]
    """Leading tokens that a backend has or can pull from its peers, by backend id."""
    keys: Sequence[Hashable] = ()
    """Names of the prompt's whole chunks, so that the policy can remember who was given them."""
    chunk_tokens: int = 0


@dataclass(frozen=True)
class Query:
    """What a policy may know of a request."""

    prompt_tokens: int = 0
    """About how long the prompt is."""
    session: str | None = None
    blocks: Sequence[Hashable] = ()
    """Chained hashes of the prompt's text in blocks, for `prefix`."""
    block_tokens: int = 0
    """About how many tokens a block is."""
    overlap: Overlap | None = None
    """For `kv`; None with a reason why it is not known."""
    overlap_problem: str = ""


class Choice(NamedTuple):
    """Who gets the request."""

    id: str
    reason: str
    """Why, in one word: for metrics."""
    work_tokens: int
    """Prefill that is expected of it."""
    cached_tokens: int = 0
    """Tokens that it is expected to have or to pull."""


class Policy(Protocol):
    """One way to choose. Owned by one thread."""

    def choose(self, query: Query, candidates: Sequence[Candidate], now_s: float) -> Choice:
        """One of `candidates`, of which there is at least one. May remember what it chose."""

    def forget(self, backend_id: str) -> None:
        """The backend is gone for good."""


class RoundRobin:
    """The one that has waited longest for its turn, so that it stays fair while backends come and go."""

    def __init__(self) -> None:
        self._turns: dict[str, int] = {}
        self._turn = 0

    def choose(self, query: Query, candidates: Sequence[Candidate], now_s: float) -> Choice:
        del now_s
        turns = self._turns
        chosen = min(candidates, key=lambda candidate: turns.get(candidate.id, 0)).id
        self._turn += 1
        turns[chosen] = self._turn
        return Choice(chosen, "turn", query.prompt_tokens)

    def forget(self, backend_id: str) -> None:
        self._turns.pop(backend_id, None)


class LeastLoad:
    """The one with the least work."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def choose(self, query: Query, candidates: Sequence[Candidate], now_s: float) -> Choice:
        costs = [candidate.load.cost_tokens(now_s) for candidate in candidates]
        chosen = candidates[cheapest(costs, self._rng)].id
        return Choice(chosen, "load", query.prompt_tokens)

    def forget(self, backend_id: str) -> None:
        """Nothing is remembered."""


class Session:
    """Consistent hashing (rendezvous: the backend whose hash together with the session's is highest): a session stays
    where it is while backends come and go, except those of one that went.

    A request without a session goes by load.
    """

    def __init__(self, rng: random.Random) -> None:
        self._without_session = LeastLoad(rng)
        self._seeds: dict[str, int] = {}

    def choose(self, query: Query, candidates: Sequence[Candidate], now_s: float) -> Choice:
        if query.session is None:
            return self._without_session.choose(query, candidates, now_s)._replace(reason="no_session")
        session = query.session.encode("utf-8", "surrogatepass")
        weights = [xxhash.xxh3_64_intdigest(session, self._seed(candidate.id)) for candidate in candidates]
        chosen = candidates[weights.index(max(weights))].id
        return Choice(chosen, "session", query.prompt_tokens)

    def forget(self, backend_id: str) -> None:
        self._seeds.pop(backend_id, None)

    def _seed(self, backend_id: str) -> int:
        seed = self._seeds.get(backend_id)
        if seed is None:
            seed = self._seeds[backend_id] = xxhash.xxh3_64_intdigest(backend_id.encode())
        return seed


def cheapest(costs: Sequence[float], rng: random.Random) -> int:
    """Index of the lowest cost; a random one of those that are about as low."""
    limit = min(costs)
    limit += TIE_SHARE * abs(limit)
    equal = [index for index, cost in enumerate(costs) if cost <= limit]
    return equal[0] if len(equal) == 1 else rng.choice(equal)
