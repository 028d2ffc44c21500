"""File descriptors: what a process that serves many connections takes of them."""

from __future__ import annotations

import contextlib
import resource

ENOUGH = 65_536


def raise_descriptor_limit() -> None:
    """Take as many descriptors as this user may have, up to `ENOUGH`. A connection costs one, a member of a directory
    or a request of the router two or three, and 1,024 is a common soft limit.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = ENOUGH if hard == resource.RLIM_INFINITY else min(hard, ENOUGH)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    with contextlib.suppress(OSError, ValueError):  # not allowed here; then it stays as it is
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
