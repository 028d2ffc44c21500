"""The matrix: which fault is done to which transports, and on what kind of stage."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

from kvmesh.bench.chaos.faults import (
    address_reused,
    clocks_apart,
    controller_killed,
    controller_stopped,
    corrupted_in_flight,
    cut_off,
    disks_full,
    duplicate_id,
    engine_killed,
    gap_of_events,
    gap_of_notices,
    link_cut,
    link_cut_one_way,
    link_slow,
    nixl_process_killed,
    own_node_killed,
    own_node_stopped,
    peer_node_killed,
    peer_restarted,
    peer_stopped,
    random_frames,
    slots_reused,
    slots_spoilt,
    wrong_format,
    wrong_incarnation,
    wrong_key,
)
from kvmesh.bench.chaos.stage import Kind, Stage

Transport = Literal["tcp", "nixl", "shm"]
Fault = Callable[[Stage], contextlib.AbstractContextManager[None]]
TRANSPORTS: tuple[Transport, ...] = ("tcp", "nixl", "shm")
NETWORKED: tuple[Transport, ...] = ("tcp", "nixl")
"""Those that a link between two hosts, or a proxy, has a part in."""
TCP: tuple[Transport, ...] = ("tcp",)
NIXL: tuple[Transport, ...] = ("nixl",)


class Cell(NamedTuple):
    """One fault of the matrix."""

    name: str
    fault: Fault
    kind: Kind = "local"
    transports: tuple[Transport, ...] = TRANSPORTS
    lasts: bool = True
    """The fault stays for a while; otherwise it is over at once, and healing is what is measured."""
    serves: bool = False
    """Requests go on hitting while the fault is there."""
    quick: tuple[Transport, ...] = ()
    """Transports with which it is in the quick selection."""
    needs: Callable[[], str | None] = lambda: None
    """Why it cannot be run here."""

    @property
    def meaning(self) -> str:
        """The fault in one sentence."""
        return (self.fault.__doc__ or "").partition("\n")[0]


def _needs_clocks() -> str | None:
    if os.geteuid() != 0 or not Path("/proc/self/ns/time").exists():
        return "time namespaces need root and Linux 5.6"
    return None


CELLS: tuple[Cell, ...] = (
    Cell("peer-node-killed", peer_node_killed, lasts=False, quick=TRANSPORTS),
    Cell("peer-stopped", peer_stopped, quick=TRANSPORTS),
    Cell("peer-restarted", peer_restarted, lasts=False),
    Cell("engine-killed", engine_killed, quick=TCP),
    Cell("nixl-process-killed", nixl_process_killed, transports=NIXL, lasts=False, quick=NIXL),
    Cell("own-node-killed", own_node_killed, lasts=False, quick=TRANSPORTS),
    Cell("own-node-stopped", own_node_stopped, lasts=False),
    Cell("slots-spoilt", slots_spoilt),
    Cell("slots-reused", slots_reused, quick=TRANSPORTS),
    Cell("wrong-format", wrong_format, serves=True),
    Cell("wrong-incarnation", wrong_incarnation),
    Cell("address-reused", address_reused),
    Cell("duplicate-id", duplicate_id, serves=True),
    Cell("clocks-apart", clocks_apart, lasts=False, needs=_needs_clocks),
    Cell("controller-stopped", controller_stopped, serves=True, quick=TCP),
    Cell("controller-killed", controller_killed, serves=True, quick=TCP),
    Cell("random-frames", random_frames, serves=True, quick=TCP),
    Cell("corrupted-in-flight", corrupted_in_flight, "proxied", TCP, quick=TCP),
    Cell("wrong-key", wrong_key, "secured", serves=True, quick=TCP),
    Cell("directory-gap-up", gap_of_events, "lossy"),
    Cell("directory-gap-down", gap_of_notices, "lossy"),
    Cell("disks-full", disks_full, "small_disks", lasts=False),
    Cell("link-cut", link_cut, "network", NETWORKED),
    Cell("link-cut-one-way", link_cut_one_way, "network", NETWORKED),
    Cell("link-slow", link_slow, "network", NETWORKED),
    Cell("cut-off", cut_off, "network", NETWORKED),
)
