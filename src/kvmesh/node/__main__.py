"""`python -m kvmesh.node --link-fd N`: how an engine starts its node. People use `kvmesh node`."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import os
import signal
import socket
import sys

import psutil

from kvmesh.descriptors import raise_descriptor_limit
from kvmesh.logs import configure_logging
from kvmesh.node.engine_link import EngineLink


def main() -> int:
    """Serve the engine at the other end of the link; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--link-fd", type=int, required=True, help="connected unix socket to the engine")
    parser.add_argument("--log-level", default="INFO")
    arguments = parser.parse_args()
    configure_logging(arguments.log_level, process="node")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the engine decides when we end
    gc.freeze()
    raise_descriptor_limit()
    _leave_the_engines_cores()
    connection = socket.socket(fileno=arguments.link_fd)
    return asyncio.run(EngineLink(connection).serve())


def _leave_the_engines_cores() -> None:
    """Run where the operator lets the engine run, not on the cores that it has bound itself to for computing.

    vLLM on CPUs binds its threads, and a child inherits that: the node would share one core with the engine that waits
    for it. (Measured: a peer hit of 6,000 tokens took 1.42 times as long as a local hit, and 1.07 times since.) What
    the operator allows is what the engine's own parent has.
    """
    with contextlib.suppress(OSError, psutil.Error):
        parent = psutil.Process(os.getppid()).ppid()
        if parent > 0:
            os.sched_setaffinity(0, os.sched_getaffinity(parent))


if __name__ == "__main__":
    sys.exit(main())
