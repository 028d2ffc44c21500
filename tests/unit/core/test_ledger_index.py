"""The index always agrees with a plain search through the ledger, whatever the owner does."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from kvmesh.bench.stand_in import make_key
from kvmesh.core.ledger import SlotLedger
from kvmesh.core.ledger_index import LedgerIndex

SLOTS = 5
KEYS = [make_key(str(number)) for number in range(8)]


@settings(max_examples=80, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("publish"), st.integers(0, SLOTS - 1), st.integers(0, len(KEYS) - 1)),
            st.tuples(st.just("retract"), st.integers(0, SLOTS - 1), st.just(0)),
            st.tuples(st.just("refresh"), st.just(0), st.just(0)),
        ),
        max_size=40,
    )
)
def test_what_is_found_is_what_is_published(steps):
    """Between two refreshes it may miss what is new; it never names a slot that does not hold the key now."""
    ledger = SlotLedger.create(SLOTS, 4096)
    index = LedgerIndex(ledger)
    held: dict[bytes, int] = {}
    for step, slot, number in steps:
        if step == "refresh":
            index.refresh()
        elif step == "retract" or KEYS[number] not in held:  # a key is in one slot at a time
            ledger.retract(slot)
            held = {key: other for key, other in held.items() if other != slot}
            if step == "publish":
                ledger.publish(slot, KEYS[number])
                held[KEYS[number]] = slot
        for key in KEYS:
            found = index.find(key)
            assert found is None or (held[key] == found[0] and ledger.is_current(*found))
    index.refresh()
    assert {key: found[0] for key in KEYS if (found := index.find(key))} == held
    assert index.knows_all(held)
    assert len(index) == len(held)
    ledger.close()  # nothing of the index keeps it open


def test_a_record_on_the_move_is_looked_at_again():
    """The owner is between retracting and publishing when the index looks."""
    ledger = SlotLedger.create(1, 4096)
    reading = ledger.read
    ledger.read = lambda slot: None
    index = LedgerIndex(ledger)
    ledger.publish(0, KEYS[0])
    index.refresh()
    assert index.find(KEYS[0]) is None
    ledger.read = reading
    index.refresh()
    assert index.find(KEYS[0]) == (0, 1)
