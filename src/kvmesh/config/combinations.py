"""What does not go together, or not yet. Pure: a configuration in, problems and warnings out."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from kvmesh.config.model import CONTROLLER_URLS, PEER_LOCATIONS, POOL_LOCATIONS, PORT_KEYS, TLS_KEYS
from kvmesh.config.resolved import KVMeshConfig
from kvmesh.config.values import is_loopback, is_wildcard, parse_host_port, show
from kvmesh.errors import ConfigProblem

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from collections.abc import Set as AbstractSet

_DIRECTORY_KEYS = (
    "enable_controller",
    "controller_pull_url",
    "controller_reply_url",
    "lookup_url",
    "static_peers",
)


class _Finding(NamedTuple):
    keys: tuple[str, ...]
    """What it depends on: it is kept back while one of these has a problem of its own."""
    expected: str
    found: str
    hint: str = ""


def check_combinations(
    config: KVMeshConfig, names: Mapping[str, str], unsure: AbstractSet[str] = frozenset()
) -> tuple[list[ConfigProblem], list[str]]:
    """Problems and warnings about keys that are each fine by themselves.

    Args:
        config: the configuration, every value valid by itself.
        names: how the user wrote each key, by own name.
        unsure: own names whose values are stand-ins, because the written ones were no good.
    """
    problems = []
    for finding in _impossible(config):
        if unsure.isdisjoint(finding.keys):
            key = next((key for key in finding.keys if key in config.sources), finding.keys[0])
            where = config.sources.get(key, "default")
            problems.append(ConfigProblem(names.get(key, key), where, finding.expected, finding.found, finding.hint))
    return problems, list(_doubtful(config))


def _impossible(config: KVMeshConfig) -> Iterator[_Finding]:
    if config.heartbeat_interval_s * 2 > config.instance_timeout_s:
        yield _Finding(
            ("instance_timeout_s", "heartbeat_interval_s"),
            f"at least twice heartbeat_interval_s, {2 * config.heartbeat_interval_s:g}",
            f"{config.instance_timeout_s:g}",
            "else one late heartbeat counts as death",
        )
    yield from _equal_ports(config)
    if missing := [key for key in TLS_KEYS if getattr(config, key) is None]:
        given = [key for key in TLS_KEYS if key not in missing]
        if given:
            expected = f"{', '.join(missing)} as well: the three TLS files go together"
            yield _Finding((*given, *missing), expected, f"only {', '.join(given)}")
    if config.share:
        yield from _impossible_sharing(config)


def _impossible_sharing(config: KVMeshConfig) -> Iterator[_Finding]:
    if not config.pool_enabled:
        hint = "switch the pool on, or set share: false"
        yield _Finding(("pool_enabled", "share"), "true while share is true: peers read from the pool", "false", hint)
    if _is_exposed(config) and not config.insecure:
        yield _Finding(
            ("host", "insecure", "cluster_key_file"),
            "a loopback address, because there is no cluster key",
            show(config.host),
            "set cluster_key_file (kvmesh key new FILE makes one) or KVMESH_CLUSTER_KEY; or bind loopback; or write "
            "insecure: true if everybody who reaches this address may read and disturb KV",
        )
    if is_wildcard(config.advertise_host):
        yield _Finding(
            ("advertise_host", "host"),
            "an address that peers can connect to",
            f"{config.advertise_host!r}, which means every address",
            "set advertise_host to this machine's address as peers know it",
        )
    if config.wire_codec == "int8" and config.transfer_channel in {"shm", "nixl"}:
        yield _Finding(
            ("wire_codec", "transfer_channel"),
            f"another codec than int8 while transfer_channel is {config.transfer_channel}",
            "int8",
            "int8 is for slow links and travels by tcp only: set transfer_channel to tcp (or auto), or another codec",
        )
    if config.enable_controller:
        yield from _impossible_controller(config)
    elif config.directory == "none":
        yield _Finding(
            ("share", *_DIRECTORY_KEYS),
            "a directory while share is true",
            "none",
            "set enable_controller with controller_pull_url and controller_reply_url, or lookup_url (Redis), or "
            "static_peers; or set share: false to use the host pool alone",
        )


def _impossible_controller(config: KVMeshConfig) -> Iterator[_Finding]:
    for key in ("controller_pull_url", "controller_reply_url"):
        if getattr(config, key) is None:
            yield _Finding(
                (key, "enable_controller"),
                f"{key} while enable_controller is true",
                f"no {key}",
                f"set {key}: host:port, or enable_controller: false",
            )
    urls = {key: (getattr(config, key) or "").split(",") for key in CONTROLLER_URLS if getattr(config, key)}
    for key in CONTROLLER_URLS[1:]:
        pulls = urls.get(CONTROLLER_URLS[0], [])
        if key in urls and pulls and len(urls[key]) != len(pulls):
            expected = f"one address for each of the {len(pulls)} in {CONTROLLER_URLS[0]}"
            yield _Finding((key, CONTROLLER_URLS[0]), expected, str(len(urls[key])))
    for index, first in enumerate(CONTROLLER_URLS):
        for second in CONTROLLER_URLS[index + 1 :]:
            if shared := sorted(set(urls.get(first, ())) & set(urls.get(second, ()))):
                yield _Finding((second, first), f"another port than {first}", show(shared[0]))
    for key, given in urls.items():
        if len(set(given)) < len(given):
            yield _Finding((key,), "each controller once", show(",".join(given)))


def _equal_ports(config: KVMeshConfig) -> Iterator[_Finding]:
    for index, first in enumerate(PORT_KEYS):
        for second in PORT_KEYS[index + 1 :]:
            mine, theirs = _ports(config, first), _ports(config, second)
            shared = sorted(port for port in set(mine) & set(theirs) if port)
            if shared:
                yield _Finding((second, first), f"another port than {first}", ", ".join(map(str, shared)))
    for key in PORT_KEYS:
        used = [port for port in _ports(config, key) if port]
        if len(set(used)) < len(used):
            yield _Finding((key,), "a port of its own for each data-parallel rank", show(used))


def _ports(config: KVMeshConfig, key: str) -> tuple[int, ...]:
    listed = config.port_lists.get(key)
    if listed is not None:
        return listed
    port: int | None = getattr(config, key)
    return () if port is None else (port,)


def _doubtful(config: KVMeshConfig) -> Iterator[str]:
    if not config.share:
        if config.enable_controller:
            yield "share is false: the controller's addresses are not used"
        if not config.pool_enabled:
            yield "share and pool_enabled are both false: kvmesh does nothing"
        return
    if _is_exposed(config) and config.insecure:
        yield (
            f"INSECURE: whoever reaches {config.host} on its ports can read and disturb KV, because no cluster key "
            "protects it; insecure: true says that this is meant"
        )
    elif not is_loopback(config.host) and config.transfer_channel == "nixl":
        yield (
            "transfer_channel is nixl: NIXL's own ports know no cluster key, and whoever reaches them can read the "
            "host pool; keep them behind a firewall (docs/security.md), or use tcp"
        )
    if config.directory != "controller" and (config.controller_pull_url or config.controller_reply_url):
        yield "enable_controller is false: the controller's addresses are not used"
    if config.enable_controller and config.controllers:
        controller_host, _ = parse_host_port(config.controllers[0].pull.removeprefix("tcp://"))
        if is_loopback(config.advertise_host) and not is_loopback(controller_host):
            yield (
                f"advertise_host is {config.advertise_host}, which only this machine can reach, and the controller is "
                f"at {controller_host}: instances on other machines will not be able to fetch from this one"
            )
    if config.wire_codec in {"lossless", "auto"} and config.transfer_channel in {"shm", "nixl"}:
        yield f"wire_codec is {config.wire_codec}: it serves those peers only that are reached by tcp"
    if config.stall_timeout_s > config.fetch_timeout_s:
        yield "stall_timeout_s is longer than fetch_timeout_s and so never ends a fetch"
    if unknown := [name for name in config.retrieve_locations if name.lower() not in PEER_LOCATIONS | POOL_LOCATIONS]:
        yield f"retrieve_locations: {', '.join(unknown)} do not exist here, only pool and peers"
    if not config.fetches:
        yield "retrieve_locations leaves out peers: this instance publishes its chunks and fetches none"


def _is_exposed(config: KVMeshConfig) -> bool:
    return config.cluster_key is None and not is_loopback(config.host)
