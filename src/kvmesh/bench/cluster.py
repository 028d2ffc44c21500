"""A small kvmesh cluster on this machine: a controller and vLLM CPU servers, as real processes on free loopback ports.

Used by `kvmesh demo`, the end-to-end tests and the benchmarks. Every process is started in its own session, writes its
own log file and is ended by its own process id.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
import yaml

from kvmesh.errors import StartupError

HOST = "127.0.0.1"
BOOT_TIMEOUT_S = 900.0
"""vLLM on a loaded machine of two cores takes minutes."""
STOP_TIMEOUT_S = 15.0
PORTS = range(10_000, 20_000)
"""Below those that the system gives to outgoing connections: a server may bind its port a minute after it was chosen.
The bus of a Redis Cluster is 10,000 above.
"""
_candidates = itertools.cycle(random.sample(PORTS, len(PORTS)))
IDLE_WINDOW_S = 0.3
IDLE_SHARE = 0.15
"""Of a core: what a server that has nothing to do may use (CPU times come in steps of 10 ms)."""

Say = Callable[[str], None]


def free_ports(count: int) -> list[int]:
    """Ports that nobody has bound at this moment, no port twice in one process."""
    ports: list[int] = []
    for _ in PORTS:
        with contextlib.suppress(OSError), socket.socket() as probe:
            port = next(_candidates)
            probe.bind((HOST, port))
            ports.append(port)
        if len(ports) == count:
            return ports
    raise StartupError("free ports", expected=f"{count} from {PORTS.start} to {PORTS.stop}", found=str(len(ports)))


@dataclass
class Process:
    """A child process with its log file."""

    name: str
    command: Sequence[str]
    log_path: Path
    env: Mapping[str, str] = field(default_factory=dict)
    popen: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log_path.open("ab") as log:
            self.popen = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.env, **self.own_environment()},
                start_new_session=True,
            )

    def own_environment(self) -> Mapping[str, str]:
        """Variables of this start; a subclass has some."""
        return {}

    @property
    def pid(self) -> int:
        assert self.popen is not None
        return self.popen.pid

    def is_running(self) -> bool:
        return self.popen is not None and self.popen.poll() is None

    def log(self) -> str:
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def signal(self, number: int) -> None:
        """Send a signal to this process only."""
        os.kill(self.pid, number)

    def kill_group(self) -> None:
        """Kill -9 of the process and of everything it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        if self.popen is not None:
            self.popen.wait()

    def stop(self) -> None:
        """End it in good order; kill what is left of its session after a while."""
        if self.popen is None:
            return
        if self.popen.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGCONT)
            self.popen.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.popen.wait(STOP_TIMEOUT_S)
        self.kill_group()


class Controller(Process):
    """`kvmesh controller` on free ports."""

    def __init__(
        self, folder: Path, *, arguments: Sequence[str] = (), env: Mapping[str, str] | None = None, scheme: str = "http"
    ) -> None:
        """Further command line arguments and variables; `scheme` is https when the arguments name TLS files."""
        self._scheme = scheme
        self.port, self.pull_port, self.reply_port, self.heartbeat_port = free_ports(4)
        ports = {"pull": self.pull_port, "reply": self.reply_port, "heartbeat": self.heartbeat_port}
        command = [
            *(sys.executable, "-m", "kvmesh.cli", "controller", "--host", HOST, "--port", str(self.port)),
            *("--monitor-ports", json.dumps(ports)),
            *arguments,
        ]
        super().__init__("controller", command, folder / "controller.log", env or {})

    @property
    def url(self) -> str:
        return f"{self._scheme}://{HOST}:{self.port}"

    def is_healthy(self) -> bool:
        return _answers(f"{self.url}/healthz")

    def instances(self) -> list[dict[str, object]]:
        """`/api/v1/instances`, decoded."""
        answer = httpx.get(f"{self.url}/api/v1/instances", timeout=10).raise_for_status().json()
        listed: list[dict[str, object]] = answer["instances"]
        return listed


class Instance(Process):
    """A vLLM CPU server with `KVMeshConnector`, or without when `config` is None."""

    def __init__(
        self,
        name: str,
        model: Path,
        folder: Path,
        config: Mapping[str, object] | None,
        *,
        core: int,
        dtype: str = "float32",
        max_model_len: int = 8192,
        arguments: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> None:
        (self.port,) = free_ports(1)
        self.config = config
        self.config_path = folder / f"{name}.yaml"
        command = [
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)),
            *("--served-model-name", "model", "--host", HOST, "--port", str(self.port)),
            *("--dtype", dtype, "--max-model-len", str(max_model_len), "--enforce-eager"),
            *arguments,
        ]
        environment = {
            "VLLM_CPU_OMP_THREADS_BIND": str(core % (os.cpu_count() or 1)),
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_HOST_IP": HOST,
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": "900",
            "HF_HUB_OFFLINE": "1",
            "UCX_TLS": os.environ.get("UCX_TLS", "tcp"),
            **(env or {}),
        }
        if config is not None:
            self.config_path.write_text(yaml.safe_dump(dict(config), sort_keys=False))
            command += ["--kv-transfer-config", json.dumps({"kv_connector": "KVMeshConnector", "kv_role": "kv_both"})]
            environment["KVMESH_CONFIG_FILE"] = str(self.config_path)
        super().__init__(name, command, folder / f"{name}.log", environment)
        self._scratch: tempfile.TemporaryDirectory[str] | None = None

    def own_environment(self) -> Mapping[str, str]:
        """A temporary folder of its own, for what a killed vLLM leaves behind. Its path is short: a socket's may
        have 107 characters.
        """
        if self._scratch is None:
            self._scratch = tempfile.TemporaryDirectory(prefix="kvmesh-", ignore_cleanup_errors=True)
        return {"TMPDIR": self._scratch.name}

    def stop(self) -> None:
        """End it in good order, and remove what it has left."""
        super().stop()
        if self._scratch is not None:
            self._scratch.cleanup()
            self._scratch = None

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    @property
    def admin_url(self) -> str:
        """The admin port of the instance's node."""
        assert self.config is not None
        scheme = "https" if self.config.get("tls_cert_file") else "http"
        return f"{scheme}://{HOST}:{self.config['lmcache_worker_ports']}"

    def is_healthy(self) -> bool:
        return _answers(f"{self.url}/health")

    def wait_peers(self, count: int, timeout_s: float = 60.0) -> None:
        """Wait until the node has `count` peers."""
        self._wait("kvmesh_node_peers", count, timeout_s)

    def wait_visible(self, chunks: int, timeout_s: float = 60.0) -> None:
        """Wait until the node knows at least `chunks` chunks of others."""
        self._wait("kvmesh_node_replica_chunks", chunks, timeout_s)

    def wait_idle(self, timeout_s: float = 30.0) -> None:
        """Wait until the server and all that it started use next to no CPU time.

        vLLM's workers poll for their next step for a second after the last one. Two servers that share two cores
        would slow each other down by that, and a benchmark would measure it.
        """
        until_s = time.monotonic() + timeout_s
        before_s = self._cpu_s()
        while time.monotonic() < until_s:
            time.sleep(IDLE_WINDOW_S)
            now_s = self._cpu_s()
            if now_s - before_s <= IDLE_WINDOW_S * IDLE_SHARE:
                return
            before_s = now_s
        raise StartupError(self.name, expected=f"an idle server within {timeout_s:g} s", found="one that computes")

    def _cpu_s(self) -> float:
        server = psutil.Process(self.pid)
        return sum(sum(process.cpu_times()[:2]) for process in (server, *server.children(recursive=True)))

    def _wait(self, name: str, at_least: float, timeout_s: float) -> None:
        until_s = time.monotonic() + timeout_s
        while (value := metric(self.admin_url, name)) < at_least:
            if time.monotonic() > until_s:
                raise StartupError(
                    self.name,
                    expected=f"{name} of at least {at_least:g} within {timeout_s:g} s",
                    found=f"{value:g}\n{tail(self.log())}",
                )
            time.sleep(0.02)


def instance_config(number: int, controller: Controller, **changed: object) -> dict[str, object]:
    """The seed's YAML for one instance; only ports and sizes differ, and what `changed` says."""
    peer, lookup, admin = free_ports(3)
    return {
        "chunk_size": 256,
        "local_cpu": True,
        "max_local_cpu_size": 1,
        "enable_async_loading": True,
        "enable_p2p": True,
        "p2p_host": "localhost",
        "p2p_init_ports": peer,
        "p2p_lookup_ports": lookup,
        "transfer_channel": "tcp",
        "enable_controller": True,
        "lmcache_instance_id": f"lmcache_instance_{number}",
        "controller_pull_url": f"localhost:{controller.pull_port}",
        "controller_reply_url": f"localhost:{controller.reply_port}",
        "lmcache_worker_ports": admin,
        "extra_config": {"lookup_backoff_time": 0.001},
        **changed,
    }


def wait_healthy(
    *processes: Controller | Instance, say: Say = lambda _: None, timeout_s: float = BOOT_TIMEOUT_S
) -> None:
    """Wait until all answer their health checks. Raises StartupError with the end of the log of one that does not."""
    started_s = time.monotonic()
    waiting = list(processes)
    while waiting:
        for process in list(waiting):
            if process.is_healthy():
                waiting.remove(process)
                say(f"{process.name} is up after {time.monotonic() - started_s:.0f} s")
            elif not process.is_running():
                raise StartupError(process.name, found=f"it ended while starting\n{tail(process.log())}")
        if waiting and time.monotonic() - started_s > timeout_s:
            process = waiting[0]
            raise StartupError(process.name, found=f"not up after {timeout_s:.0f} s\n{tail(process.log())}")
        time.sleep(0.2)


def tail(text: str, lines: int = 30) -> str:
    """The last lines of a log."""
    return "\n".join(text.splitlines()[-lines:])


@dataclass(frozen=True)
class Completion:
    """One answer of a server, and how long it took."""

    text: str
    ttft_s: float
    """Time to the first token."""
    total_s: float
    prompt_tokens: int


def complete(
    url: str, prompt: str | Sequence[int], *, max_tokens: int = 10, timeout_s: float = 900.0, **body: object
) -> Completion:
    """Ask `/v1/completions`, greedy and streamed; `prompt` is text or token ids."""
    request = {
        "model": "model",
        "prompt": prompt if isinstance(prompt, str) else list(prompt),
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        **body,
    }
    text, ttft_s, prompt_tokens = "", 0.0, 0
    started_s = time.perf_counter()
    with httpx.stream("POST", f"{url}/v1/completions", json=request, timeout=timeout_s) as answer:
        if answer.status_code != httpx.codes.OK:
            answer.read()
            raise RuntimeError(f"{url} answered {answer.status_code}: {answer.text[:500]}")
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[len("data: ") :])
            if event.get("usage"):
                prompt_tokens = event["usage"]["prompt_tokens"]
            for choice in event.get("choices", ()):
                ttft_s = ttft_s or time.perf_counter() - started_s
                text += choice["text"]
    return Completion(text, ttft_s, time.perf_counter() - started_s, prompt_tokens)


def metrics(url: str) -> dict[str, float]:
    """The samples of a `/metrics` page: name with labels to value."""
    samples = {}
    answer = httpx.get(f"{url}/metrics", timeout=10, verify=_knows_certificates(url))
    for line in answer.raise_for_status().text.splitlines():
        if line and not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            samples[name] = float(value)
    return samples


def metric(url: str, name: str, **labels: str) -> float:
    """The sum of the samples of one metric whose labels include `labels`."""
    wanted = [f'{label}="{value}"' for label, value in labels.items()]
    return sum(
        value
        for sample, value in metrics(url).items()
        if sample.partition("{")[0] == name and all(part in sample for part in wanted)
    )


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2, verify=_knows_certificates(url)).status_code == httpx.codes.OK
    except httpx.HTTPError:
        return False


def _knows_certificates(url: str) -> bool:
    """Only processes of our own on loopback are asked, and their certificates may be of a CA that nobody knows."""
    return not url.startswith("https:")
