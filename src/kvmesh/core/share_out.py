"""Dealing chunks out to instances that are to take them over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Room(NamedTuple):
    """A pool that may take chunks over."""

    slots: int
    chunks: int
    """That it holds already."""


def share_out(rooms: Mapping[str, Room], keys: Sequence[bytes]) -> list[tuple[str, list[bytes]]]:
    """Who takes which: in their order, to whoever has the most room; when there is no room left, evenly, so that hot
    chunks push out cold ones, up to half of a pool.
    """
    if not rooms:
        return []
    room = {name: one.slots - one.chunks for name, one in rooms.items()}
    most = {name: max(room[name], one.slots // 2) for name, one in rooms.items()}
    taken: dict[str, list[bytes]] = {name: [] for name in rooms}
    rest = list(keys)
    for name in sorted(room, key=lambda name: -room[name]):
        fits = max(0, room[name])
        taken[name], rest = rest[:fits], rest[fits:]
    each = -(-len(rest) // len(rooms)) if rest else 0
    for name, mine in taken.items():
        fits = max(0, min(each, most[name] - len(mine)))
        mine.extend(rest[:fits])
        rest = rest[fits:]
    return [(name, mine) for name, mine in taken.items() if mine]
