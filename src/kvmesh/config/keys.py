"""How a key of the configuration is declared, and what messages and documentation know about it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import Field

if TYPE_CHECKING:
    from pydantic.config import JsonDict
    from pydantic.fields import FieldInfo


class KeyInfo(NamedTuple):
    """One key as users meet it."""

    name: str
    aliases: tuple[str, ...]
    default: str
    allowed: str
    meaning: str


class ConfigRow(NamedTuple):
    """One line of `kvmesh config check`. `value` can go into JSON as it is and holds no secret."""

    key: str
    value: str | int | float | bool | list[str] | None
    source: str
    meaning: str


def key(
    default: object,
    meaning: str,
    *,
    allowed: str,
    aliases: tuple[str, ...] = (),
    shown_default: str | None = None,
    **constraints: Any,
) -> Any:
    """A pydantic field that also knows its aliases and, in words, what is allowed.

    Args:
        default: the value, or a function that derives it from the keys declared before it (a dict by name).
        meaning: one or two sentences; the documentation has the same.
        allowed: completes "expected ..." in a message.
        aliases: further names, LMCache's among them.
        shown_default: the default in words, where the value itself says little.
        constraints: pydantic's own (`ge`, `pattern`, ...).
    """
    extra: JsonDict = {"allowed": allowed, "aliases": [*aliases], "shown_default": shown_default}
    source = {"default_factory": default} if callable(default) else {"default": default}
    return Field(**source, description=meaning, json_schema_extra=extra, **constraints)


def read_key(name: str, field: FieldInfo) -> KeyInfo | None:
    """What `key` put into a field; None for a field that is no key."""
    extra = field.json_schema_extra
    if not isinstance(extra, dict):
        return None
    aliases = extra["aliases"]
    assert isinstance(aliases, list)
    default = str(field.default).lower() if isinstance(field.default, bool) else str(field.default)
    return KeyInfo(
        name,
        tuple(str(alias) for alias in aliases),
        str(extra["shown_default"] or default),
        str(extra["allowed"]),
        field.description or "",
    )
