"""What people are told about a reason."""

from __future__ import annotations

import pytest

from kvmesh.core.advice import advise
from kvmesh.core.reasons import MissReason


@pytest.mark.parametrize("reason", MissReason)
def test_every_reason_has_a_text_and_says_what_to_change(reason):
    advice = advise(reason)
    assert len(advice.text) > 20
    assert len(advice.change) > 20
    assert "{" not in advice.text + advice.change


def test_numbers_are_put_into_the_text():
    gate = advise(MissReason.GATE_REFUSED, {"fetch_s": 1.25, "prefill_s": 0.4}).text
    assert "1.25 s to fetch" in gate
    assert "400 ms to compute" in gate
    short = advise(MissReason.BELOW_ONE_CHUNK, {"prompt_tokens": 200.0, "chunk_tokens": 256.0}).text
    assert "200 tokens" in short
    assert "256" in short


def test_a_detail_that_is_not_whole_is_left_out():
    assert advise(MissReason.GATE_REFUSED, {"fetch_s": 1.0}) == advise(MissReason.GATE_REFUSED)
