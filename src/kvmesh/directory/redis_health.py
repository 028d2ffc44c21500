"""What is wrong with a directory, by the part of the work that suffers; said once per change."""

from __future__ import annotations

import logging
from collections.abc import Callable

log = logging.getLogger("kvmesh.directory")


class Health:
    """Collects the troubles of one directory's parts. Lives on the node's event loop."""

    def __init__(self, name: str, on_connection: Callable[[bool], None]) -> None:
        """
        Args:
            name: what the log calls the directory; holds no secret.
            on_connection: told when the directory can be followed, and when no longer.
        """
        self._name = name
        self._on_connection = on_connection
        self._troubles: dict[str, tuple[str, str]] = {}
        """Kind and text by part."""
        self._following: set[str] = set()
        self._awaited: set[str] = set()
        self._connected = False

    def await_parts(self, parts: set[str]) -> None:
        """The directory counts as connected when all of these are well."""
        self._awaited = set(parts)

    @property
    def connected(self) -> bool:
        return self._connected

    @property
    def problem(self) -> str:
        """Everything that is wrong now, in words; empty when all is well."""
        return "; ".join(sorted({text for _, text in self._troubles.values()}))

    @property
    def kinds(self) -> list[str]:
        """The same, in one word each."""
        return sorted({kind for kind, _ in self._troubles.values()})

    def trouble(self, part: str, kind: str, text: str) -> None:
        """A part of the work does not get on."""
        is_news = kind not in self.kinds
        self._troubles[part] = (kind, text)
        if is_news:
            log.warning(
                "directory trouble directory=%s reason=%s: %s; known chunks stay usable", self._name, kind, text
            )
        if part in self._awaited:
            self._following.discard(part)
        self._tell()

    def well(self, part: str) -> None:
        """A part gets on."""
        before = self._troubles.pop(part, None)
        if before is not None and before[0] not in self.kinds:
            log.info("directory trouble is over directory=%s reason=%s", self._name, before[0])
        if part in self._awaited:
            self._following.add(part)
        self._tell()

    def _tell(self) -> None:
        connected = bool(self._awaited) and self._following >= self._awaited
        if connected == self._connected:
            return
        self._connected = connected
        if connected:
            log.info("joined the directory %s", self._name)
        self._on_connection(connected)
