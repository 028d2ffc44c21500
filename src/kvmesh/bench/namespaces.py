"""Network namespaces of benchmarks: names that say whose they are, so that those of the dead can be removed."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess

_NAME = re.compile(r"kvmesh-(\d+)-\S+")


def name_of(role: str) -> str:
    """What this process calls its namespace for `role`."""
    return f"kvmesh-{os.getpid()}-{role}"


def remove_left() -> None:
    """Remove the namespaces of processes that have ended without doing so, killed ones: all of us use the same few
    addresses, and packets for ours would go to theirs. Raises OSError in words.
    """
    for line in run("ip", "netns", "list").splitlines():
        found = _NAME.match(line)
        if found is not None and not _lives(int(found[1])):
            with contextlib.suppress(OSError):  # somebody else does the same
                run("ip", "netns", "del", found[0])


def run(*command: str) -> str:
    """Standard output of ip or tc. Raises OSError with its words."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")
    return done.stdout


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
