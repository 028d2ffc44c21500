r"""Network namespaces in the shape of a star: one reader, and holders that each have a link of their own to it.

                      controller (this namespace)
             /             |                 \
        `holder-0`     `holder-1`  ...     `reader`
             \_____________|________________/     data links, each with the rate that was asked for

Rates are the token bucket of tc on the holders' side; control links have none. Needs root and iproute2
(`kvmesh.bench.chaos.network.unavailable` says what is missing).
"""

from __future__ import annotations

import contextlib
import os

from kvmesh.bench.namespaces import name_of, remove_left, run

CONTROL_NET, DATA_NET = "198.18.{}", "198.19.{}"
"""The block reserved for measuring networks."""
BUCKET_S = 0.004
MIN_BUCKET_BYTES = 128 << 10
"""Two of the largest packets that the kernel cuts up later."""


class Star:
    """Makes the namespaces, and takes them away again."""

    def __init__(self, holders: int, first_net: int = 0) -> None:
        """`first_net`: stars that are open at the same time need networks of their own, `holders` + 1 each."""
        self._first_net = first_net
        self.holders = [name_of(f"holder-{first_net + number}") for number in range(holders)]
        self.reader = name_of(f"reader-{first_net}")

    def open(self) -> None:
        """Make everything, without limits. Raises OSError in words."""
        remove_left()
        for number, space in enumerate((*self.holders, self.reader)):
            _ip("netns", "add", space)
            _ip("-n", space, "link", "set", "lo", "up")
            outside = f"kvm{os.getpid() % 100000}-{self._first_net + number}"
            _ip("link", "add", outside, "type", "veth", "peer", "name", "control", "netns", space)
            _ip("-n", space, "addr", "add", f"{self.control_address(number)}/24", "dev", "control")
            _ip("-n", space, "link", "set", "control", "up")
            _ip("addr", "add", f"{self.controller_address(number)}/24", "dev", outside)
            _ip("link", "set", outside, "up")
        for number, space in enumerate(self.holders):
            device = f"data{number}"
            _ip("-n", self.reader, "link", "add", device, "type", "veth", "peer", "name", "data", "netns", space)
            for where, name, address in (
                (space, "data", self.holder_address(number)),
                (self.reader, device, DATA_NET.format(self._first_net + number) + ".2"),
            ):
                _ip("-n", where, "addr", "add", f"{address}/24", "dev", name)
                _ip("-n", where, "link", "set", name, "up")

    def close(self) -> None:
        """Remove everything; the links go with their namespaces."""
        for space in (*self.holders, self.reader):
            with contextlib.suppress(OSError):
                _ip("netns", "del", space)

    def limit(self, mbit_s: float | None) -> None:
        """Let every holder send at most so fast; None lifts the limit."""
        for space in self.holders:
            with contextlib.suppress(OSError):
                run("tc", "-n", space, "qdisc", "del", "dev", "data", "root")
            if mbit_s is not None:
                bucket = max(MIN_BUCKET_BYTES, int(mbit_s * 1e6 / 8 * BUCKET_S))
                rate = ("tbf", "rate", f"{mbit_s:g}mbit", "burst", f"{bucket}b", "latency", "100ms")
                run("tc", "-n", space, "qdisc", "add", "dev", "data", "root", *rate)

    def holder_address(self, number: int) -> str:
        """Where holder `number` serves."""
        return DATA_NET.format(self._first_net + number) + ".1"

    def control_address(self, number: int) -> str:
        """Of a namespace towards the controller; the reader's number is the count of holders."""
        return CONTROL_NET.format(self._first_net + number) + ".2"

    def controller_address(self, number: int) -> str:
        """The controller's address as that namespace knows it."""
        return CONTROL_NET.format(self._first_net + number) + ".1"

    @staticmethod
    def inside(space: str) -> list[str]:
        """What to put before a command so that it runs there."""
        return ["ip", "netns", "exec", space]


def _ip(*arguments: str) -> None:
    run("ip", *arguments)
