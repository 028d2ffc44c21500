"""How busy a backend is, as far as this router can know: what it has been given and has not finished, and lately.

Requests in flight alone send everything to one idle backend when many short requests come at once; work given lately,
which fades, spreads them. Everything is counted in *tokens of prefill*, so that it can be added to what a request would
cost on a backend. Pure; the caller tells the time.
"""

from __future__ import annotations

REQUEST_TOKENS = 64
"""What a request in flight costs its neighbours, beside its own prefill: decoding takes a part of every engine step."""
RECENT_SHARE = 0.25
"""Weight of work given lately that may be finished already."""


class Load:
    """One backend's load."""

    __slots__ = ("_half_life_s", "_recent", "_recent_at_s", "assigned", "inflight", "waiting_tokens")

    def __init__(self, half_life_s: float) -> None:
        self._half_life_s = half_life_s
        self._recent = 0.0
        self._recent_at_s = 0.0
        self.inflight = 0
        """Requests sent and not ended."""
        self.waiting_tokens = 0
        """Prefill given and not answered with a first byte yet."""
        self.assigned = 0
        """Requests given so far."""

    def start(self, work_tokens: int, now_s: float) -> Ticket:
        """A request of so much prefill has been given to this backend."""
        self._recent = self.recent_tokens(now_s) + work_tokens + REQUEST_TOKENS
        self._recent_at_s = max(now_s, self._recent_at_s)
        self.inflight += 1
        self.assigned += 1
        self.waiting_tokens += work_tokens
        return Ticket(self, work_tokens)

    def recent_tokens(self, now_s: float) -> float:
        """Work given lately, halved every half-life."""
        faded: float = self._recent * 0.5 ** (max(0.0, now_s - self._recent_at_s) / self._half_life_s)
        return faded

    def cost_tokens(self, now_s: float) -> float:
        """What a new request has to wait for, in tokens of prefill."""
        return self.waiting_tokens + REQUEST_TOKENS * self.inflight + RECENT_SHARE * self.recent_tokens(now_s)


class Ticket:
    """One request on one backend. `first_byte` and `end` may be called more than once, in any order."""

    __slots__ = ("_ended", "_load", "_waiting_tokens")

    def __init__(self, load: Load, work_tokens: int) -> None:
        self._load = load
        self._waiting_tokens = work_tokens
        self._ended = False

    def first_byte(self) -> None:
        """Its prefill is done."""
        self._load.waiting_tokens -= self._waiting_tokens
        self._waiting_tokens = 0

    def end(self) -> None:
        """It is over, in whatever way."""
        if self._ended:
            return
        self._ended = True
        self.first_byte()
        self._load.inflight -= 1
