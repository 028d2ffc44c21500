"""Members that cannot share are told by field, once for each group of them."""

from __future__ import annotations

import pytest

from kvmesh.core.format import Format
from kvmesh.doctor import formats
from kvmesh.doctor.findings import Level
from unit.doctor.makers import incompatible, make_cluster, make_situation, member, told


def findings(*pairs, environ=None):
    cluster = make_cluster(member("a"), member("b"), incompatibilities=list(pairs))
    return list(formats.check(make_situation(cluster=cluster, environ=environ or {})))


@pytest.mark.parametrize("field", [name for name in Format.__struct_fields__ if name != "model_name"])
def test_every_field_has_a_name_of_its_own_and_advice(field):
    (found,) = findings(incompatible("a", "b", (field, "x", "")))
    assert (found.check, found.level, found.about) == (f"format.{field}", Level.PROBLEM, "a / b")
    assert f"{field} is 'x' and empty" in found.message
    assert found.advice


def test_what_follows_from_another_field_is_not_told():
    """A chunk of half the tokens has half the bytes: one cause."""
    found = findings(incompatible("a", "b", ("chunk_tokens", "256", "128"), ("chunk_bytes", "2", "1")))
    assert told(found) == [("format.chunk_tokens", Level.PROBLEM)]


def test_two_causes_are_two_findings():
    found = findings(incompatible("a", "b", ("kv_dtype", "float16", "bfloat16"), ("hash_seed", "", "1")))
    assert [one.check for one in found] == ["format.kv_dtype", "format.hash_seed"]


def test_pairs_with_equal_differences_are_one_sentence():
    """Whichever way round they are listed."""
    pairs = [
        incompatible("a", "x", ("hash_seed", "", "1")),
        incompatible("b", "x", ("hash_seed", "", "1")),
        incompatible("w", "c", ("hash_seed", "1", "")),
    ]
    (split,) = formats.splits(pairs)
    assert (split.left, split.right) == (("a", "b", "c"), ("w", "x"))
    assert split.sentence() == "a, b, c cannot share KV with w, x: hash_seed is empty here and '1' there"


def test_other_models_are_no_problem():
    assert told(findings(incompatible("a", "b", ("model_name", "x", "y"), same_model=False))) == [
        ("format.equal", Level.OK)
    ]


def test_a_hash_seed_in_this_shell_that_no_member_has():
    found = findings(environ={"PYTHONHASHSEED": "7"})
    assert told(found) == [("format.equal", Level.OK), ("format.hash_seed", Level.WARNING)]
    assert told(findings(environ={"PYTHONHASHSEED": "random"})) == [("format.equal", Level.OK)]


def test_long_lists_are_cut():
    pairs = [incompatible(name, "x", ("hash_seed", "", "1")) for name in "abcde"]
    assert findings(*pairs)[0].about == "a, b, c and 2 more / x"
