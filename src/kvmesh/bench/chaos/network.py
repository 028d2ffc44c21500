r"""Two network namespaces with a link between them that can be cut, cut in one direction, or made slow.

                    controller (this namespace)
                   /                           \
            control link                  control link
                 /                               \
        namespace `holder` ------ data link ------ namespace `reader`

A link is cut without a word: the sender gets a wrong hardware address for the other side, so that its packets are
thrown away where they arrive. No connection is reset and no error is returned, as with a broken cable further away.
This needs no kernel module beyond veth; the slow link uses the token bucket of tc.
"""

from __future__ import annotations

import contextlib
import os
import shutil

from kvmesh.bench.namespaces import name_of, remove_left, run

NOWHERE = "02:00:00:00:de:ad"
CONTROLLER_HOLDER, HOLDER_CONTROL = "198.18.241.1", "198.18.241.2"
CONTROLLER_READER, READER_CONTROL = "198.18.242.1", "198.18.242.2"
HOLDER_DATA, READER_DATA = "198.18.243.1", "198.18.243.2"
"""Addresses of the block that is reserved for measuring networks, so that nobody's own is hidden."""
DATA, CONTROL = "data", "control"


def unavailable() -> str | None:
    """Why namespaces cannot be made here; None when they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        return f"{' and '.join(missing)} of iproute2 not found"
    network = Network("probe")
    try:
        network.open()
    except OSError as error:
        return f"namespaces cannot be made here: {error}"
    finally:
        network.close()
    return None


class Network:
    """Makes the namespaces, and takes them away again."""

    def __init__(self, name: str = "") -> None:
        self.holder = name_of(f"{name}-holder")
        self.reader = name_of(f"{name}-reader")
        self._outside = [f"kv{os.getpid() % 100000}{letter}" for letter in "hr"]
        """Our ends of the control links; a device's name has at most 15 characters."""

    def open(self) -> None:
        """Make everything. Raises OSError in words."""
        remove_left()
        for space in (self.holder, self.reader):
            _ip("netns", "add", space)
            _ip("-n", space, "link", "set", "lo", "up")
        _ip("-n", self.holder, "link", "add", DATA, "type", "veth", "peer", "name", DATA, "netns", self.reader)
        self._up(self.holder, DATA, HOLDER_DATA)
        self._up(self.reader, DATA, READER_DATA)
        ends = ((self.holder, CONTROLLER_HOLDER, HOLDER_CONTROL), (self.reader, CONTROLLER_READER, READER_CONTROL))
        for device, (space, ours, theirs) in zip(self._outside, ends, strict=True):
            _ip("link", "add", device, "type", "veth", "peer", "name", CONTROL, "netns", space)
            self._up(space, CONTROL, theirs)
            _ip("addr", "add", f"{ours}/24", "dev", device)
            _ip("link", "set", device, "up")

    def close(self) -> None:
        """Remove everything. Processes that are still inside keep their namespace until they end."""
        for device in self._outside:
            with contextlib.suppress(OSError):
                _ip("link", "del", device)
        for space in (self.holder, self.reader):
            with contextlib.suppress(OSError):
                _ip("netns", "del", space)

    def inside(self, space: str) -> list[str]:
        """What to put before a command so that it runs there."""
        return ["ip", "netns", "exec", space]

    def cut(self, *, from_holder: bool = True, from_reader: bool = True) -> None:
        """Lose all packets of the data link that go in these directions."""
        if from_holder:
            _lose(self.holder, READER_DATA, DATA)
        if from_reader:
            _lose(self.reader, HOLDER_DATA, DATA)

    def cut_off_reader(self) -> None:
        """Lose all packets between the reader and everybody else, the controller included."""
        self.cut()
        _lose(self.reader, CONTROLLER_READER, CONTROL)

    def heal(self) -> None:
        """Let packets pass again, at full speed."""
        for space, address, device in (
            (self.holder, READER_DATA, DATA),
            (self.reader, HOLDER_DATA, DATA),
            (self.reader, CONTROLLER_READER, CONTROL),
        ):
            with contextlib.suppress(OSError):
                _ip("-n", space, "neigh", "del", address, "dev", device)
        with contextlib.suppress(OSError):
            run("tc", "-n", self.holder, "qdisc", "del", "dev", DATA, "root")

    def slow_down(self, rate: str) -> None:
        """Let the holder send at most at `rate` (as tc writes it, such as 8mbit)."""
        bucket = ("tbf", "rate", rate, "burst", "32kb", "latency", "100ms")
        run("tc", "-n", self.holder, "qdisc", "add", "dev", DATA, "root", *bucket)

    @staticmethod
    def _up(space: str, device: str, address: str) -> None:
        _ip("-n", space, "addr", "add", f"{address}/24", "dev", device)
        _ip("-n", space, "link", "set", device, "up")


def _lose(space: str, address: str, device: str) -> None:
    _ip("-n", space, "neigh", "replace", address, "lladdr", NOWHERE, "dev", device, "nud", "permanent")


def _ip(*arguments: str) -> None:
    run("ip", *arguments)
