"""Members that cannot share because their formats differ, and telling it once. Pure, but for the log."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping

from kvmesh.controller.instances import FormatGroup, Incompatibility, Instance
from kvmesh.controller.log import log
from kvmesh.core.format import differences

logger = logging.getLogger(__name__)

MAX_REMEMBERED = 20_000

Groups = Mapping[str, FormatGroup]


def incompatible_with(instance: Instance, groups: Groups) -> Iterator[Incompatibility]:
    """The members that this one cannot share with, and in which fields."""
    ours = instance.group.format
    for group in groups.values():
        if group is instance.group:
            continue
        found = tuple(differences(ours, group.format))
        same_model = ours.model_name == group.format.model_name
        for other in group.members:
            yield Incompatibility(instance.instance_id, other, same_model, found)


def incompatibilities(groups: Groups) -> Iterator[Incompatibility]:
    """Every incompatible pair of members, once."""
    for group in groups.values():
        for instance in group.members.values():
            yield from (pair for pair in incompatible_with(instance, groups) if pair.ours < pair.theirs)


class IncompatibilityLog:
    """One line per instance and format that it does not match, naming one member of that format."""

    def __init__(self) -> None:
        self._told: set[tuple[str, str, str]] = set()

    def tell(self, newcomer: Instance, groups: Groups) -> None:
        """Log what keeps this member from sharing. The same model name is a WARNING: somebody expects it to share."""
        for group in groups.values():
            key = (newcomer.instance_id, newcomer.group.format_id, group.format_id)
            if group is newcomer.group or key in self._told:
                continue
            if len(self._told) >= MAX_REMEMBERED:
                self._told.clear()
            self._told.add(key)
            ours, theirs = newcomer.group.format, group.format
            log(
                logger,
                logging.WARNING if ours.model_name == theirs.model_name else logging.INFO,
                "incompatible_formats",
                instance=newcomer.instance_id,
                other=next(iter(group.members)),
                others=len(group.members),
                differs=", ".join(map(str, differences(ours, theirs))),
            )
