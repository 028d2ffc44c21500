"""A pool that holds a tenth of the working set, on real vLLM: evictions all the time while the peer reads, and never a
wrong byte. All that the instances know of each other comes out of a Redis Cluster, where there is a redis-server.
"""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Iterator

import pytest

from kvmesh.bench.cluster import complete
from kvmesh.models import TINY, make_tiny_llama
from support.redis_servers import SERVER, needs_redis, running_redis_cluster
from support.servers import NO_CONTROLLER, Pair, PoolView, cold_then_pulled, node_of, pulled, running_pair, token_prompt

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

CHUNK_TOKENS = 128  # the CPU platform's block: many small chunks
PROMPTS = [token_prompt(1100, 20_000 + seed) for seed in range(100)]
CHUNKS = len(PROMPTS) * (1100 // CHUNK_TOKENS)
POOL_GB = CHUNKS / 10 * CHUNK_TOKENS * TINY.kv_bytes_per_token(4) / 1024**3


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("pressure")
    config = {"max_local_cpu_size": POOL_GB, "chunk_size": CHUNK_TOKENS}
    with contextlib.ExitStack() as stack:
        if SERVER is not None:
            masters = stack.enter_context(running_redis_cluster(folder / "redis", masters=3))
            config |= NO_CONTROLLER | {
                "lookup_url": f"redis+cluster://localhost:{masters[0].port},localhost:{masters[1].port}"
            }
        yield stack.enter_context(running_pair(folder, make_tiny_llama(shape=TINY), config=config))


@needs_redis
def test_redis_cluster_instead_of_the_controller(pair: Pair) -> None:
    """What one instance has prefilled, the other pulls, and nobody can tell from the text."""
    for seed in range(2):
        cold, again, chunks = cold_then_pulled(pair, token_prompt(1100, seed), max_tokens=8)
        assert again.text == cold.text
        assert chunks == 1100 // CHUNK_TOKENS, pair.show_logs()
    assert not pair.controller.instances(), "nobody has told it anything"


def test_thousands_of_evictions_no_wrong_text(pair: Pair) -> None:
    """Both instances answer a working set ten times the pool, in orders that make them read what the other is
    evicting; every text is the cold run's.
    """
    expected = {}
    for index, prompt in enumerate(PROMPTS):
        expected[index] = complete(pair.first.url, prompt, max_tokens=4).text
    wrong: list[int] = []

    def run(url: str, seed: int) -> None:
        chosen = random.Random(seed)
        recent: list[int] = []
        for step in range(100):
            index = chosen.choice(recent[-12:]) if recent and step % 2 else chosen.randrange(len(PROMPTS))
            recent.append(index)
            if complete(url, PROMPTS[index], max_tokens=4).text != expected[index]:
                wrong.append(index)

    seeds = ((pair.first.url, 1), (pair.second.url, 1), (pair.first.url, 2), (pair.second.url, 2))
    threads = [threading.Thread(target=run, args=arguments) for arguments in seeds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    views = [PoolView(node_of(instance)) for instance in (pair.first, pair.second)]
    generations = sum(view.ledger.generation(slot) // 2 for view in views for slot in range(view.ledger.slots))
    assert generations > 1000, "evictions of published chunks"
    held, copied = (view.chunks() for view in views)
    assert all(held[key] == copied[key] for key in held.keys() & copied.keys())
    assert pulled(pair.first)[0] + pulled(pair.second)[0] > 100
    for view in views:
        view.ledger.check_integrity()
        view.close()
