"""Processes that serve many connections take the descriptors that they may have, and never fewer than before."""

from __future__ import annotations

import resource

import pytest

from kvmesh.descriptors import ENOUGH, raise_descriptor_limit

ALL = resource.RLIM_INFINITY


@pytest.mark.parametrize(
    ("soft", "hard", "then"),
    [(1024, 4096, 4096), (1024, 1 << 20, ENOUGH), (1024, ALL, ENOUGH), (1 << 20, 1 << 20, None), (ALL, ALL, None)],
)
def test_the_limit_is_raised_as_far_as_allowed(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, then: int | None
) -> None:
    wanted = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: wanted.append(limits))
    raise_descriptor_limit()
    assert wanted == ([] if then is None else [(then, hard)])


def test_a_limit_that_may_not_be_raised_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("not here")

    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    raise_descriptor_limit()
