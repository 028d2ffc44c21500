"""How busy a backend counts."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from kvmesh.router.load import RECENT_SHARE, REQUEST_TOKENS, Load


def test_a_request_counts_by_its_prefill_until_the_first_byte() -> None:
    """Before it, its tokens; after it, that it is there; after its end, only what is recent."""
    load = Load(half_life_s=10.0)
    ticket = load.start(1000, now_s=0.0)
    recent = RECENT_SHARE * (1000 + REQUEST_TOKENS)
    assert load.cost_tokens(0.0) == 1000 + REQUEST_TOKENS + recent
    ticket.first_byte()
    assert load.cost_tokens(0.0) == REQUEST_TOKENS + recent
    ticket.end()
    assert load.cost_tokens(0.0) == recent
    assert load.cost_tokens(10.0) == recent / 2


def test_a_clock_that_stands_still_or_goes_back_does_no_harm() -> None:
    """Recent work never grows by itself."""
    load = Load(half_life_s=1.0)
    load.start(100, now_s=5.0)
    assert load.recent_tokens(4.0) == load.recent_tokens(5.0)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 10_000), st.lists(st.sampled_from(["first", "end"]), max_size=4)), max_size=20)
)
def test_nothing_is_left_when_all_has_ended(requests: list[tuple[int, list[str]]]) -> None:
    """Whatever is called how often, in whatever order."""
    load = Load(half_life_s=1.0)
    tickets = [(load.start(work, float(number)), calls) for number, (work, calls) in enumerate(requests)]
    for ticket, calls in tickets:
        for call in calls:
            ticket.first_byte() if call == "first" else ticket.end()
    for ticket, _ in tickets:
        ticket.end()
    assert load.inflight == 0
    assert load.waiting_tokens == 0
    assert load.cost_tokens(1e6) < 1e-6
