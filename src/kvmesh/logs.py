"""Logging of our own processes: one line per event that a person would act on, `key=value`, on standard error."""

from __future__ import annotations

import logging
import sys


def configure_logging(level: str, *, process: str) -> None:
    """Set up the root logger of a kvmesh process. `process` (node, controller, ...) stands in every line.

    Engines are not touched: there the lines go through the engine's own logging.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        logging.Formatter(
            f"%(levelname)s %(asctime)s kvmesh-{process} pid=%(process)d %(name)s: %(message)s", "%m-%d %H:%M:%S"
        )
    )
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
