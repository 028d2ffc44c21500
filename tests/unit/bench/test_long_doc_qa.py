"""The workload's documents and the orders of its query round."""

from __future__ import annotations

from dataclasses import replace

from kvmesh.bench.long_doc_qa import LongDocQa

PLAN = LongDocQa(
    model="m",
    base_url="http://127.0.0.1:1",
    num_documents=3,
    document_length=4,
    output_len=1,
    repeat_count=2,
    repeat_mode="tile",
    max_inflight_requests=1,
)


def test_documents_share_no_prefix() -> None:
    documents = PLAN.documents()
    assert documents == ["0 hi hi hi hi", "1 hi hi hi hi", "2 hi hi hi hi"]


def test_orders_of_the_query_round() -> None:
    """tile: list after list; interleave: each document in a row; random: shuffled, the same for one seed."""
    names = ["a", "b", "c"]
    assert PLAN.queries(names) == ["a", "b", "c", "a", "b", "c"]
    assert replace(PLAN, repeat_mode="interleave").queries(names) == ["a", "a", "b", "b", "c", "c"]
    shuffled = replace(PLAN, repeat_mode="random")
    assert sorted(shuffled.queries(names)) == sorted(PLAN.queries(names))
    assert shuffled.queries(names) == shuffled.queries(names)
