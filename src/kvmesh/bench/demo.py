"""`kvmesh demo`: the first seed's scenario on this machine, on real vLLM servers on the CPU.

A controller and two instances; the prompt goes to instance 1, then to instance 2, which pulls the KV from instance 1.
Measured are the times to the first token: cold, pulled from the peer, and from the own host pool.
"""

from __future__ import annotations

import contextlib
import json
import signal
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kvmesh.bench.cluster import Completion, Controller, Instance, complete, instance_config, metric, wait_healthy
from kvmesh.bench.output import result_console
from kvmesh.errors import KVMeshError
from kvmesh.models import make_smollm2

PROMPT = "Explain the significance of KV cache in language models." * 100
"""The seed's prompt: about 1,100 tokens."""
CHUNK_TOKENS = 256
MAX_MODEL_LEN = 4096


@dataclass(frozen=True)
class DemoResult:
    """The figures of one run, as `--json` prints them. Times in seconds."""

    prompt_tokens: int
    cold_ttft_s: float
    peer_ttft_s: float
    local_ttft_s: float
    pulled_tokens: int
    pulled_bytes: int
    pull_seconds: float
    pull_gb_per_s: float
    text_identical: bool
    text: str
    channel: str
    controller_url: str
    ok: bool


def run_demo(*, once: bool, as_json: bool, model: Path | None, channel: str, logs: Path | None) -> int:
    """Run the demo; returns the exit status: 0, or 1 when nothing was pulled, the texts differ or something did not
    start.
    """
    console = Console(stderr=True)
    try:
        with contextlib.ExitStack() as stack:
            folder = logs or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvmesh-demo-")))
            folder.mkdir(parents=True, exist_ok=True)
            result = _measure(stack, folder, model, channel, console)
            if as_json:
                print(json.dumps(asdict(result), indent=2), flush=True)
            else:
                result_console().print(_table(result))
            if not once:
                console.print(f"The controller's page: {result.controller_url}")
                console.print(f"Configuration and logs: {folder}    Ctrl-C ends everything.")
                signal.pause()
            return 0 if result.ok else 1
    except (KVMeshError, RuntimeError, OSError) as error:
        console.print(f"[red]demo failed:[/] {error}", highlight=False)
        return 1
    except KeyboardInterrupt:
        console.print("all processes are ended")
        return 0


def _measure(
    stack: contextlib.ExitStack, folder: Path, model: Path | None, channel: str, console: Console
) -> DemoResult:
    """Start the cluster (it is stopped when `stack` is left) and send the requests."""
    status = stack.enter_context(console.status("preparing the model"))

    def say(line: str) -> None:
        console.print(f"  {line}", style="dim", highlight=False)

    path = model or make_smollm2(progress=say)
    controller = Controller(folder)
    stack.callback(controller.stop)
    status.update("starting the controller")
    controller.start()
    wait_healthy(controller, say=say, timeout_s=60)
    instances = [
        Instance(
            f"instance-{number}",
            path,
            folder,
            instance_config(number, controller, transfer_channel=channel),
            core=number - 1,
            dtype="bfloat16",
            max_model_len=MAX_MODEL_LEN,
            arguments=("--no-enable-prefix-caching",),
        )
        for number in (1, 2)
    ]
    for instance in instances:
        stack.callback(instance.stop)
        instance.start()
    status.update("starting two vLLM servers on the CPU (about a minute; several on a busy machine)")
    wait_healthy(*instances, say=say)
    first, second = instances
    status.update("warming both up")
    for instance in instances:
        complete(instance.url, "Hello", max_tokens=2)
    second.wait_peers(1)
    status.update("asking instance 1: it computes the prompt and publishes its KV")
    cold = complete(first.url, PROMPT)
    second.wait_visible(cold.prompt_tokens // CHUNK_TOKENS)
    status.update("asking instance 2: it pulls the KV from instance 1")
    pulled = complete(second.url, PROMPT)
    status.update("asking instance 2 again: its own host pool has it now")
    local = complete(second.url, PROMPT)
    status.stop()
    return _result(cold, pulled, local, second, controller, channel)


def _result(
    cold: Completion, pulled: Completion, local: Completion, second: Instance, controller: Controller, channel: str
) -> DemoResult:
    chunks = int(metric(second.url, "kvmesh_fetched_chunks_total"))
    pulled_bytes = int(metric(second.url, "kvmesh_fetched_bytes_total"))
    seconds = metric(second.url, "kvmesh_fetch_seconds_sum")
    identical = cold.text == pulled.text == local.text
    return DemoResult(
        prompt_tokens=cold.prompt_tokens,
        cold_ttft_s=round(cold.ttft_s, 4),
        peer_ttft_s=round(pulled.ttft_s, 4),
        local_ttft_s=round(local.ttft_s, 4),
        pulled_tokens=chunks * CHUNK_TOKENS,
        pulled_bytes=pulled_bytes,
        pull_seconds=round(seconds, 6),
        pull_gb_per_s=round(pulled_bytes / seconds / 1e9, 3) if seconds else 0.0,
        text_identical=identical,
        text=cold.text,
        channel=channel,
        controller_url=controller.url,
        ok=identical and chunks > 0,
    )


def _table(result: DemoResult) -> Table:
    table = Table(title="One prompt, two instances", caption=f"text: {result.text.strip()!r}", title_justify="left")
    table.add_column("request")
    table.add_column("TTFT", justify="right")
    table.add_column("of cold", justify="right")
    table.add_column("KV from")
    rows = (
        ("instance 1, cold", result.cold_ttft_s, f"computed, {result.prompt_tokens} tokens"),
        (
            "instance 2, same prompt",
            result.peer_ttft_s,
            (
                f"instance 1: {result.pulled_tokens} tokens, {result.pulled_bytes / 1e6:.1f} MB "
                f"in {result.pull_seconds * 1e3:.1f} ms, {result.pull_gb_per_s:.2f} GB/s ({result.channel})"
            ),
        ),
        ("instance 2, again", result.local_ttft_s, "its own host pool"),
    )
    for name, ttft_s, source in rows:
        table.add_row(name, f"{ttft_s:.3f} s", f"{ttft_s / result.cold_ttft_s:.2f}", source)
    table.add_row("text identical", "yes" if result.text_identical else "[red]NO[/]", "", "")
    return table
