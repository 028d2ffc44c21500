"""Who may talk to whom by the rendered NetworkPolicies, as a network plug-in would decide it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from support.helm import Manifest


class End(NamedTuple):
    """A pod of the release's namespace by its labels; None: somebody outside of the cluster or of the namespace."""

    labels: dict[str, str] | None
    namespace_labels: dict[str, str] | None = None


OUTSIDE = End(None)


def allowed(policies: Iterable[Manifest], source: End, target: End, port: int, protocol: str = "TCP") -> bool:
    """Whether both ends' policies let a connection pass."""
    policies = list(policies)
    return _passes(policies, "Egress", source, target, port, protocol) and _passes(
        policies, "Ingress", target, source, port, protocol
    )


def _passes(policies: list[Manifest], direction: str, here: End, there: End, port: int, protocol: str) -> bool:
    if here.labels is None or here.namespace_labels is not None:
        return True  # not ours to decide
    mine = [
        one["spec"]
        for one in policies
        if direction in one["spec"]["policyTypes"] and _matches(one["spec"]["podSelector"], here.labels)
    ]
    if not mine:
        return True  # a pod that no policy selects is open
    key = "to" if direction == "Egress" else "from"
    return any(
        _peer(rule.get(key), there) and _port(rule.get("ports"), port, protocol)
        for spec in mine
        for rule in spec.get(direction.lower()) or ()
    )


def _peer(peers: list[Manifest] | None, end: End) -> bool:
    if not peers:
        return True
    for peer in peers:
        if "namespaceSelector" in peer:
            found = end.namespace_labels is not None and _matches(peer["namespaceSelector"], end.namespace_labels)
        else:
            ours = end.labels is not None and end.namespace_labels is None
            found = ours and _matches(peer["podSelector"], end.labels or {})
        if found:
            return True
    return False


def _port(ports: list[Manifest] | None, port: int, protocol: str) -> bool:
    return not ports or any(one["port"] == port and one.get("protocol", "TCP") == protocol for one in ports)


def _matches(selector: Manifest, labels: dict[str, str]) -> bool:
    return selector.get("matchLabels", {}).items() <= labels.items()
