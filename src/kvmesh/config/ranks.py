"""Ports of a data-parallel engine, in which every rank is an instance of its own. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmesh.config.values import PORT_MAX, show
from kvmesh.errors import ConfigError, ConfigProblem

if TYPE_CHECKING:
    from collections.abc import Mapping


def ports_for_rank(
    ports: Mapping[str, int | None],
    port_lists: Mapping[str, tuple[int, ...]],
    sources: Mapping[str, str],
    rank: int,
) -> dict[str, int | None]:
    """The ports of one rank: from the key's list, else the key's port plus the rank. None and 0 stay as they are.

    Every rank derives the ports of those below it too, so that a clash (8200 + 1 = 8201) is named here instead of
    appearing later as a busy port.

    Args:
        ports: port of rank 0, by key.
        port_lists: one port per rank, for the keys that were given so.
        sources: where each key's value came from, for the message.
        rank: from 0.

    Raises:
        ConfigError: a list is too short, a port too high, or ports of two ranks are equal.
    """
    problems: list[ConfigProblem] = []
    taken: dict[int, str] = {}
    chosen: dict[str, int | None] = {}
    for current in range(rank + 1):
        for key, first in ports.items():
            where = sources.get(key, "default")
            listed = port_lists.get(key)
            if listed is not None and current >= len(listed):
                expected = f"a port for each data-parallel rank, so at least {rank + 1}"
                raise ConfigError([ConfigProblem(key, where, expected, show(list(listed)))])
            port = listed[current] if listed is not None else first and first + current
            chosen[key] = port
            if not port:
                continue
            if port > PORT_MAX:
                expected = f"a port that stays below {PORT_MAX + 1} with the rank, {current}, added"
                raise ConfigError([ConfigProblem(key, where, expected, str(first))])
            if port in taken:
                found = f"{port}, which is {taken[port]}"
                hint = "give lists with one port per rank"
                problems.append(ConfigProblem(key, where, f"a port of its own for rank {current}", found, hint))
            taken.setdefault(port, f"{key} of rank {current}")
    if problems:
        raise ConfigError(problems)
    return chosen
