"""Members that cannot share because their formats differ, and telling it once. Pure, but for the log."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import NamedTuple

from kvmesh.controller.instances import FormatGroup, Incompatibility, Instance
from kvmesh.controller.log import log
from kvmesh.core.format import FieldDifference, differences

logger = logging.getLogger(__name__)

MAX_REMEMBERED = 20_000
MAX_PAIRED_FORMATS = 60
"""Formats that are compared with each other for people to read: those with the most members."""

Groups = Mapping[str, FormatGroup]


class FormatPair(NamedTuple):
    """Two formats among the members. A thousand members have few formats, but half a million pairs."""

    ours: FormatGroup
    theirs: FormatGroup
    same_model: bool
    """Both name the same model, so somebody expects them to share."""
    differences: tuple[FieldDifference, ...]


def format_pairs(groups: Groups) -> list[FormatPair]:
    """Every pair of formats once; those of one model name first, the larger format on the left."""
    ordered = sorted(groups.values(), key=lambda group: len(group.members), reverse=True)
    del ordered[MAX_PAIRED_FORMATS:]
    pairs = [
        FormatPair(
            ours,
            theirs,
            ours.format.model_name == theirs.format.model_name,
            tuple(differences(ours.format, theirs.format)),
        )
        for ours, theirs in combinations(ordered, 2)
    ]
    return sorted(pairs, key=lambda pair: not pair.same_model)


def incompatible_count(instance: Instance, groups: Groups) -> int:
    """How many members this one cannot share with."""
    return sum(len(group.members) for group in groups.values() if group is not instance.group)


def incompatible_with(instance: Instance, groups: Groups) -> Iterator[Incompatibility]:
    """The members that this one cannot share with, and in which fields; those of the same model name first."""
    ours = instance.group.format
    others = [group for group in groups.values() if group is not instance.group]
    others.sort(key=lambda group: group.format.model_name != ours.model_name)
    for group in others:
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
