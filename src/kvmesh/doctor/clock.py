"""This machine's clock beside the controller's.

No part of kvmesh compares the clocks of two machines; but whoever reads logs and traces of several does, and so do
certificates.
"""

from __future__ import annotations

from collections.abc import Iterator

from kvmesh.doctor.findings import CONTROLLER, Finding, ok, skipped, warning
from kvmesh.doctor.situation import Clock, Situation
from kvmesh.units import duration

CHECK = "clock.skew"
TOLERATED_S = 2.0
ROUNDING_S = 2.0
"""HTTP tells whole seconds, and the controller's server renews its header once a second."""


def check(situation: Situation) -> Iterator[Finding]:
    """The difference, as far as HTTP's Date header shows it."""
    clock = None if situation.cluster is None else situation.cluster.clock
    if clock is None:
        yield skipped(CHECK, CONTROLLER, "no controller has told the time")
        return
    yield skew(clock)


def skew(clock: Clock) -> Finding:
    """How far apart the clocks are at least."""
    ahead_s = clock.controller_s - clock.after_s
    behind_s = clock.before_s - (clock.controller_s + ROUNDING_S)
    apart_s = max(ahead_s, behind_s, 0.0)
    if apart_s <= TOLERATED_S:
        return ok(CHECK, CONTROLLER, "its clock and this machine's agree within a few seconds")
    which = "ahead of" if ahead_s > 0 else "behind"
    return warning(
        CHECK,
        CONTROLLER,
        f"its clock is {duration(apart_s)} {which} this machine's: logs and traces of the two will not match, and "
        "certificates may seem invalid",
        "set both by NTP (timedatectl, chronyc tracking)",
    )
