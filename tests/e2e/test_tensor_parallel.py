"""Tensor parallel: vLLM's pool holds all ranks of a chunk in one row, so a chunk of TP=2 travels as one. These servers
have no directory but each other.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvmesh.models import TINY, make_tiny_llama
from support.servers import CHUNK_TOKENS, PoolView, cold_then_pulled, node_of, running_pair, token_prompt

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


def test_two_ranks_share_as_one(tmp_path: Path) -> None:
    """Two instances of two ranks each, which know each other by `static_peers`: whole chunks are pulled, text and bytes
    are the holder's, and a chunk has the parts of both ranks.
    """
    last = (os.cpu_count() or 2) - 1
    env = {"VLLM_CPU_OMP_THREADS_BIND": f"0|{last}"}
    arguments = ("--no-enable-prefix-caching", "--tensor-parallel-size", "2")
    options = {"arguments": arguments, "max_model_len": 4096, "env": env}
    model = make_tiny_llama(shape=TINY)
    with running_pair(tmp_path, model, config={"max_local_cpu_size": 0.5}, without_directory=True, **options) as pair:
        for seed in range(2):
            cold, again, chunks = cold_then_pulled(pair, token_prompt(2000, seed))
            assert again.text == cold.text
            assert chunks == 2000 // CHUNK_TOKENS, pair.show_logs()
        views = [PoolView(node_of(instance)) for instance in (pair.first, pair.second)]
        held, copied = (view.chunks() for view in views)
        both = held.keys() & copied.keys()
        assert len(both) == 2 * (2000 // CHUNK_TOKENS)
        assert all(held[key] == copied[key] for key in both)
        for view in views:
            assert view.ledger.chunk_bytes >= CHUNK_TOKENS * TINY.kv_bytes_per_token(4)
            view.close()
        assert not pair.controller.instances(), "nobody has told it anything"
