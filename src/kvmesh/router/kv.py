"""Policy `kv`: a request goes where it starts soonest, by what the directory says the instances hold.

For each backend, in tokens of prefill:

    cost = work it has been given                     (`load.py`)
         + fetch_cost x tokens it would pull          (held by a peer, not by itself)
         + tokens it would compute                    (held by nobody it shares with)

Where peers can supply the KV anyway, pulling is cheap, the second term hardly differs and the least loaded instance
wins; where they cannot, the holder wins until it is busier than the rest by more than it would save.

The directory learns of a chunk a step after it was computed. Until then the policy remembers for a short time whom it
has given a prefix: otherwise a burst of requests with one new prefix would be computed everywhere.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from kvmesh.router.policies import Candidate, Choice, LeastLoad, Overlap, Query, cheapest
from kvmesh.router.prefix import PrefixMemory

EXPECTED_KEYS = 200_000
"""Keys remembered as given to a backend: at most 20 MB."""
EXPECTED_AGE_S = 30.0
"""So long the directory may take to hear of a chunk; after that it is believed."""


class Kv:
    """See above. Without an overlap it goes by load, and the choice's reason says why."""

    def __init__(self, rng: random.Random, *, fetch_cost: float = 0.3) -> None:
        self._rng = rng
        self._fetch_cost = fetch_cost
        self._by_load = LeastLoad(rng)
        self.expected = PrefixMemory(EXPECTED_KEYS, EXPECTED_AGE_S)

    def choose(self, query: Query, candidates: Sequence[Candidate], now_s: float) -> Choice:
        overlap = query.overlap
        if overlap is None:
            choice = self._by_load.choose(query, candidates, now_s)
            return choice._replace(reason=query.overlap_problem or "no_overlap")
        given = self.expected.match(overlap.keys, [candidate.id for candidate in candidates], now_s)
        expected = {id_: chunks * overlap.chunk_tokens for id_, chunks in given.items()}
        split = [_split(overlap, candidate.id, expected) for candidate in candidates]
        costs = [
            candidate.load.cost_tokens(now_s) + self._fetch_cost * pulled + computed
            for candidate, (_, pulled, computed) in zip(candidates, split, strict=True)
        ]
        index = cheapest(costs, self._rng)
        held, pulled, computed = split[index]
        chosen = candidates[index].id
        self.expected.remember(overlap.keys, chosen, now_s)
        work = computed + round(self._fetch_cost * pulled)
        return Choice(chosen, _reason(held, pulled, split), work, held + pulled)

    def forget(self, backend_id: str) -> None:
        self.expected.forget(backend_id)


def _split(overlap: Overlap, backend_id: str, expected: dict[str, int]) -> tuple[int, int, int]:
    """(held, pulled, computed) tokens of the prompt on one backend."""
    prompt = overlap.prompt_tokens
    held = min(prompt, max(overlap.held_tokens.get(backend_id, 0), expected.get(backend_id, 0)))
    reachable = min(prompt, max(overlap.reachable_tokens.get(backend_id, 0), held))
    return held, reachable - held, prompt - reachable


def _reason(held: int, pulled: int, split: Sequence[tuple[int, int, int]]) -> str:
    if held and held >= pulled:
        return "held"
    if pulled:
        return "peers"
    if held:
        return "held"
    return "busy" if any(other_held or other_pulled for other_held, other_pulled, _ in split) else "nothing_held"
