"""Pairs of real vLLM servers for the end-to-end tests."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil

from kvmesh.bench.cluster import Completion, Controller, Instance, complete, instance_config, metric, tail, wait_healthy
from kvmesh.core.ledger import SlotLedger
from kvmesh.transfer.pool import HostPool, PoolSegment
from support.prefork import PreforkedInstance

CHUNK_TOKENS = 256
WORDS = [
    f"{first}{second}" for first in ("ka", "lo", "mi", "nu", "pe", "ra", "si", "to") for second in "bdfgklmnprstvz"
]


class Pair(NamedTuple):
    controller: Controller
    first: Instance
    second: Instance

    def show_logs(self) -> str:
        """The ends of all logs, for failure messages."""
        return "\n".join(f"--- {process.name}\n{tail(process.log(), 60)}" for process in self)


NO_CONTROLLER: Mapping[str, object] = {
    "enable_controller": False,
    "controller_pull_url": None,
    "controller_reply_url": None,
}
"""For another directory."""
PATIENCE_S = 60.0
STEADY = {
    "fetch_gate": "off",
    "fetch_timeout_s": PATIENCE_S,
    "stall_timeout_s": 20.0,
    "instance_timeout_s": PATIENCE_S,
}
"""So small a model on so busy a machine may well be quicker to compute than to fetch, and a holder may get no processor
for seconds (seen: ten, on an otherwise idle machine).
"""
PATIENT = ("--instance-timeout", f"{PATIENCE_S:g}")
"""The same for a controller."""


@contextlib.contextmanager
def running_pair(
    folder: Path,
    model: Path,
    *,
    config: Mapping[str, object] | None = None,
    arguments: Sequence[str] = ("--no-enable-prefix-caching",),
    max_model_len: int = 8192,
    env: Mapping[str, str] | None = None,
    without_directory: bool = False,
    controller_arguments: Sequence[str] = PATIENT,
) -> Iterator[Pair]:
    """A controller and two instances that know each other; everything ends with the block. Unless `config` and
    `controller_arguments` say otherwise, whatever a peer holds is fetched, and nobody is given up for being slow.
    `without_directory`: they have each other as `static_peers`, and the controller hears nothing.
    """
    with contextlib.ExitStack() as stack:
        controller = Controller(folder, arguments=controller_arguments)
        stack.callback(controller.stop)
        controller.start()
        wait_healthy(controller, timeout_s=60)
        changed = STEADY | dict(config or {}) | (NO_CONTROLLER if without_directory else {})
        configs = [instance_config(number, controller, **changed) for number in (1, 2)]
        if without_directory:
            addresses = [f"localhost:{one['p2p_init_ports']}" for one in configs]
            configs = [one | {"static_peers": addresses} for one in configs]
        instances = []
        for number, written in enumerate(configs, start=1):
            instance = PreforkedInstance(
                f"instance-{number}",
                model,
                folder,
                written,
                core=number - 1,
                arguments=arguments,
                max_model_len=max_model_len,
                env=env,
            )
            stack.callback(instance.stop)
            instance.start()
            instances.append(instance)
        wait_healthy(*instances)
        for instance in instances:
            instance.wait_peers(1)
        yield Pair(controller, *instances)


def words(count: int, seed: int) -> str:
    """A prompt of random words, different for each seed from the first word on."""
    chosen = random.Random(seed)
    return " ".join(chosen.choices(WORDS, k=count))


def token_prompt(count: int, seed: int, vocab: int = 1000) -> list[int]:
    """A prompt of exactly `count` random tokens."""
    chosen = random.Random(seed)
    return [chosen.randrange(10, vocab) for _ in range(count)]


def pulled(instance: Instance) -> tuple[int, int]:
    """(chunks, bytes) that the instance has fetched from peers so far, by vLLM's own /metrics."""
    return (
        int(metric(instance.url, "kvmesh_fetched_chunks_total")),
        int(metric(instance.url, "kvmesh_fetched_bytes_total")),
    )


def cold_then_pulled(
    pair: Pair, prompt: Sequence[int] | str, *, max_tokens: int = 32, **body: object
) -> tuple[Completion, Completion, int]:
    """The same request to the first and then to the second instance; also how many chunks the second has pulled for
    it.
    """
    known = int(metric(pair.second.admin_url, "kvmesh_node_replica_chunks"))
    cold = complete(pair.first.url, prompt, max_tokens=max_tokens, **body)
    pair.second.wait_visible(known + cold.prompt_tokens // CHUNK_TOKENS)
    before, _ = pulled(pair.second)
    again = complete(pair.second.url, prompt, max_tokens=max_tokens, **body)
    return cold, again, pulled(pair.second)[0] - before


def node_of(instance: Instance) -> psutil.Process:
    """The node process of a running instance."""
    for process in psutil.Process(instance.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "kvmesh.node" in process.cmdline():
                return process
    raise AssertionError(f"{instance.name} has no node process\n{tail(instance.log())}")


class PoolView:
    """A node's pool and ledger, opened from outside through /proc: what the slots really contain."""

    def __init__(self, node: psutil.Process) -> None:
        links = {fd.name: str(fd.readlink()) for fd in Path(f"/proc/{node.pid}/fd").iterdir()}
        ledger = next(name for name, target in links.items() if "kvmesh-ledger" in target)
        pool = next(name for name, target in links.items() if "vllm_offload" in target)
        self.ledger = SlotLedger.attach(os.open(f"/proc/{node.pid}/fd/{ledger}", os.O_RDWR))
        fd = os.open(f"/proc/{node.pid}/fd/{pool}", os.O_RDWR)
        size = self.ledger.slots * self.ledger.chunk_bytes
        self.pool = HostPool([PoolSegment(fd, 0, size)], chunk_bytes=self.ledger.chunk_bytes)

    def chunks(self) -> dict[bytes, bytes]:
        """Bytes by key of everything published."""
        found = {}
        for slot in range(self.ledger.slots):
            record = self.ledger.read(slot)
            if record is not None:
                found[bytes(record.key)] = bytes(self.pool.row(slot))
        return found

    def close(self) -> None:
        self.pool.close()
        self.ledger.close()
