"""What an engine remembers of what its node was told by the directory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvmesh.bench.stand_in import make_key
from kvmesh.node import asked
from kvmesh.node.asked import AskedKeys

KEYS = [make_key(f"asked-{number}") for number in range(10)]


class Moving(dict[bytes, float]):
    """Loses a key to the other thread whenever somebody begins to go through it."""

    def __iter__(self) -> Iterator[bytes]:
        found = super().__iter__()
        self.popitem()
        return found


def test_the_scheduler_outlives_answers_that_come_while_it_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both threads change what is being asked for; neither has a lock, and neither may fail for it."""
    monkeypatch.setattr(asked, "MAX_KEYS", 4)
    known = AskedKeys()
    known._pending = Moving()
    assert known.to_ask(KEYS) == KEYS
    assert len(known._pending) <= 4
