"""The breaker: one fault keeps a peer away for a moment, one probe decides what comes next."""

from __future__ import annotations

from kvmesh.core.breaker import FIRST_PAUSE_S, LONGEST_PAUSE_S, Breaker


def test_a_fault_opens_a_probe_closes() -> None:
    """Open after a fault, one probe after the pause, closed again after its success."""
    breaker = Breaker()
    assert breaker.allows(0)
    breaker.failed(0)
    assert not breaker.allows(FIRST_PAUSE_S * 0.9)
    assert breaker.allows(FIRST_PAUSE_S)
    breaker.begin()
    assert not breaker.allows(FIRST_PAUSE_S), "only one probe at a time"
    breaker.succeeded()
    assert breaker.allows(FIRST_PAUSE_S)
    assert not breaker.is_open


def test_pauses_grow_up_to_a_limit() -> None:
    """A peer that keeps failing is asked ever less often, but never forgotten."""
    breaker = Breaker()
    now_s = 0.0
    pauses = []
    for _ in range(12):
        breaker.failed(now_s)
        start_s = now_s
        while not breaker.allows(now_s):
            now_s += 0.25
        pauses.append(now_s - start_s)
        breaker.begin()
    assert pauses == sorted(pauses)
    assert pauses[-1] == LONGEST_PAUSE_S
