"""Log lines of the controller: one per event, `key=value`, with a limit on what strangers can make us write."""

from __future__ import annotations

import json
import logging
import re
from collections import OrderedDict

_PLAIN = re.compile(r"^[\w.,:;@/+\-\[\]()%*]+$", re.ASCII)
_VALUE_MAX_CHARACTERS = 500


def fields(**values: object) -> str:
    """`key=value` pairs in one line. Values with spaces, quotes or control characters are quoted, long ones cut."""
    return " ".join(f"{key}={_value(value)}" for key, value in values.items())


def _value(value: object) -> str:
    text = f"{value:.3f}" if isinstance(value, float) else str(value)
    if len(text) > _VALUE_MAX_CHARACTERS:
        text = text[:_VALUE_MAX_CHARACTERS] + "..."
    return text if _PLAIN.match(text) else json.dumps(text)


def log(logger: logging.Logger, level: int, event: str, /, **values: object) -> None:
    """Write one event."""
    if logger.isEnabledFor(level):
        logger.log(level, "%s", fields(event=event, **values))


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
