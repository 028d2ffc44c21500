"""kill -9 of everything around real vLLM servers: no request fails or hangs, the text stays the same, and sharing
comes back.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from kvmesh.bench.cluster import Completion, complete, metric, wait_healthy
from kvmesh.models import BENCH, make_tiny_llama
from support.servers import CHUNK_TOKENS, Pair, cold_then_pulled, node_of, pulled, running_pair, token_prompt

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

TOKENS = 3000
FETCH_TIMEOUT_S = 6.0


CHANNELS = os.environ.get("TEST_CHANNELS", "tcp").split(",")
"""The same faults over nixl take as long again: TEST_CHANNELS=tcp,nixl."""


@pytest.fixture(scope="module", params=CHANNELS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Two instances with prefix caching on, as a user would run them; short time-outs, so that the test sees them."""
    config = {
        "fetch_timeout_s": FETCH_TIMEOUT_S,
        "stall_timeout_s": 3.0,
        "instance_timeout_s": 7.0,
        "max_local_cpu_size": 3,
        "transfer_channel": request.param,
    }
    model = make_tiny_llama(shape=BENCH)
    folder = tmp_path_factory.mktemp("faults")
    with running_pair(folder, model, config=config, arguments=(), controller_arguments=()) as running:
        yield running


def ask_during_fault(pair: Pair, seed: int, fault: Callable[[], None], delay_s: float) -> tuple[Completion, Completion]:
    """A cold request to the first instance, then the same to the second, with a fault so long after its start."""
    prompt = token_prompt(TOKENS, seed)
    known = int(metric(pair.second.admin_url, "kvmesh_node_replica_chunks"))
    cold = complete(pair.first.url, prompt, max_tokens=32)
    pair.second.wait_visible(known + TOKENS // CHUNK_TOKENS)
    timer = threading.Timer(delay_s, fault)
    timer.start()
    answer = complete(pair.second.url, prompt, max_tokens=32)
    timer.join()
    return cold, answer


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
    until_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until_s, f"not within {timeout_s} s: {what}"
        time.sleep(0.05)


def heals(pair: Pair, seed: int) -> bool:
    """Whether a fresh prompt is pulled again."""
    _, _, chunks = cold_then_pulled(pair, token_prompt(1000, seed), max_tokens=2)
    return chunks == 1000 // CHUNK_TOKENS


@pytest.mark.parametrize("whose", ["own", "peer"])
def test_node_killed_in_the_middle_of_a_fetch(pair: Pair, whose: str) -> None:
    """The node on either side dies while chunks are on their way, at several moments; the text is the cold run's."""
    instance = pair.second if whose == "own" else pair.first
    for number, delay_s in enumerate((0.02, 0.05, 0.1, 0.2)):
        node = node_of(instance)
        cold, answer = ask_during_fault(pair, 1000 * (1 + (whose == "own")) + number, node.kill, delay_s)
        assert answer.text == cold.text
        assert answer.total_s < cold.total_s * 2 + FETCH_TIMEOUT_S + 5
        wait_until(
            lambda: node_of(instance).is_running() and metric(pair.second.admin_url, "kvmesh_node_peers") == 1,
            "restart",
        )
    wait_until(lambda: heals(pair, 5000 + time.monotonic_ns() % 10**6), "sharing after the restart")


def test_peer_node_stopped_in_the_middle(pair: Pair) -> None:
    """A stopped peer costs at most the stall time; the text is right; after SIGCONT sharing goes on."""
    node = node_of(pair.first)
    cold, answer = ask_during_fault(pair, 3000, lambda: os.kill(node.pid, signal.SIGSTOP), 0.0)
    node.send_signal(signal.SIGCONT)
    assert answer.text == cold.text
    assert answer.total_s < cold.total_s * 2 + FETCH_TIMEOUT_S + 5
    wait_until(lambda: heals(pair, 6000 + time.monotonic_ns() % 10**6), "sharing after SIGCONT")


def test_controller_killed(pair: Pair) -> None:
    """Without a controller known chunks are still pulled; its successor learns everything and new chunks are shared
    again.
    """
    prompt = token_prompt(TOKENS, 4000)
    known = int(metric(pair.second.admin_url, "kvmesh_node_replica_chunks"))
    cold = complete(pair.first.url, prompt, max_tokens=32)
    pair.second.wait_visible(known + TOKENS // CHUNK_TOKENS)
    pair.controller.kill_group()
    before, _ = pulled(pair.second)
    answer = complete(pair.second.url, prompt, max_tokens=32)
    assert answer.text == cold.text
    assert pulled(pair.second)[0] - before == TOKENS // CHUNK_TOKENS
    pair.controller.start()
    wait_healthy(pair.controller, timeout_s=60)
    wait_until(lambda: len(pair.controller.instances()) == 2, "both instances register again")
    wait_until(lambda: heals(pair, 7000 + time.monotonic_ns() % 10**6), "sharing with the new controller")


def test_peer_engine_killed(pair: Pair) -> None:
    """Kill -9 of the whole peer engine in the middle of a fetch: the request is answered; the restarted engine shares
    again.
    """
    cold, answer = ask_during_fault(pair, 8000, pair.first.kill_group, 0.05)
    assert answer.text == cold.text
    assert answer.total_s < cold.total_s * 2 + FETCH_TIMEOUT_S + 5
    pair.second._wait("kvmesh_node_directory_connected", 1, 10)
    wait_until(lambda: metric(pair.second.admin_url, "kvmesh_node_peers") == 0, "the dead engine is forgotten")
    pair.first.start()
    wait_healthy(pair.first)
    pair.second.wait_peers(1)
    wait_until(lambda: heals(pair, 9000 + time.monotonic_ns() % 10**6), "sharing with the restarted engine")
