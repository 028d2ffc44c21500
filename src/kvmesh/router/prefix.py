"""Policy `prefix`: a request goes where a similar beginning went before, unless that backend is too busy.

The prompt's text is cut into blocks; each block's hash covers all blocks before it, so that equal hashes mean equal
beginnings. What a backend was given is remembered in two generations of a table: when the younger one is full or old,
the older one is dropped. That bounds memory and forgets what was not used, without a list of what was used when.
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Iterable, Sequence

from kvmesh.router.policies import Candidate, Choice, Query, cheapest

MAX_HOLDERS = 4
"""Backends remembered per block. A block that more of them have is no reason to prefer one."""


BOOKED_SHARE = 0.5
"""Of the tokens that a backend is guessed to have, so much is believed when its load is counted: engines evict what
they have without a word, and a backend that is thought idle and is not gets ever more (seen in the simulator).
"""


class PrefixMemory:
    """Who was given which prefix. At most `max_entries`, none longer than twice `max_age_s` unused. Pure."""

    def __init__(self, max_entries: int, max_age_s: float) -> None:
        self._half = max(1, max_entries // 2)
        self._max_age_s = max_age_s
        self._young: dict[Hashable, tuple[int, ...]] = {}
        self._old: dict[Hashable, tuple[int, ...]] = {}
        self._young_since_s: float | None = None
        self._serials: dict[str, int] = {}
        """A number for each life of a backend, never used again: what is remembered of a dead one means nobody."""
        self._next_serial = 0

    def __len__(self) -> int:
        return len(self._young) + len(self._old)

    def match(self, keys: Sequence[Hashable], ids: Iterable[str], now_s: float) -> dict[str, int]:
        """How many leading keys each of these backends was given; those with none are left out."""
        self._age(now_s)
        by_serial = {self._serials[id_]: id_ for id_ in ids if id_ in self._serials}
        running, found = set(by_serial), dict[str, int]()
        for length, key in enumerate(keys, start=1):
            running.intersection_update(self._young.get(key) or self._old.get(key, ()))
            if not running:
                break
            for serial in running:
                found[by_serial[serial]] = length
        return found

    def remember(self, keys: Sequence[Hashable], backend_id: str, now_s: float) -> None:
        """A backend was given a prompt with these keys."""
        serial = self._serials.get(backend_id)
        if serial is None:
            serial = self._serials[backend_id] = self._next_serial
            self._next_serial += 1
        for key in keys:
            if len(self._young) >= self._half:
                self._turn_over(now_s)
            known = self._young.get(key) or self._old.get(key, ())
            if known and known[0] == serial:
                self._young[key] = known
                continue
            others = [other for other in known if other != serial]
            self._young[key] = (serial, *others[: MAX_HOLDERS - 1])

    def forget(self, backend_id: str) -> None:
        """Its entries stay until their generation goes, and name nobody."""
        self._serials.pop(backend_id, None)

    def _age(self, now_s: float) -> None:
        if self._young_since_s is None:
            self._young_since_s = now_s
        elif now_s - self._young_since_s > self._max_age_s:
            both = now_s - self._young_since_s > 2 * self._max_age_s
            self._turn_over(now_s)
            if both:
                self._turn_over(now_s)

    def _turn_over(self, now_s: float) -> None:
        self._old, self._young, self._young_since_s = self._young, {}, now_s


class Prefix:
    """The cheapest by work to wait for and tokens to compute, guessing that a backend still has what it was given."""

    def __init__(self, rng: random.Random, *, max_blocks: int = 1_000_000, max_age_s: float = 600.0) -> None:
        self._rng = rng
        self.memory = PrefixMemory(max_blocks, max_age_s)

    def choose(self, query: Query, candidates: Sequence[Candidate], now_s: float) -> Choice:
        matched = self.memory.match(query.blocks, [candidate.id for candidate in candidates], now_s)
        cached = {id_: min(query.prompt_tokens, blocks * query.block_tokens) for id_, blocks in matched.items()}
        costs = [
            candidate.load.cost_tokens(now_s) + query.prompt_tokens - cached.get(candidate.id, 0)
            for candidate in candidates
        ]
        chosen = candidates[cheapest(costs, self._rng)].id
        self.memory.remember(query.blocks, chosen, now_s)
        tokens = cached.get(chosen, 0)
        reason = "prefix" if tokens else "busy" if cached else "load"
        return Choice(chosen, reason, query.prompt_tokens - int(BOOKED_SHARE * tokens), tokens)

    def forget(self, backend_id: str) -> None:
        self.memory.forget(backend_id)
