"""What a node remembers beyond the present, so that it can say why a chunk is missing: keys that were held and are
gone, keys that were asked for and not found, and contexts in which the same tokens were seen.

Each memory is bounded and forgets the oldest first. Keys are remembered by their hash in this process, 8 bytes for 36.
Pure: time is passed in. Owned by the node's event loop.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

MAX_GONE = 50_000
MAX_ASKED = 20_000
MAX_TEXTS = 4_096
MAX_CONTEXTS = 4
"""Per text."""


class Gone(NamedTuple):
    """The last holder of a chunk that nobody is known to hold now."""

    instance_id: str
    at_s: float
    why: str
    """`evicted`, or why the instance is no member any more: `left`, `timeout`, `replaced`."""


class Context(NamedTuple):
    """One context of a text: the key of its first chunk, and what entered that key beside the tokens."""

    first_key: int
    separated_by: tuple[str, ...]


class Memory:
    """Bounded memories of keys."""

    def __init__(self) -> None:
        self._gone: OrderedDict[int, Gone] = OrderedDict()
        self._asked: OrderedDict[int, float] = OrderedDict()
        self._texts: OrderedDict[bytes, list[Context]] = OrderedDict()

    def lost(self, keys: Sequence[bytes], instance_id: str, why: str, now_s: float) -> None:
        """`instance_id` was the last known holder of these keys."""
        gone = Gone(instance_id, now_s, why)
        for key in keys[-MAX_GONE:]:
            known = hash(key)
            self._gone.pop(known, None)
            self._gone[known] = gone
        while len(self._gone) > MAX_GONE:
            self._gone.popitem(last=False)

    def gone(self, key: bytes) -> Gone | None:
        """Who held the key last, as far as remembered."""
        return self._gone.get(hash(key))

    def asked(self, keys: Iterable[bytes], now_s: float) -> None:
        """Somebody asked this instance for these keys in vain: it is about to compute them."""
        for key in keys:
            known = hash(key)
            self._asked.pop(known, None)
            self._asked[known] = now_s
        while len(self._asked) > MAX_ASKED:
            self._asked.popitem(last=False)

    def asked_at_s(self, key: bytes) -> float | None:
        """When this instance was last asked for the key in vain."""
        return self._asked.get(hash(key))

    def note_text(self, tokens_hash: bytes, first_key: bytes, separated_by: Sequence[str]) -> None:
        """A request began with these tokens, whose first chunk has this key."""
        contexts = self._texts.setdefault(tokens_hash, [])
        self._texts.move_to_end(tokens_hash)
        context = Context(hash(first_key), tuple(separated_by))
        if context in contexts:
            return
        contexts.append(context)
        del contexts[:-MAX_CONTEXTS]
        while len(self._texts) > MAX_TEXTS:
            self._texts.popitem(last=False)

    def is_salted_elsewhere(self, tokens_hash: bytes, first_key: bytes, separated_by: Sequence[str]) -> bool:
        """Whether the same tokens were seen under another `cache_salt`, or under one when this request has none.

        Different pictures make different keys of equal tokens as well; requests with pictures prove nothing.
        """
        if not tokens_hash or "multimodal" in separated_by:
            return False
        known = hash(first_key)
        return any(
            context.first_key != known
            and "multimodal" not in context.separated_by
            and ("cache_salt" in separated_by or "cache_salt" in context.separated_by)
            for context in self._texts.get(tokens_hash, ())
        )
