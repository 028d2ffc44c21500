"""Build both images and run the compose file on them: with Docker, and two real vLLM engines on the CPU, which share.

    make image-check          # as root, on Debian; about five minutes

Nothing is fetched from an image registry: the base is Debian 12 by debootstrap, vLLM's base is that plus vLLM for CPUs
from this repository's environment. Where no Docker daemon answers, one is started for the time of the check. Of the
compose file only sizes, the model and the GPUs are changed. PYTHON_IMAGE and VLLM_IMAGE name other bases; PIP_CONFIG is
a pip configuration for the builds.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import httpx
import yaml

from kvmesh.bench.cluster import free_ports
from kvmesh.models import make_tiny_llama

ROOT = Path(__file__).resolve().parent.parent
DOCKER = ROOT / "deploy" / "docker"
PACKAGES = {
    "docker": "docker.io",
    "docker-compose": "docker-compose",
    "debootstrap": "debootstrap",
    "iptables": "iptables",
}
"""Programs, and what Debian calls their packages."""
IN_BASE = "python3,python3-venv,python3-pip,ca-certificates,libnuma1,libgomp1"
BASE, VLLM_BASE = "debian-python:3.11", "vllm-cpu:check"
KVMESH, ENGINE = "kvmesh/kvmesh:check", "kvmesh/vllm-openai:check"
PROJECT = "kvmesh-check"
MODEL = "/data/tiny"
SENTENCE = "Explain the significance of KV cache in language models. "
READY_TIMEOUT_S = 600
VLLM_DOCKERFILE = """
FROM {base}
COPY packages /usr/local/lib/python3.11/dist-packages
RUN printf '%s\\n' '#!/usr/bin/python3' 'from vllm.entrypoints.cli.main import main' 'if __name__ == "__main__":' \\
      '    main()' > /usr/local/bin/vllm \\
  && chmod +x /usr/local/bin/vllm
"""


def main() -> int:
    """Exit status 0 when everything works."""
    if os.geteuid() != 0:
        fail("must be root")
    install_missing()
    with tempfile.TemporaryDirectory() as name, docker_daemon(Path(name)):
        work = Path(name)
        base = os.environ.get("PYTHON_IMAGE") or make_base(work)
        vllm_base = os.environ.get("VLLM_IMAGE") or make_vllm_base(work, base)
        build("Dockerfile", KVMESH, PYTHON_IMAGE=base)
        build("Dockerfile.vllm", ENGINE, KVMESH_IMAGE=KVMESH, VLLM_IMAGE=vllm_base)
        check_contents()
        with composed(work) as stack:
            check_sharing(stack)
    say("all good")
    return 0


def say(words: str) -> None:
    """Progress."""
    print(f"image-check: {words}", flush=True)


def fail(words: str) -> NoReturn:
    """End with a reason."""
    sys.exit(f"image-check: {words}")


def run(*command: str | Path, what: str = "", **options: Any) -> str:
    """Standard output of a command that must succeed; its last lines and what it was for when it does not."""
    arguments = [str(part) for part in command]
    done: subprocess.CompletedProcess[str] = subprocess.run(
        arguments, capture_output=True, text=True, check=False, **options
    )
    if done.returncode:
        lines = (done.stdout + done.stderr).splitlines()[-30:]
        fail("\n".join([f"{what or ' '.join(map(str, command[:3]))} failed", *lines]))
    return done.stdout.strip()


def install_missing() -> None:
    """Docker and debootstrap, from Debian."""
    missing = [package for program, package in PACKAGES.items() if shutil.which(program) is None]
    if missing:
        say(f"installing Debian packages: {' '.join(missing)}")
        run("apt-get", "update", "-qq")
        quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        run("apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing, env=quiet)


@contextlib.contextmanager
def docker_daemon(work: Path) -> Iterator[None]:
    """The machine's, or one of our own that keeps everything in `work`."""
    if subprocess.run(["docker", "info"], capture_output=True, check=False).returncode == 0:
        yield
        return
    say("no Docker daemon answers: starting one for this check")
    os.environ["DOCKER_HOST"] = f"unix://{work}/docker.sock"
    command = ["dockerd", "--host", os.environ["DOCKER_HOST"], "--pidfile", f"{work}/docker.pid"]
    command += ["--data-root", f"{work}/docker", "--exec-root", f"{work}/docker-run"]
    rules = run("iptables-save")
    with (work / "dockerd.log").open("wb") as log:
        daemon = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        wait("the Docker daemon", lambda: succeeds("docker", "info"), 60, (work / "dockerd.log").read_text)
        yield
    finally:
        daemon.terminate()
        daemon.wait(60)
        for mounted in (work / "docker-run" / "netns").glob("*"):
            run("umount", mounted)
        run("ip", "link", "del", "docker0")
        run("iptables-restore", input=rules)  # what the daemon leaves there would stand in the way of others' bridges


def succeeds(*command: str) -> bool:
    """Whether a command does."""
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def wait(what: str, condition: Callable[[], bool], timeout_s: float, logs: Callable[[], str]) -> None:
    """Until `condition`; the end of the logs when it does not come."""
    until_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > until_s:
            fail("\n".join([f"{what} did not come within {timeout_s:.0f} s", *logs().splitlines()[-40:]]))
        time.sleep(1)


# -- images ------------------------------------------------------------------------------------------------------------


def make_base(work: Path) -> str:
    """What stands for python:3.11-slim-bookworm."""
    say("making a base image of Debian 12 with debootstrap")
    debian = work / "debian"
    run("debootstrap", "--variant=minbase", f"--include={IN_BASE}", "bookworm", debian)
    (debian / "usr/bin/python").symlink_to("python3")
    # Also the authorities that this machine's owner has added.
    shutil.copy("/etc/ssl/certs/ca-certificates.crt", debian / "etc/ssl/certs/ca-certificates.crt")
    if settings := os.environ.get("PIP_CONFIG"):
        shutil.copy(settings, debian / "etc/pip.conf")
    archive = work / "debian.tar"
    run("tar", "-C", debian, "-cf", archive, ".")
    run("docker", "import", "--change", "ENV PATH=/usr/local/bin:/usr/bin:/bin", archive, BASE)
    archive.unlink()
    shutil.rmtree(debian)
    return BASE


def make_vllm_base(work: Path, base: str) -> str:
    """What stands for vllm/vllm-openai: the base and vLLM for CPUs, as this environment has it, without kvmesh."""
    say("making a base image with this environment's vLLM for CPUs")
    context = work / "vllm"
    packages = sysconfig.get_paths()["purelib"]
    shutil.copytree(packages, context / "packages", symlinks=True, ignore=not_of_an_engine(packages))
    # vLLM asks for its own version by the name that its build for CPUs does not have.
    metadata = context / "packages" / "vllm.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version('vllm-cpu')}+cpu\n")
    (context / "Dockerfile").write_text(VLLM_DOCKERFILE.format(base=base))
    run("docker", "build", "-t", VLLM_BASE, context)
    shutil.rmtree(context)
    return VLLM_BASE


def not_of_an_engine(packages: str) -> Callable[[str, list[str]], set[str]]:
    """Of the packages here, those that no image of vLLM has: kvmesh itself, and what only tests use."""
    names = shutil.ignore_patterns("*kvmesh*", "playwright*", "nixl*")
    return lambda folder, found: names(folder, found) if folder == packages else set()


def build(file: str, tag: str, **arguments: str) -> None:
    """One of our Dockerfiles."""
    say(f"building {tag} from deploy/docker/{file}")
    given = [part for name, value in arguments.items() for part in ("--build-arg", f"{name}={value}")]
    run("docker", "build", "--network", "host", "-f", DOCKER / file, "-t", tag, *given, ROOT, what=file)


def check_contents() -> None:
    """The user, what may not be written, and that everything is there."""
    for image, python in ((KVMESH, "python"), (ENGINE, "python3")):
        inside = ["docker", "run", "--rm", "--entrypoint", "sh", image, "-c"]
        if (user := run(*inside, "id -u")) != "10001":
            fail(f"{image} runs as user {user}, expected 10001")
        run(
            *inside,
            "! touch /opt/kvmesh/x 2>/dev/null",
            what=f"{image}: the program's own folder can be written, which",
        )
        found = run(*inside, f"{python} -c 'import kvmesh; print(kvmesh.__version__)'")
        size_mb = int(run("docker", "image", "inspect", "-f", "{{.Size}}", image)) / 1e6
        say(f"{image}: kvmesh {found}, user 10001, {size_mb:,.0f} MB")
    run("docker", "run", "--rm", KVMESH, "router", "--help")


# -- compose -----------------------------------------------------------------------------------------------------------


class Stack(NamedTuple):
    """What is running."""

    router: str
    """URL."""
    controller: str
    """URL."""
    logs: Callable[[], str]


@contextlib.contextmanager
def composed(work: Path) -> Iterator[Stack]:
    """The compose file's services, all healthy."""
    page, router = free_ports(2)
    services = work / "compose.yaml"
    services.write_text(json.dumps(adapted(page, router)))
    compose = ["docker", "compose"] if succeeds("docker", "compose", "version") else ["docker-compose"]
    compose += ["-p", PROJECT, "-f", str(services)]
    fill_volume(make_tiny_llama())
    say("starting deploy/docker/compose.yaml: controller, router, two engines")
    try:
        run(*compose, "up", "-d", "--no-build")
        names = run(*compose, "ps", "-q").split()
        wait("healthy services", lambda: all_healthy(names), READY_TIMEOUT_S, lambda: logs(compose))
        yield Stack(f"http://127.0.0.1:{router}", f"http://127.0.0.1:{page}", lambda: logs(compose))
        say("taking it down")
        run(*compose, "stop")
        ends = {state(name, "{{.Name}} {{.State.ExitCode}}") for name in names}
        if bad := [end for end in ends if not end.endswith((" 0", " 143"))]:
            fail("\n".join([f"did not end well: {', '.join(bad)}", logs(compose)[-3000:]]))
    finally:
        subprocess.run([*compose, "down", "--volumes"], capture_output=True, check=False)


def adapted(page: int, router: int) -> dict[str, Any]:
    """deploy/docker/compose.yaml for this machine: no GPUs, a small model, free ports."""
    text = (DOCKER / "compose.yaml").read_text()
    key = run("docker", "run", "--rm", KVMESH, "key", "new")
    sizes = {"MODEL": MODEL, "POOL_GB": "0.5", "SHM_SIZE": "2gb", "KVMESH_CLUSTER_KEY": key, "HF_TOKEN": ""}
    for name, value in sizes.items():
        text = replace_variable(text, name, value)
    found: dict[str, Any] = yaml.safe_load(text)
    found = {name: part for name, part in found.items() if name in {"services", "volumes"}} | {"version": "2.4"}
    for name, service in found["services"].items():
        service.pop("build", None)
        service.pop("deploy", None)
        service["image"] = ENGINE if name.startswith("engine") else KVMESH
        if name.startswith("engine"):
            service["command"] = [*service["command"], "--enforce-eager", "--dtype=float32", "--max-model-len=4096"]
            service["environment"]["VLLM_CPU_KVCACHE_SPACE"] = "1"
    found["services"]["controller"]["ports"] = [f"127.0.0.1:{page}:9000"]
    found["services"]["router"]["ports"] = [f"127.0.0.1:{router}:8000"]
    return found


def replace_variable(text: str, name: str, value: str) -> str:
    """`text` with ${name...} replaced, as compose does it."""
    while (start := text.find("${" + name)) >= 0:
        text = text[:start] + value + text[text.index("}", start) + 1 :]
    return text


def fill_volume(folder: Path) -> None:
    """Put the model where the compose file has the weights."""
    volume = f"{PROJECT}_weights"
    run("docker", "volume", "create", volume)
    mounts = ["-v", f"{volume}:/data", "-v", f"{folder}:/from:ro"]
    run("docker", "run", "--rm", *mounts, "--entrypoint", "cp", ENGINE, "-r", "/from", MODEL)


def state(container: str, pattern: str) -> str:
    """What Docker knows of a container."""
    return run("docker", "inspect", "-f", pattern, container)


def all_healthy(containers: list[str]) -> bool:
    """Whether all are; fails when one had to be started again."""
    pattern = "{{.Name}} {{.RestartCount}} {{.State.Health.Status}}"
    states = [state(one, pattern).split() for one in containers]
    for name, restarts, _ in states:
        if restarts != "0":
            fail("\n".join([f"{name} has ended", last_words(name)]))
    return bool(states) and all(health == "healthy" for _, _, health in states)


def last_words(container: str) -> str:
    """What it has written last, on both streams."""
    command = ["docker", "logs", "--tail", "80", container]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False).stdout


def logs(compose: list[str]) -> str:
    """Of all services."""
    return run(*compose, "logs", "--no-color", "--tail", "60")


def check_sharing(stack: Stack) -> None:
    """Both engines are members; what one has computed, the other pulls."""
    members = [one["instance_id"] for one in instances(stack.controller)]
    if sorted(members) != ["engine-1", "engine-2"]:
        fail(f"instances at the controller: {members}, expected engine-1 and engine-2")
    prompt = SENTENCE * 100
    first = ask(stack.router, prompt)
    wait("the first engine's chunks at the controller", lambda: published(stack.controller) > 0, 20, stack.logs)
    second = ask(stack.router, prompt)
    if first != second:
        fail(f"the two engines answer differently: {first!r} and {second!r}")
    wait("a pull between the engines", lambda: pulled(stack.controller) > 0, 20, stack.logs)
    say(f"two requests through the router, one text, {pulled(stack.controller)} chunks pulled by the second engine")


def ask(router: str, prompt: str) -> str:
    """One completion."""
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 10, "temperature": 0}
    answer = httpx.post(f"{router}/v1/completions", json=body, timeout=120).raise_for_status()
    return str(answer.json()["choices"][0]["text"])


def instances(controller: str) -> list[dict[str, Any]]:
    """What the controller says of its members."""
    found: list[dict[str, Any]] = httpx.get(f"{controller}/api/v1/instances").raise_for_status().json()["instances"]
    return found


def published(controller: str) -> int:
    """Chunks that the engines offer."""
    return sum(int(one["chunks"]) for one in instances(controller))


def pulled(controller: str) -> int:
    """Chunks that the engines have fetched from each other."""
    return sum(int(one["statistics"]["fetched_chunks"]) for one in instances(controller))


if __name__ == "__main__":
    sys.exit(main())
