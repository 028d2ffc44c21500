"""All checks, in the order of the report: this machine first, then this instance, then the cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from kvmesh.doctor import (
    addresses,
    clock,
    formats,
    limits,
    members,
    misses,
    peers,
    ports,
    rdma,
    redis,
    setup,
    shm,
    sockets,
)
from kvmesh.doctor.findings import Finding, problem
from kvmesh.doctor.situation import Situation

Check = Callable[[Situation], Iterable[Finding]]

CHECKS: tuple[tuple[str, Check], ...] = (
    ("version", setup.versions),
    ("config", setup.configuration),
    ("port", ports.check),
    ("address", addresses.check),
    ("limit", limits.check),
    ("shm", shm.check),
    ("rdma", rdma.check),
    ("key", sockets.check),
    ("redis", redis.check),
    ("controller", members.controller),
    ("member", members.check),
    ("format", formats.check),
    ("peer", peers.check),
    ("misses", misses.check),
    ("clock", clock.check),
)
"""By the first part of the findings' names."""


def examine(situation: Situation, only: Iterable[str] = ()) -> Iterator[Finding]:
    """Run the checks and give their findings as they come.

    Args:
        situation: what to look at.
        only: subjects (the names in CHECKS); empty: all.
    """
    wanted = set(only)
    for subject, check in CHECKS:
        if wanted and subject not in wanted:
            continue
        try:
            yield from check(situation)
        except Exception as error:  # a check that breaks down must not hide what the others find
            yield problem(
                f"{subject}.check",
                "kvmesh doctor",
                f"this check broke down: {type(error).__name__}: {error}",
                "look at its subject by hand, and report this as a bug",
            )
