"""What a check finds. Plain values."""

from __future__ import annotations

from enum import Enum

import msgspec


class Level(str, Enum):
    """How a check came out. The values are those of the JSON output: stable."""

    OK = "ok"
    WARNING = "warning"
    """Sharing works, or may work, with less effect than it could have; or something cannot be told from here."""
    PROBLEM = "problem"
    """Sharing fails, for somebody, now or at the next start."""
    SKIPPED = "skipped"
    """Nothing to look at here, and the message says why."""


class Finding(msgspec.Struct, frozen=True):
    """One line of the report."""

    check: str
    """What was looked at: `subject.detail`, such as `format.chunk_tokens`. Stable, for scripts."""
    level: Level
    about: str
    """Who or what it concerns: an instance, a port, a file, this machine."""
    message: str
    """One sentence: what was found, and what it means."""
    advice: str = ""
    """What to do; empty when there is nothing to do."""


def ok(check: str, about: str, message: str) -> Finding:
    """All is well."""
    return Finding(check, Level.OK, about, message)


def warning(check: str, about: str, message: str, advice: str) -> Finding:
    """Something that a person should look at."""
    return Finding(check, Level.WARNING, about, message, advice)


def problem(check: str, about: str, message: str, advice: str) -> Finding:
    """Something that keeps KV from being shared."""
    return Finding(check, Level.PROBLEM, about, message, advice)


def skipped(check: str, about: str, message: str, advice: str = "") -> Finding:
    """Not looked at, and why."""
    return Finding(check, Level.SKIPPED, about, message, advice)


MACHINE = "this machine"
INSTANCE = "this instance"
"""The one whose configuration file was given."""
CONTROLLER = "controller"
