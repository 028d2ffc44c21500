"""NIXL, RDMA devices, and the variables that tell UCX what to use."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from kvmesh.doctor.findings import MACHINE, Finding, ok, problem, skipped, warning
from kvmesh.doctor.situation import Situation
from kvmesh.transfer.factory import has_rdma

LOAD_TIMEOUT_S = 60.0
"""A loaded machine takes its time for the libraries of NIXL and UCX."""
RDMA_TRANSPORTS = frozenset({"all", "ib", "rc", "rc_v", "rc_x", "rc_verbs", "rc_mlx5", "dc", "dc_x", "dc_mlx5"})
"""Names in UCX_TLS that can read a peer's memory by RDMA."""
TCP_TRANSPORTS = frozenset({"all", "tcp"})
_DEVICES = "sys/class/infiniband"
_LOAD = "from kvmesh.transfer.nixl_agent import unavailable; print(unavailable() or '', end='')"


def check(situation: Situation) -> Iterator[Finding]:
    """Only where transfer_channel may take NIXL."""
    channel = "auto" if situation.config is None else situation.config.transfer_channel
    if channel not in {"auto", "nixl"}:
        yield skipped("rdma.devices", MACHINE, f"transfer_channel is {channel}, which needs neither NIXL nor RDMA")
        return
    has_device = has_rdma(situation.root / _DEVICES)
    yield devices(situation.root, is_wanted=channel == "nixl")
    if channel == "auto" and not has_device:
        yield skipped("rdma.nixl", MACHINE, "transfer_channel auto takes NIXL only where there is an RDMA device")
        return
    yield nixl(loading_error(), is_wanted=channel == "nixl")
    yield from ucx(situation.environ, has_device=has_device, interfaces=interfaces(situation.root))


def devices(root: Path, *, is_wanted: bool) -> Finding:
    """RDMA devices, whether a port of one is up, and whether this user may open them."""
    check_name = "rdma.devices"
    found = _names(root / _DEVICES)
    if not found:
        message = "no RDMA device"
        if not is_wanted:
            return ok(check_name, MACHINE, f"{message}; chunks travel by tcp")
        advice = "use transfer_channel: tcp, which costs less CPU without RDMA; or install the device's driver"
        return warning(check_name, MACHINE, f"{message}: transfer_channel nixl will go over UCX's tcp", advice)
    active = [name for name in found if _has_active_port(root / _DEVICES / name)]
    told = ", ".join(found)
    if not active:
        advice = "look at the cable, the switch and the subnet manager (ibstat)"
        return problem(check_name, MACHINE, f"RDMA devices {told}, and no port of them is active", advice)
    verbs = [root / "dev/infiniband" / name for name in _names(root / "dev/infiniband") if name.startswith("uverbs")]
    if not any(os.access(path, os.R_OK | os.W_OK) for path in verbs):
        advice = "give the container /dev/infiniband (--device), and the user the right to it"
        return problem(check_name, MACHINE, f"RDMA devices {told}, but this user cannot open any uverbs device", advice)
    return ok(check_name, MACHINE, f"RDMA devices {told}; active: {', '.join(active)}")


def nixl(error: str, *, is_wanted: bool) -> Finding:
    """`error`: why NIXL cannot be loaded; empty when it can."""
    if not error:
        return ok("rdma.nixl", MACHINE, "NIXL can be loaded")
    advice = "pip install 'kvmesh[nixl]', or use transfer_channel: tcp"
    if is_wanted:
        return problem("rdma.nixl", MACHINE, f"transfer_channel is nixl, and the node will not start: {error}", advice)
    return warning("rdma.nixl", MACHINE, f"there is an RDMA device, but no NIXL to use it: {error}", advice)


def ucx(environ: Mapping[str, str], *, has_device: bool, interfaces: set[str]) -> Iterator[Finding]:
    """UCX_TLS and UCX_NET_DEVICES, as the engine started in this environment would have them."""
    yield _transports(environ.get("UCX_TLS", ""), has_device=has_device)
    text = environ.get("UCX_NET_DEVICES", "")
    named = [name.strip().partition(":")[0] for name in text.split(",") if name.strip()]
    unknown = [name for name in named if name != "all" and name not in interfaces]
    check_name, about = "rdma.ucx_net_devices", "UCX_NET_DEVICES"
    if unknown:
        advice = f"name some of {', '.join(sorted(interfaces))}, or unset it"
        yield problem(check_name, about, f"{', '.join(unknown)}: this machine has no such device", advice)
    elif named:
        yield ok(check_name, about, f"{text}: this machine has them")
    else:
        yield ok(check_name, about, "not set: UCX listens on every interface; name the ones that peers reach")


def _transports(text: str, *, has_device: bool) -> Finding:
    check_name, about = "rdma.ucx_tls", "UCX_TLS"
    if not text:
        return ok(check_name, about, "not set: UCX chooses")
    if text.startswith("^"):
        return ok(check_name, about, f"{text}: all but these")
    named = {name.strip().lstrip("\\") for name in text.split(",") if name.strip()}
    if has_device and not named & RDMA_TRANSPORTS:
        message = f"{text} names no RDMA transport, and this machine has an RDMA device"
        return warning(check_name, about, message, "add rc (as in UCX_TLS=rc,tcp), or unset UCX_TLS")
    if not has_device and not named & TCP_TRANSPORTS:
        message = f"{text} names neither tcp nor anything that this machine without RDMA device has"
        return problem(check_name, about, message, "set UCX_TLS=tcp, or unset it")
    if not named & TCP_TRANSPORTS:
        message = f"{text} leaves out tcp, which UCX needs to set connections up and to notice dead peers"
        return warning(check_name, about, message, f"set UCX_TLS={text},tcp")
    return ok(check_name, about, text)


def loading_error() -> str:
    """Why NIXL cannot be loaded, found out in a process of its own: its libraries may take a process down."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _LOAD], capture_output=True, text=True, timeout=LOAD_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return f"loading it takes more than {LOAD_TIMEOUT_S:g} s"
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:]
        return f"loading it ends the process with {done.returncode}: {' '.join(last)}"
    return done.stdout.strip()


def interfaces(root: Path) -> set[str]:
    """What UCX_NET_DEVICES may name: network interfaces and RDMA devices."""
    return {*_names(root / "sys/class/net"), *_names(root / _DEVICES)}


def _names(folder: Path) -> list[str]:
    try:
        return sorted(path.name for path in folder.iterdir())
    except OSError:
        return []


def _has_active_port(device: Path) -> bool:
    return any("ACTIVE" in _text(device / "ports" / port / "state") for port in _names(device / "ports"))


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
