"""Members that cannot share KV although they serve a model of the same name: which field differs, and what to do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

from kvmesh.client import Incompatibility
from kvmesh.doctor.findings import CONTROLLER, Finding, ok, problem, warning
from kvmesh.doctor.situation import Situation
from kvmesh.units import listed

ADVICE: Mapping[str, str] = MappingProxyType(
    {
        "model_weights": "these are two models under one name: serve the same files (revision, quantisation) with "
        "the same --hf-overrides everywhere, or give them different names",
        "kv_dtype": "start all with the same --dtype and --kv-cache-dtype",
        "kv_layout": "run the same vLLM version and attention backend everywhere",
        "block_tokens": "start all with the same --block-size",
        "chunk_tokens": "set the same chunk_size (chunk_tokens) everywhere",
        "groups": "the layers differ: same model, same vLLM version, same --hf-overrides everywhere",
        "hash_algorithm": "start all with the same --prefix-caching-hash-algo",
        "hash_seed": "PYTHONHASHSEED enters the block hashes: set it to the same value everywhere, or nowhere",
        "parallel_layout": "start all with the same tensor, pipeline and context parallel sizes",
        "instruction_set": "the CPU backend packs KV by instruction set: use machines with equal processors",
    }
)
"""What to do, by field; `chunk_bytes` follows from others."""
FOLLOWING = frozenset({"chunk_bytes"})
"""Fields that differ only because another one does, and are no cause of their own."""


class Split(NamedTuple):
    """Two groups of members between which the same fields differ in the same way."""

    left: tuple[str, ...]
    right: tuple[str, ...]
    fields: tuple[tuple[str, str, str], ...]
    """Name, left's value, right's value."""
    same_model: bool

    def sentence(self) -> str:
        """Who, and what differs."""
        told = "; ".join(
            f"{name} is {_shown(left)} here and {_shown(right)} there" for name, left, right in self.fields
        )
        return f"{listed(self.left)} cannot share KV with {listed(self.right)}: {told}"


def check(situation: Situation) -> Iterator[Finding]:
    """One finding for each field that keeps members of the same model name apart."""
    if situation.cluster is None or not situation.cluster.members.instances:
        return
    found = splits(pair for pair in situation.cluster.incompatibilities if pair.same_model)
    for split in found:
        yield from _findings(split)
    if not found:
        models = {member.format.model_name for member in situation.cluster.members.instances}
        yield ok(
            "format.equal", CONTROLLER, f"members of one model name can share; models: {', '.join(sorted(models))}"
        )
    here = situation.environ.get("PYTHONHASHSEED", "")
    seeds = {str(member.format.fields.get("hash_seed", "")) for member in situation.cluster.members.instances}
    if here and here != "random" and here not in seeds:
        yield warning(
            "format.hash_seed",
            "this shell",
            f"PYTHONHASHSEED is {here} here and {' or '.join(map(_shown, sorted(seeds)))} in the members: an engine "
            "started from here would share with nobody",
            ADVICE["hash_seed"],
        )


def splits(pairs: Iterable[Incompatibility]) -> list[Split]:
    """Pairs with equal differences, put together."""
    sides: dict[tuple[tuple[tuple[str, str, str], ...], bool], tuple[set[str], set[str]]] = {}
    for pair in pairs:
        fields = tuple((one.field, one.ours, one.theirs) for one in pair.fields)
        turned = tuple((name, theirs, ours) for name, ours, theirs in fields)
        left_id, right_id = pair.instance_id, pair.other_instance_id
        if (turned, pair.same_model) in sides:
            fields, left_id, right_id = turned, right_id, left_id
        left, right = sides.setdefault((fields, pair.same_model), (set(), set()))
        left.add(left_id)
        right.add(right_id)
    return [
        Split(tuple(sorted(left)), tuple(sorted(right)), fields, same_model)
        for (fields, same_model), (left, right) in sides.items()
    ]


def _findings(split: Split) -> Iterator[Finding]:
    causes = [field for field in split.fields if field[0] not in FOLLOWING] or list(split.fields)
    about = f"{listed(split.left)} / {listed(split.right)}"
    for name, left, right in causes:
        message = f"they serve one model name and cannot share KV: {name} is {_shown(left)} and {_shown(right)}"
        yield problem(f"format.{name}", about, message, ADVICE.get(name, f"make {name} equal"))


def _shown(value: str) -> str:
    return repr(value) if value else "empty"
