"""The three ways in which clients change an object: JSON merge patch, strategic merge patch, server-side apply.

Only what Helm sends for the kinds that a chart has. Strategic merge follows the documentation of the Kubernetes API:
lists of objects are merged by a key that depends on the field, and keys that begin with `$` are directives.
"""

from __future__ import annotations

import copy
from typing import Any

Object = dict[str, Any]

MERGE_KEYS = {
    "containers": ("name",),
    "initContainers": ("name",),
    "volumes": ("name",),
    "volumeMounts": ("mountPath",),
    "env": ("name",),
    "imagePullSecrets": ("name",),
    "topologySpreadConstraints": ("topologyKey",),
    "secrets": ("name",),
    # Two lists have this name: those of containers, and those of services.
    "ports": ("containerPort", "port"),
}
"""Fields whose items are merged, with the keys by which items are told apart; other lists are replaced as a whole."""


def merge_patch(target: Object, patch: Object) -> Object:
    """RFC 7386: null removes, mappings merge, everything else replaces."""
    result = dict(target)
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, dict):
            before = result.get(key)
            result[key] = merge_patch(before if isinstance(before, dict) else {}, value)
        else:
            result[key] = value
    return result


def strategic_patch(target: Object, patch: Object) -> Object:
    """As `merge_patch`, with lists merged by their keys."""
    if patch.get("$patch") == "replace":
        return {key: value for key, value in patch.items() if key != "$patch"}
    result = dict(target)
    for key, value in patch.items():
        if key.startswith(("$setElementOrder/", "$deleteFromPrimitiveList/")) or key == "$patch":
            continue
        if key == "$retainKeys":
            result = {name: kept for name, kept in result.items() if name in value}
        elif value is None:
            result.pop(key, None)
        elif isinstance(value, dict):
            before = result.get(key)
            result[key] = strategic_patch(before if isinstance(before, dict) else {}, value)
        elif isinstance(value, list) and key in MERGE_KEYS:
            result[key] = _merge_list(key, list(result.get(key) or ()), value, patch.get(f"$setElementOrder/{key}"))
        else:
            result[key] = value
    return result


def _merge_list(field: str, items: list[Object], changes: list[Object], order: list[Object] | None) -> list[Object]:
    by = next(key for key in MERGE_KEYS[field] if any(key in one for one in [*changes, *items, *(order or ())]))
    merged = {item[by]: item for item in items}
    for change in changes:
        if change.get("$patch") == "delete":
            merged.pop(change[by], None)
        else:
            merged[change[by]] = strategic_patch(merged.get(change[by], {}), change)
    if order:
        wanted = [one[by] for one in order if one[by] in merged]
        return [merged[name] for name in [*wanted, *(name for name in merged if name not in wanted)]]
    return list(merged.values())


def apply_patch(target: Object | None, wanted: Object) -> Object:
    """Server-side apply by the one and only manager: what it names is so, and what it no longer names goes.

    Everything that only the server sets (status, uid, ...) stays.
    """
    if target is None:
        return copy.deepcopy(wanted)
    result = {key: value for key, value in target.items() if key in {"status", "apiVersion", "kind"}}
    result.update(copy.deepcopy(wanted))
    metadata = {key: target["metadata"][key] for key in ("uid", "creationTimestamp") if key in target["metadata"]}
    result["metadata"] = {**metadata, **result.get("metadata", {})}
    return result
