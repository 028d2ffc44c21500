"""The first seed's scenario on real vLLM with a real Redis instead of the controller, following and asking."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvmesh.bench.cluster import complete
from kvmesh.models import make_tiny_llama
from process.controller_nodes import wait_for
from support.redis_servers import needs_redis, running_redis
from support.servers import CHUNK_TOKENS, NO_CONTROLLER, cold_then_pulled, pulled, running_pair, token_prompt

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900), needs_redis]


def test_redis_instead_of_the_controller(tmp_path: Path) -> None:
    """Chunks are pulled with the same text: first as a replica knows them, then, when the replica has grown beyond its
    limit, by asking, where vLLM is told to retry. Without Redis requests are answered as if nothing were shared.
    """
    model = make_tiny_llama()
    with running_redis(tmp_path / "redis") as redis:
        config = NO_CONTROLLER | {
            "lookup_url": f"localhost:{redis.port}",
            "replica_max_chunks": 20,
            "heartbeat_interval_s": 0.5,
        }
        with running_pair(tmp_path, model, config=config) as pair:
            cold, again, chunks = cold_then_pulled(pair, token_prompt(4000, 1), max_tokens=8)
            assert again.text == cold.text
            assert chunks >= 14, pair.show_logs()
            complete(pair.first.url, token_prompt(4000, 2), max_tokens=1)
            wait_for(lambda: "asking the directory from now on" in pair.second.log(), 60)
            prompt = token_prompt(4000, 3)
            cold = complete(pair.first.url, prompt, max_tokens=8)
            wait_for(lambda: sum(b":k:" in key for key in redis.all_keys()) >= 3 * (4000 // CHUNK_TOKENS), 60)
            before, _ = pulled(pair.second)
            again = complete(pair.second.url, prompt, max_tokens=8)
            assert again.text == cold.text
            assert pulled(pair.second)[0] - before >= 14, pair.show_logs()
            redis.stop()
            prompt = token_prompt(1000, 4)
            assert (
                complete(pair.second.url, prompt, max_tokens=4).text
                == complete(pair.first.url, prompt, max_tokens=4).text
            )
