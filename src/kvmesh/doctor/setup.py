"""What is installed here, of which version, and the configuration file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from importlib import metadata

from packaging.version import InvalidVersion, Version

import kvmesh
from kvmesh.doctor.findings import CONTROLLER, INSTANCE, MACHINE, Finding, ok, problem, skipped, warning
from kvmesh.doctor.situation import Cluster, Situation
from kvmesh.errors import VersionError
from kvmesh.vllm.versions import check_version

PLUGIN_GROUP, PLUGIN = "vllm.general_plugins", "kvmesh"
PLUGINS_VARIABLE = "VLLM_PLUGINS"


def versions(situation: Situation) -> Iterator[Finding]:
    """vLLM, the plugin that it finds us by, and kvmesh here, in the controller and in the members."""
    yield vllm_version(_vllm_distribution())
    yield plugin(_has_plugin(), situation.environ.get(PLUGINS_VARIABLE))
    if situation.cluster is not None:
        yield cluster_versions(kvmesh.__version__, situation.cluster)


def vllm_version(installed: tuple[str, str] | None) -> Finding:
    """`installed`: name and version of the distribution that brings vLLM; None when there is none."""
    check = "version.vllm"
    if installed is None:
        return skipped(
            check, MACHINE, "no vLLM in this Python environment", "on a machine that serves, run this in vLLM's own"
        )
    name, text = installed
    try:
        check_version(Version(text))
    except InvalidVersion:
        return problem(check, MACHINE, f"{name} {text} has no version number", "install a released vLLM")
    except VersionError as error:
        return problem(check, MACHINE, f"{name} {text}: {error.expected} is supported", error.hint)
    return ok(check, MACHINE, f"{name} {text} is supported")


def plugin(is_registered: bool, chosen: str | None) -> Finding:
    """`chosen`: VLLM_PLUGINS, which limits the plugins that vLLM loads when it is set."""
    check = "version.plugin"
    if not is_registered:
        advice = "install kvmesh in vLLM's environment with pip (a folder on PYTHONPATH alone registers nothing)"
        return problem(check, MACHINE, "vLLM cannot find KVMeshConnector: kvmesh is not installed here", advice)
    if chosen is not None and PLUGIN not in {name.strip() for name in chosen.split(",")}:
        message = f"{PLUGINS_VARIABLE} is {chosen!r}, so vLLM will not load kvmesh's plugin"
        return problem(check, MACHINE, message, f"add {PLUGIN} to {PLUGINS_VARIABLE}, or unset it")
    return ok(check, MACHINE, "vLLM finds KVMeshConnector")


def cluster_versions(ours: str, cluster: Cluster) -> Finding:
    """One version everywhere, or who has another one."""
    check = "version.kvmesh"
    running = Counter(member.version or "unknown" for member in cluster.members.instances)
    running[cluster.health.version or "unknown"] += 1
    if set(running) == {ours}:
        return ok(check, MACHINE, f"kvmesh {ours} here, in the controller and in all members")
    told = ", ".join(f"{version} ({count})" for version, count in running.most_common())
    message = f"kvmesh {ours} here; controller ({cluster.health.version or 'unknown'}) and members run {told}"
    return warning(check, CONTROLLER, message, "run one version everywhere; formats and protocols may differ")


def configuration(situation: Situation) -> Iterator[Finding]:
    """What `kvmesh config check` finds, and chunk sizes beside those of the members."""
    check = "config.file"
    if situation.config_file is None:
        yield skipped(
            check, INSTANCE, "no configuration file, so nothing is checked about an instance here", "give --config FILE"
        )
        return
    about = str(situation.config_file)
    for one in situation.config_problems:
        yield problem(check, about, str(one), f"kvmesh config check {about}")
    config = situation.config
    if config is None:
        return
    for text in config.warnings:
        yield warning(check, about, text, "see docs/configuration.md")
    if not config.warnings:
        yield ok(check, about, f"all keys are understood; directory: {config.directory}")
    if not config.share:
        yield warning("config.share", about, "share is false: this instance shares nothing", "set share: true")
    yield from _chunk_tokens(situation)


def _chunk_tokens(situation: Situation) -> Iterator[Finding]:
    """Before it has started: would this instance's chunks be as long as those of the members?"""
    config, cluster = situation.config, situation.cluster
    if config is None or cluster is None or situation.running is not None or not config.share:
        return
    theirs = Counter(str(member.format.fields.get("chunk_tokens")) for member in cluster.members.instances)
    if not theirs or str(config.chunk_tokens) in theirs:
        return
    usual = theirs.most_common(1)[0][0]
    yield problem(
        "config.chunk_tokens",
        str(situation.config_file),
        f"chunk_tokens is {config.chunk_tokens} here and {' or '.join(theirs)} in all members: nothing would be shared",
        f"set chunk_size: {usual} here, or {config.chunk_tokens} everywhere",
    )


def _vllm_distribution() -> tuple[str, str] | None:
    """Name and version of whichever distribution brings the package vllm; vLLM itself is not imported."""
    names = metadata.packages_distributions().get("vllm", [])
    for name in dict.fromkeys(names):
        return name, metadata.version(name)
    return None


def _has_plugin() -> bool:
    return any(entry.name == PLUGIN for entry in metadata.entry_points(group=PLUGIN_GROUP))
