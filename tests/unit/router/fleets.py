"""Backends for policy tests: an id and a load."""

from __future__ import annotations

from kvmesh.router.load import Load


class FakeBackend:
    """What a policy sees of a backend."""

    def __init__(self, id_: str, half_life_s: float = 10.0) -> None:
        self.id = id_
        self.load = Load(half_life_s)

    def __repr__(self) -> str:
        return self.id


def backends(count: int) -> list[FakeBackend]:
    return [FakeBackend(f"b{number}") for number in range(count)]
