"""Where a cluster key comes from: a file that only its owner can read, or the environment. Never an argument.

No message of this module contains the key or a part of it.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kvmesh.errors import ConfigProblem

if TYPE_CHECKING:
    from collections.abc import Mapping

CLUSTER_KEY_VARIABLE: Final = "KVMESH_CLUSTER_KEY"
CLUSTER_KEY_MIN_BYTES: Final = 16
MAX_FILE_BYTES: Final = 4096
_EXPECTED = f"one line of text with at least {CLUSTER_KEY_MIN_BYTES} bytes"
_HINT = "kvmesh key new FILE makes a good one"


def find_cluster_key(
    file: str | None, environ: Mapping[str, str], *, name: str, where: str, problems: list[ConfigProblem]
) -> str | None:
    """The cluster key's text, None when there is none or when it is no good, which is added to `problems`.

    Args:
        file: path of the key's file.
        environ: may hold KVMESH_CLUSTER_KEY. An empty variable counts as not set.
        name: how the user calls the setting with the file.
        where: where that setting came from.
        problems: taken up.
    """
    variable = environ.get(CLUSTER_KEY_VARIABLE)
    if file is not None and variable:
        problems.append(
            ConfigProblem(name, where, "one cluster key", f"a file, and {CLUSTER_KEY_VARIABLE}", "remove one of them")
        )
        return None
    try:
        if file is not None:
            return _check(_read(Path(file).expanduser()))
        return _check(variable) if variable else None
    except ValueError as error:
        found, _, hint = str(error).partition("; ")
        thing, place = (CLUSTER_KEY_VARIABLE, "env") if file is None else (name, where)
        problems.append(ConfigProblem(thing, place, _EXPECTED, found, hint or _HINT))
        return None


def _read(path: Path) -> str:
    """The text of a key file. Raises ValueError that says what was found and, after a semicolon, what to do."""
    try:
        # Not blocking, so that a named pipe that nobody writes to cannot hold up the start.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ValueError(f"{path}, which is no file")
            if status.st_mode & 0o077:
                raise ValueError(f"{path} with mode {stat.S_IMODE(status.st_mode):04o}; chmod 600 {path}")
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"{path} with more than {MAX_FILE_BYTES} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise ValueError(f"{path} with bytes that are no text") from None


def _check(text: str) -> str:
    key = text.strip()
    if len(key.encode(errors="surrogateescape")) < CLUSTER_KEY_MIN_BYTES:
        raise ValueError("a shorter one")
    if not key.isprintable():  # several lines, such as those of a certificate, or bytes that are no text
        raise ValueError("several lines, or characters that cannot be printed")
    return key
