"""`kvmesh key`: making cluster keys, and the HTTP token that follows from one."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import typer

from kvmesh.config.cluster_key import CLUSTER_KEY_VARIABLE, find_cluster_key
from kvmesh.errors import ConfigError, ConfigProblem, StartupError
from kvmesh.wire.auth import ClusterKey

KEY_BYTES = 32


def new_key(file: Path | None) -> None:
    """Make a random key. Raises StartupError when the file is there already or cannot be made."""
    text = secrets.token_urlsafe(KEY_BYTES)
    if file is None:
        typer.echo(text)
        return
    try:
        # The mode counts from the first moment on, and nobody's file is overwritten.
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w") as out:
            out.write(text + "\n")
    except OSError as error:
        found = error.strerror or str(error)
        raise StartupError(f"cluster key file {file}", expected="a new file", found=found) from None
    typer.echo(f"{file}: copy it to all instances and to the controller, and keep it secret", err=True)


def token(file: Path | None) -> str:
    """The HTTP token of the key in `file`, else of the one in the environment. Raises ConfigError, also for no key."""
    found = find_token(file)
    if found is None:
        raise ConfigError([ConfigProblem(CLUSTER_KEY_VARIABLE, "env", "a cluster key", "none")])
    return found


def find_token(file: Path | None) -> str | None:
    """The same; None without any key."""
    key = find_key(file)
    return None if key is None else key.http_token()


def find_key(file: Path | None) -> ClusterKey | None:
    """The key in `file`, else the one in the environment, else None. Raises ConfigError when it is no good."""
    problems: list[ConfigProblem] = []
    text = find_cluster_key(
        None if file is None else str(file),
        {} if file is not None else os.environ,
        name="--cluster-key-file",
        where="argument",
        problems=problems,
    )
    if problems:
        raise ConfigError(problems)
    return None if text is None else ClusterKey(text)
