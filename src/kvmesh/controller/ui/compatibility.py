"""Which formats there are, who has them, and what keeps the others from sharing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from kvmesh.controller.formats import FormatPair
from kvmesh.controller.instances import FormatGroup
from kvmesh.controller.ui.frame import card
from kvmesh.controller.ui.live import Moment
from kvmesh.controller.ui.open_pages import Update
from kvmesh.controller.ui.tables import Column, Table, cell
from kvmesh.controller.ui.units import count, listed, some

CHANGES = {
    "model_name": "Another model: nothing to share.",
    "model_weights": "Serve the same revision of the model, with the same weight files and options (hf_overrides).",
    "kv_dtype": "Start both engines with the same --kv-cache-dtype and --dtype.",
    "kv_layout": "Run the same version of the engine, with the same attention backend.",
    "block_tokens": "Start both engines with the same --block-size.",
    "chunk_tokens": "Set the same chunk_size in both configurations.",
    "chunk_bytes": "Follows from the other fields.",
    "groups": "Run the same version of the engine, with the same options for KV cache groups.",
    "hash_algorithm": "Start both engines with the same --prefix-caching-hash-algo.",
    "hash_seed": "Set the same PYTHONHASHSEED for both engines, or for neither.",
    "parallel_layout": "Start both engines with the same tensor, pipeline and context parallel sizes.",
    "instruction_set": "The CPUs differ in what decides the layout of KV: group equal machines.",
}


class Difference(NamedTuple):
    """One field that keeps two groups of members apart."""

    pair: FormatPair
    field: str
    ours: str
    theirs: str


def build() -> Update:
    """Inside a frame."""
    with card("What cannot be shared", "instances that serve one model name in formats that differ", level="h1"):
        table = differences_table()
    with card("Formats", "only instances of one format share"):
        formats = _formats_table()

    def update(moment: Moment) -> None:
        table.update_records(differences_of(moment.format_pairs))
        groups = list(moment.registry.groups.values())
        formats.update_records(sorted(groups, key=lambda group: len(group.members), reverse=True))

    return update


def differences_of(pairs: Sequence[FormatPair]) -> list[Difference]:
    """One record per pair and field; of different models only that they are different."""
    return [
        Difference(pair, one.field, one.ours, one.theirs)
        for pair in pairs
        for one in pair.differences
        if pair.same_model
    ]


def differences_table() -> Table[Difference]:
    """One row per differing field."""
    return Table[Difference](
        [
            Column("field", "Field", lambda one: cell(one.field, tone="bad"), lambda one: one.field, kind="state"),
            Column("ours", "These instances", lambda one: members(one.pair.ours)),
            Column("is", "Have", lambda one: one.ours or "nothing", kind="code"),
            Column("theirs", "Those instances", lambda one: members(one.pair.theirs)),
            Column("other", "Have", lambda one: one.theirs or "nothing", kind="code"),
            Column("change", "To share", lambda one: CHANGES.get(one.field, "Make it the same."), kind="long"),
            Column(
                "model",
                "Model",
                lambda one: one.pair.ours.format.model_name,
                lambda one: one.pair.ours.format.model_name,
            ),
        ],
        caption="Fields that keep instances of one model name from sharing",
        empty="Nothing: all instances that serve the same model can share with each other.",
        key=lambda one: f"{one.pair.ours.format_id} {one.pair.theirs.format_id} {one.field}",
        search=lambda one: f"{one.field} {' '.join(one.pair.ours.members)} {' '.join(one.pair.theirs.members)}",
        search_label="Search field or instance",
    )


def members(group: FormatGroup) -> str:
    """The names of a few."""
    return listed(sorted(group.members))


def sentence(pair: FormatPair) -> str:
    """What keeps them apart, in words."""
    told = "; ".join(f"{one.field} is {one.ours or 'empty'} and {one.theirs or 'empty'}" for one in pair.differences)
    return f"{members(pair.ours)} cannot share with {members(pair.theirs)}, though the model name is the same: {told}"


def _formats_table() -> Table[FormatGroup]:
    return Table[FormatGroup](
        [
            Column("model", "Model", lambda one: one.format.model_name, lambda one: one.format.model_name),
            Column("format", "Format", lambda one: cell(one.format_id[:8], hint=one.format_id), kind="code"),
            Column(
                "members", "Instances", lambda one: cell(count(len(one.members)), hint=members(one)), _size, right=True
            ),
            Column("chunks", "Chunks", lambda one: count(len(one.replica)), lambda one: len(one.replica), right=True),
            Column("chunk", "Chunk", lambda one: some(one.format.chunk_tokens, "token"), right=True),
            Column("dtype", "KV", lambda one: f"{one.format.kv_dtype}, {one.format.parallel_layout}"),
        ],
        caption="Formats among the members",
        empty="No instance has joined yet",
        key=lambda one: one.format_id,
        rows_per_page=20,
    )


def _size(group: FormatGroup) -> int:
    return len(group.members)
