"""Logging of our own processes: one line per event that a person would act on, `key=value`, on standard error."""

from __future__ import annotations

import logging
import sys
import time
from collections import OrderedDict
from collections.abc import Callable

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
    handler.addFilter(_FloodFilter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


class _OneLineFormatter(logging.Formatter):
    """A message is one line, whatever a peer has put into its name or its error. Tracebacks, ours, keep their lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  (overrides)
        return super().formatMessage(record).translate(_ESCAPED)


MAX_LINES, WINDOW_S = 300, 10.0
"""So many lines of one kind in so long are written; whatever a peer or a controller does, a disk does not fill up."""


class _FloodFilter(logging.Filter):
    """Lets the first `MAX_LINES` records of a kind (logger and text before formatting) through, and counts the rest."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._seen: dict[tuple[str, str], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Called under the handler's own lock or not: a line more or less does no harm."""
        kind, now_s = (record.name, str(record.msg)), self._clock()
        since_s, lines = self._seen.get(kind, (now_s, 0))
        if now_s - since_s > WINDOW_S:
            if lines > MAX_LINES:
                record.msg = f"{record.msg} (kept back: {lines - MAX_LINES} lines of this kind)"
            since_s, lines = now_s, 0
        if len(self._seen) > 10_000:  # texts that were made up on the way
            self._seen.clear()
        self._seen[kind] = (since_s, lines + 1)
        return lines < MAX_LINES


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
