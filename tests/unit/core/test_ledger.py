"""The slot ledger: generations, consistent readings, checksums that belong to one generation."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvmesh.core.ledger import SlotLedger

SLOTS = 6


def key(number: int) -> bytes:
    return number.to_bytes(36, "big")


class LedgerMachine(RuleBasedStateMachine):
    """An owner and a node act in any order; a plain model says what a reader must see."""

    @initialize()
    def make(self) -> None:
        self.ledger = SlotLedger.create(SLOTS, 4096)
        self.reader = SlotLedger.attach(os.dup(self.ledger.fd))
        self.model: dict[int, bytes] = {}
        self.sums: dict[int, tuple[int, bytes]] = {}
        self.generations = [0] * SLOTS
        self.next_key = 0

    @rule(slot=st.integers(0, SLOTS - 1))
    def publish(self, slot: int) -> None:
        self.next_key += 1
        generation = self.ledger.publish(slot, key(self.next_key))
        assert generation & 1
        assert generation > self.generations[slot], "a slot never returns to an old generation"
        self.generations[slot] = generation
        self.model[slot] = key(self.next_key)

    @rule(slot=st.integers(0, SLOTS - 1))
    def retract(self, slot: int) -> None:
        generation = self.ledger.retract(slot)
        assert not generation & 1
        assert generation >= self.generations[slot]
        self.generations[slot] = generation
        self.model.pop(slot, None)

    @rule()
    def retract_all(self) -> None:
        assert self.ledger.retract_all() == sorted(self.model)
        self.model.clear()
        self.generations = [self.ledger.generation(slot) for slot in range(SLOTS)]

    @rule(slot=st.integers(0, SLOTS - 1), digest=st.binary(min_size=16, max_size=16))
    def checksum(self, slot: int, digest: bytes) -> None:
        record = self.reader.read(slot)
        if record is not None:
            self.reader.set_checksum(slot, record.generation, digest)
            self.sums[slot] = (record.generation, digest)

    @invariant()
    def readers_see_the_model(self) -> None:
        for slot in range(SLOTS):
            record = self.reader.read(slot)
            assert (record.key if record else None) == self.model.get(slot)
            if record is None:
                continue
            known = self.sums.get(slot)
            expected = known[1] if known is not None and known[0] == record.generation else None
            assert self.reader.checksum(slot, record.generation) == expected
        self.ledger.check_integrity()
        assert self.reader.statistics().published == len(self.model)

    def teardown(self) -> None:
        self.reader.close()
        self.ledger.close()


TestLedger = LedgerMachine.TestCase


@given(st.binary(max_size=4096))
def test_attach_refuses_what_is_no_ledger(content: bytes) -> None:
    """A descriptor with anything else behind it is refused, never read as records."""
    fd = os.memfd_create("garbage")
    try:
        os.write(fd, content)
        with pytest.raises(ValueError, match="ledger"):
            SlotLedger.attach(fd)
    finally:
        os.close(fd)


def test_slots_outside_are_refused() -> None:
    """A slot number from the wire cannot reach outside the ledger."""
    ledger = SlotLedger.create(2, 4096)
    for slot in (-1, 2, 10**9):
        with pytest.raises(IndexError):
            ledger.read(slot)
    ledger.close()


def test_readers_in_another_process_never_see_a_torn_record() -> None:
    """A reader process checks that key and generation belong together while the owner publishes as fast as it can."""
    ledger = SlotLedger.create(1, 4096)
    code = (
        "import sys\n"
        "from kvmesh.core.ledger import SlotLedger\n"
        "ledger = SlotLedger.attach(int(sys.argv[1]))\n"
        "print('ready', flush=True)\n"
        "seen = torn = 0\n"
        "while seen < 20_000:\n"
        "    record = ledger.read(0)\n"
        "    if record is None:\n"
        "        continue\n"
        "    seen += 1\n"
        "    torn += int.from_bytes(record.key, 'big') * 2 - 1 != record.generation\n"
        "print(torn, flush=True)\n"
    )
    reader = subprocess.Popen(
        [sys.executable, "-c", code, str(ledger.fd)], pass_fds=[ledger.fd], stdout=subprocess.PIPE, text=True
    )
    assert reader.stdout is not None
    assert reader.stdout.readline() == "ready\n"
    count = 0
    while reader.poll() is None:
        count += 1
        ledger.publish(0, key(count))  # generation 2 * count - 1
    assert reader.stdout.read() == "0\n"
    reader.stdout.close()
    ledger.close()
