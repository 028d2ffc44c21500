"""Fetch or recompute: a fetch is worth it only when it is predicted to be over before the prefill would be. Pure.

For the first k chunks of what peers hold beyond our own prefix of c tokens:

    fetch_s(k)   = t0 + bytes(k) * s_per_byte * (1 + pulls under way)           the slowest holder decides
    prefill_s(k) = queue delay + work(c, t) * s_per_token,  t = tokens of k chunks
    work(c, t)   = t + a * ((c + t)**2 - c**2),             a = layers * hidden size / parameters (attention)
    fetch while  fetch_s(k) < (1 - margin) * prefill_s(k)

All rates are measured while running, as moving averages that forget: `RateMeter` fits seconds = fixed + units * slope
to what fetches (per peer) and prefills (of this engine) have taken. What has not been measured yet is allowed: the
first fetches measure it, and their deadline is the predicted prefill, so an error costs once and has an end.

With the objective `latency` a request is to be ready soon. With `throughput` the engine is to be kept free: waiting for
a fetch costs it nothing, so only the link's time counts (no fixed part, no margin).

Source of formula and margin: the usual roofline of prefill (2 P p + 2 L d p**2 operations) against a link's rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple

DECAY = 0.85
"""Weight that an observation keeps with each further one: half of it is gone after four or five."""
OUTLIER = 2.0
"""An observation counts as at most so many times longer, or shorter, than predicted: one hiccup does not decide."""
STRANGE = 3
"""After so many outliers to the same side in a row the link has changed: what was before is forgotten."""
SETTLED = 3.0
"""Weight from which outliers are told from the rest."""
MIN_SPREAD = 0.1
"""Relative spread of sizes from which a fixed part can be told from a slope."""
LIKE = 2.0
"""Sizes of at most so many times each other are alike."""
FASTEST_UNIT_S = 1e-13
SHORTEST_DEADLINE_S = 0.05


class Rate(NamedTuple):
    """seconds = fixed + units * unit."""

    fixed_s: float
    unit_s: float

    def predict(self, units: float) -> float:
        """Seconds for so many units."""
        return self.fixed_s + units * self.unit_s


class RateMeter:
    """A moving fit of seconds against units (bytes, tokens). Owned by one thread."""

    def __init__(self, prior_fixed_s: float = 0.0) -> None:
        """`prior_fixed_s`: what is taken for the fixed part while all observations are of about one size."""
        self._prior_fixed_s = prior_fixed_s
        self._n = self._x = self._y = self._xx = self._xy = 0.0
        self._strange: list[tuple[float, float]] = []
        """The last outliers in a row, all longer or all shorter than predicted."""
        self._is_longer = False
        self.rate: Rate | None = None
        """None before the first observation."""

    def observe(self, units: float, seconds: float) -> None:
        """Take in that `units` took `seconds`."""
        if units < 1 or seconds <= 0:
            return
        if self.rate is not None and self._n >= SETTLED and self._can_tell(units):
            expected_s = max(self.rate.predict(units), 1e-9)
            if self._has_changed(units, seconds, expected_s):
                return
            seconds = min(max(seconds, expected_s / OUTLIER), expected_s * OUTLIER)
        self._add(units, seconds)

    def _can_tell(self, units: float) -> bool:
        """Whether a prediction for such a size is worth something: sizes differ, or it is like those seen so far."""
        return self._is_spread() or self._x / LIKE < units * self._n < self._x * LIKE

    def _is_spread(self) -> bool:
        return self._n * self._xx - self._x * self._x > (MIN_SPREAD * self._x) ** 2

    def start_over(self, observations: Sequence[tuple[float, float]]) -> None:
        """Forget everything and begin with these (units, seconds): what was known has been put to the test."""
        self._forget()
        self.rate = None
        for units, seconds in observations:
            self.observe(units, seconds)

    def _forget(self) -> None:
        self._n = self._x = self._y = self._xx = self._xy = 0.0
        self._strange.clear()

    def _has_changed(self, units: float, seconds: float, expected_s: float) -> bool:
        """Begin anew with the last outliers, this one included, when there were enough of them."""
        is_longer = seconds > expected_s
        if expected_s / OUTLIER <= seconds <= expected_s * OUTLIER:
            self._strange.clear()
            return False
        if is_longer is not self._is_longer:
            self._strange.clear()
        self._is_longer = is_longer
        self._strange.append((units, seconds))
        if len(self._strange) < STRANGE:
            return False
        outliers = list(self._strange)
        self._forget()
        for outlier in outliers:
            self._add(*outlier)
        return True

    def _add(self, units: float, seconds: float) -> None:
        self._n, self._x, self._y, self._xx, self._xy = (
            old * DECAY + new
            for old, new in (
                (self._n, 1.0),
                (self._x, units),
                (self._y, seconds),
                (self._xx, units * units),
                (self._xy, units * seconds),
            )
        )
        self.rate = self._fit()

    def _fit(self) -> Rate:
        n, x, y = self._n, self._x, self._y
        if self._is_spread():
            slope = (n * self._xy - x * y) / (n * self._xx - x * x)
            fixed = (y - slope * x) / n
            if slope > 0 and fixed >= 0:
                return Rate(fixed, max(slope, FASTEST_UNIT_S))
            if slope > 0:
                return Rate(0.0, max(self._xy / self._xx, FASTEST_UNIT_S))
        fixed = min(self._prior_fixed_s, y / n / 2)
        return Rate(fixed, max((y - fixed * n) / x, FASTEST_UNIT_S))


class Objective(str, Enum):
    """What the gate is to be good for. The value is what a configuration says."""

    LATENCY = "latency"
    THROUGHPUT = "throughput"
    OFF = "off"
    """Fetch whatever is there."""


class Verdict(str, Enum):
    """The outcome in one word: the label in metrics."""

    OFF = "off"
    UNMEASURED = "unmeasured"
    """Allowed, to learn."""
    PAYS = "pays"
    CAPPED = "capped"
    """Only the first part pays, or fits into `fetch_timeout_s`."""
    SLOWER = "slower"
    """Refused: computing is predicted to be faster."""


class Policy(NamedTuple):
    """What a configuration says about the gate."""

    objective: Objective = Objective.LATENCY
    margin: float = 0.15

    @property
    def is_on(self) -> bool:
        return self.objective is not Objective.OFF


NO_GATE = Policy(Objective.OFF)


class Saved(NamedTuple):
    """What the first k chunks of a fetch save the engine: fixed_s + k * chunk_s + k**2 * growth_s."""

    fixed_s: float
    chunk_s: float
    growth_s: float = 0.0

    def predict(self, chunks: int) -> float:
        """Seconds of prefill for so many chunks; none for none."""
        return self.fixed_s + chunks * self.chunk_s + chunks * chunks * self.growth_s if chunks else 0.0


class Source(NamedTuple):
    """A run of chunks from one holder, as the gate sees it."""

    holder: str
    chunks: int
    rate: Rate | None
    """Seconds against bytes; None when the holder has not been measured."""
    pulls: int = 0
    """Other fetches from it under way."""


class GateDecision(NamedTuple):
    """What was decided about one fetch, and on what grounds."""

    verdict: Verdict
    chunks: int
    """To be fetched: the first so many."""
    asked: int
    fetch_s: float | None
    """Predicted for `chunks`, or for all that was asked for where nothing is fetched. None: not measured."""
    prefill_s: float | None
    """Predicted for the same chunks."""

    @property
    def refused(self) -> int:
        """Chunks that are computed although a peer holds them."""
        return self.asked - self.chunks

    def detail(self) -> dict[str, str | float]:
        """The numbers behind a refusal, as explanations show them."""
        known = {"fetch_s": self.fetch_s, "prefill_s": self.prefill_s}
        return {name: seconds for name, seconds in known.items() if seconds is not None}

    def __str__(self) -> str:
        fetch, prefill = (
            "unknown" if seconds is None else f"{seconds * 1e3:.1f} ms" for seconds in (self.fetch_s, self.prefill_s)
        )
        return f"{self.verdict.value}: {self.chunks} of {self.asked} chunks, fetch {fetch}, prefill {prefill}"


def decide(
    policy: Policy, sources: Sequence[Source], saved: Saved | None, *, chunk_bytes: int, timeout_s: float
) -> GateDecision:
    """How many of the chunks of `sources`, runs in prefix order, to fetch.

    Args:
        policy: objective and margin.
        sources: who would be asked for what.
        saved: what computing them would take; None when this engine's prefill has not been measured.
        chunk_bytes: size of a chunk.
        timeout_s: the longest that a fetch may take: what does not fit is not asked for.
    """
    asked = sum(source.chunks for source in sources)
    if not policy.is_on:
        return GateDecision(Verdict.OFF, asked, asked, None, None)
    if saved is None or any(source.rate is None for source in sources):
        return GateDecision(Verdict.UNMEASURED, asked, asked, None, saved and saved.predict(asked))
    predict = _Prediction(policy, chunk_bytes)
    best, best_gain_s, best_fetch_s = 0, 0.0, 0.0
    chunks, fetch_s = 0, 0.0
    for source in sources:
        # Within a run both sides grow steadily, so its best end is one of its ends, or where time is up.
        fitting = predict.fitting(source, timeout_s)
        fetch_s = predict.add(source._replace(chunks=fitting))
        chunks += fitting
        gain_s = predict.worth(saved.predict(chunks)) - fetch_s
        if fitting and gain_s > best_gain_s:
            best, best_gain_s, best_fetch_s = chunks, gain_s, fetch_s
        if fitting < source.chunks:
            break
    if not best:
        return GateDecision(Verdict.SLOWER, 0, asked, predict.whole(sources), saved.predict(asked))
    verdict = Verdict.PAYS if best == asked else Verdict.CAPPED
    return GateDecision(verdict, best, asked, best_fetch_s, saved.predict(best))


class _Prediction:
    """Adds up what a growing prefix takes; holders work at the same time."""

    def __init__(self, policy: Policy, chunk_bytes: int) -> None:
        self._is_latency = policy.objective is Objective.LATENCY
        self._margin = policy.margin if self._is_latency else 0.0
        self._chunk_bytes = chunk_bytes
        self._busy_s: dict[str, float] = {}

    def worth(self, prefill_s: float) -> float:
        return (1 - self._margin) * prefill_s

    def add(self, source: Source) -> float:
        """Seconds with one more run."""
        assert source.rate is not None
        fixed_s, chunk_s = self._seconds(source)
        if source.chunks:
            self._busy_s[source.holder] = self._busy_s.get(source.holder, fixed_s) + source.chunks * chunk_s
        return max(self._busy_s.values(), default=0.0)

    def fitting(self, source: Source, timeout_s: float) -> int:
        """How many chunks of one more run arrive in time."""
        fixed_s, chunk_s = self._seconds(source)
        left_s = timeout_s - self._busy_s.get(source.holder, fixed_s)
        return max(0, min(source.chunks, int(left_s / chunk_s)))

    def whole(self, sources: Sequence[Source]) -> float:
        """Seconds for all of it, without regard to what was added."""
        self._busy_s.clear()
        return max((self.add(source) for source in sources), default=0.0)

    def _seconds(self, source: Source) -> tuple[float, float]:
        assert source.rate is not None
        chunk_s = self._chunk_bytes * source.rate.unit_s * (1 + source.pulls)
        return (source.rate.fixed_s if self._is_latency else 0.0), chunk_s


class Prefill:
    """Measures how fast this engine computes. Owned by its scheduler thread."""

    def __init__(self, attention: float = 0.0) -> None:
        """`attention`: layers * hidden size / parameters; 0 takes prefill for linear in the prompt's length."""
        self._attention = attention
        self._tokens = RateMeter()
        self._queue_s = 0.0
        self.observations = 0
        """Taken in so far: while it stays the same, so does everything else here."""

    def computed(self, start_tokens: int, tokens: int, seconds: float) -> None:
        """A prefill of `tokens` after a prefix of `start_tokens` took `seconds` since it was first scheduled."""
        self._tokens.observe(self._work(start_tokens, tokens), seconds)
        self.observations += 1

    def queued(self, seconds: float) -> None:
        """A request waited so long from its lookup until it was scheduled."""
        self._queue_s += (1 - DECAY) * (max(0.0, seconds) - self._queue_s)
        self.observations += 1

    @property
    def tokens_per_s(self) -> float | None:
        """Of short prompts; None before the first measurement."""
        return None if self._tokens.rate is None else 1 / self._tokens.rate.unit_s

    @property
    def queue_s(self) -> float:
        """Moving average of the queue delay."""
        return self._queue_s

    def saved(self, start_tokens: int, chunk_tokens: int) -> Saved | None:
        """What chunks of `chunk_tokens` after a prefix of `start_tokens` take; None before the first measurement.

        The fit's fixed part is left out: it holds the time until a finished chunk is reported, which no fetch saves.
        """
        rate = self._tokens.rate
        if rate is None:
            return None
        # work(c, k t) = k t + a ((c + k t)**2 - c**2) = k (t + 2 a c t) + k**2 a t**2
        linear = chunk_tokens * (1 + 2 * self._attention * start_tokens)
        return Saved(self._queue_s, linear * rate.unit_s, self._attention * chunk_tokens**2 * rate.unit_s)

    def _work(self, start_tokens: int, tokens: int) -> float:
        return tokens + self._attention * ((start_tokens + tokens) ** 2 - start_tokens**2)


def deadline_s(policy: Policy, decision: GateDecision, timeout_s: float) -> float:
    """How long a fetch that was allowed may take: no longer than computing would, whatever was predicted."""
    if policy.objective is not Objective.LATENCY or decision.prefill_s is None:
        return timeout_s
    return min(timeout_s, max(decision.prefill_s, SHORTEST_DEADLINE_S))
