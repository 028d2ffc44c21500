"""What was asked and answered while a fault was there, and what that means."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

from kvmesh.bench.chaos.actor import Answered, Sent


class Share(NamedTuple):
    """Chunks of some requests."""

    requests: int
    asked: int
    fetched: int

    @property
    def fraction(self) -> float | None:
        """Of the chunks asked for; None when there were no requests."""
        return self.fetched / self.asked if self.asked else None


class Traffic:
    """Requests of one reader. `heard` is called by the thread that listens to it, the rest from any thread."""

    def __init__(self, documents: int) -> None:
        self._documents = documents
        self._changed = threading.Condition()
        self._sent = 0
        self._answers: list[Answered] = []

    def heard(self, line: Sent | Answered) -> None:
        with self._changed:
            if isinstance(line, Sent):
                self._sent += 1
            else:
                self._answers.append(line)
            self._changed.notify_all()

    def forget(self) -> None:
        """Start anew. Only while no request is out."""
        with self._changed:
            self._sent = 0
            self._answers.clear()

    @property
    def sent(self) -> int:
        return self._sent

    def answers(self) -> list[Answered]:
        with self._changed:
            return list(self._answers)

    def wait_answers(self, count: int, since_s: float, timeout_s: float) -> bool:
        """Wait until so many requests that were sent after `since_s` (monotonic) have been answered."""
        return self._wait(lambda: sum(one.sent_at_s >= since_s for one in self._answers) >= count, timeout_s)

    def wait_whole(self, since_s: float, timeout_s: float) -> float | None:
        """Wait until every document has been fetched whole after `since_s`; returns when that was, None if it was not.

        Both times are monotonic.
        """
        self._wait(lambda: whole_at(self._answers, self._documents, since_s) is not None, timeout_s)
        with self._changed:
            return whole_at(self._answers, self._documents, since_s)

    def wait_all_answered(self, timeout_s: float) -> bool:
        """Wait until nothing is out. The reader must have been told to send no more."""
        return self._wait(lambda: len(self._answers) >= self._sent, timeout_s)

    def _wait(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        with self._changed:
            return self._changed.wait_for(condition, timeout_s)


def whole_at(answers: Sequence[Answered], documents: int, since_s: float) -> float | None:
    """When the last of `documents` was fetched whole for the first time by a request sent after `since_s`."""
    first: dict[int, float] = {}
    for one in answers:
        if one.sent_at_s >= since_s and one.fetched == one.asked and one.document not in first:
            first[one.document] = one.sent_at_s + one.seconds
    return max(first.values()) if len(first) == documents else None


def share(answers: Sequence[Answered], from_s: float, until_s: float) -> Share:
    """Of the requests that were sent in that time."""
    chosen = [one for one in answers if from_s <= one.sent_at_s < until_s]
    return Share(len(chosen), sum(one.asked for one in chosen), sum(one.fetched for one in chosen))


def reasons(answers: Sequence[Answered]) -> dict[str, int]:
    """Misses by reason, most frequent first."""
    counts: dict[str, int] = {}
    for one in answers:
        for reason, count in one.misses.items():
            counts[reason] = counts.get(reason, 0) + count
    return dict(sorted(counts.items(), key=lambda entry: -entry[1]))
