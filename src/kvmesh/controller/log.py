"""Log lines of the controller: one per event, `key=value`, with a limit on what strangers can make us write."""

from __future__ import annotations

import json
import logging
import re

from kvmesh.logs import LogLimiter

__all__ = ["LogLimiter", "fields", "log"]

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
