"""Logging of our own processes: one line per event that a person would act on, `key=value`, on standard error."""

from __future__ import annotations

import logging
import sys
from collections import OrderedDict

_ESCAPED = {number: f"\\x{number:02x}" for number in (*range(32), 127)} | {10: "\\n", 9: "\\t"}


def configure_logging(level: str, *, process: str) -> None:
    """Set up the root logger of a kvmesh process. `process` (node, controller, ...) stands in every line.

    Engines are not touched: there the lines go through the engine's own logging.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        _OneLineFormatter(
            f"%(levelname)s %(asctime)s kvmesh-{process} pid=%(process)d %(name)s: %(message)s", "%m-%d %H:%M:%S"
        )
    )
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


class _OneLineFormatter(logging.Formatter):
    """A message is one line, whatever a peer has put into its name or its error. Tracebacks, ours, keep their lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  (overrides)
        return super().formatMessage(record).translate(_ESCAPED)


class LogLimiter:
    """Lets one line per key through in `interval_s` and counts the others. Memory is bounded by `max_keys`."""

    def __init__(self, interval_s: float = 10.0, max_keys: int = 1024) -> None:
        self._interval_s = interval_s
        self._max_keys = max_keys
        self._last: OrderedDict[str, tuple[float, int]] = OrderedDict()

    def allow(self, key: str, now_s: float) -> int | None:
        """None: stay silent. Otherwise how many lines of this key were kept back since the last one."""
        seen = self._last.get(key)
        if seen is not None and now_s - seen[0] < self._interval_s:
            self._last[key] = (seen[0], seen[1] + 1)
            return None
        self._last[key] = (now_s, 0)
        self._last.move_to_end(key)
        if len(self._last) > self._max_keys:
            self._last.popitem(last=False)
        return 0 if seen is None else seen[1]
