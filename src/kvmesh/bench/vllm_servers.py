"""Real vLLM CPU servers for benchmarks that compare sharing with not: a controller and N servers, warm and idle."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kvmesh.bench.cluster import Controller, Instance, Say, complete, instance_config, metric, wait_healthy

NOT_SHARING: Mapping[str, object] = {"enable_p2p": False, "enable_controller": False}
"""The same connector with its host pool, alone."""


@dataclass(frozen=True)
class ServerPlan:
    """What to start."""

    model: Path
    count: int = 2
    dtype: str = "bfloat16"
    max_model_len: int = 8192
    config: Mapping[str, object] = field(default_factory=dict)
    """Keys of ours, for every instance."""
    arguments: Sequence[str] = ()
    """Further ones of vLLM."""


@dataclass(frozen=True)
class Fetched:
    """What instances have fetched so far, by vLLM's own metrics."""

    chunks: int = 0
    size_bytes: int = 0
    seconds: float = 0.0

    @classmethod
    def of(cls, instances: Sequence[Instance]) -> Fetched:
        """The sums over instances, which share."""
        return cls(
            sum(int(metric(one.url, "kvmesh_fetched_chunks_total")) for one in instances),
            sum(int(metric(one.url, "kvmesh_fetched_bytes_total")) for one in instances),
            sum(metric(one.url, "kvmesh_fetch_seconds_sum") for one in instances),
        )

    def since(self, before: Fetched) -> Fetched:
        """What has come since."""
        return Fetched(self.chunks - before.chunks, self.size_bytes - before.size_bytes, self.seconds - before.seconds)

    @property
    def gb_per_s(self) -> float:
        """Bytes over the seconds that fetches took."""
        return self.size_bytes / self.seconds / 1e9 if self.seconds else 0.0


@contextlib.contextmanager
def running_servers(
    plan: ServerPlan, folder: Path, *, sharing: bool, say: Say = lambda _: None
) -> Iterator[list[Instance]]:
    """The servers, each on a core of its own as far as there are enough, warmed up and idle. Ended with the block.

    Raises StartupError with the end of the log of one that does not start.
    """
    with contextlib.ExitStack() as stack:
        folder.mkdir(parents=True, exist_ok=True)
        controller = Controller(folder)
        stack.callback(controller.stop)
        controller.start()
        wait_healthy(controller, timeout_s=60)
        instances = []
        for number in range(1, plan.count + 1):
            config = instance_config(number, controller, **(dict(plan.config) | ({} if sharing else dict(NOT_SHARING))))
            instance = Instance(
                f"instance-{number}",
                plan.model,
                folder,
                config,
                core=number - 1,
                dtype=plan.dtype,
                max_model_len=plan.max_model_len,
                arguments=plan.arguments,
            )
            stack.callback(instance.stop)
            instance.start()
            instances.append(instance)
        wait_healthy(*instances, say=say)
        for instance in instances:
            complete(instance.url, "Hello", max_tokens=2)
            if sharing:
                instance.wait_peers(plan.count - 1)
        for instance in instances:
            instance.wait_idle()
        yield instances
