"""The directories that a configuration asks for, as one client."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from kvmesh.config import KVMeshConfig
from kvmesh.config.redis_url import parse_redis_target
from kvmesh.config.values import parse_host_port
from kvmesh.directory.base import DirectoryClient, DirectoryListener
from kvmesh.directory.controller_client import ControllerClient
from kvmesh.directory.group import DirectoryGroup, Maker
from kvmesh.directory.merge import Merge, Source
from kvmesh.directory.outbox import Outbox
from kvmesh.directory.redis_client import RedisClient
from kvmesh.directory.static_client import Address, StaticClient
from kvmesh.transfer.security import PeerSecurity
from kvmesh.wire.auth import ClusterKey
from kvmesh.wire.directory import Member
from kvmesh.wire.follow import MAX_KEYS_PER_FRAME
from kvmesh.wire.peer import Hello
from kvmesh.wire.redis_layout import KEYS_PER_ENTRY

FALLBACK_TIMEOUTS = 4
"""After so many instance time-outs without any directory, peers are followed directly."""


class NodeSide(NamedTuple):
    """What directories need of their node."""

    listener: DirectoryListener
    outbox: Outbox
    cluster_key: ClusterKey | None
    hello: Hello
    security: PeerSecurity
    on_follower: Callable[[Callable[[Member], None] | None], None]
    """Whom to tell of nodes that begin to follow this one."""
    known_addresses: Callable[[], Iterable[Address]]
    """Peers that are known now, most wanted first."""


def make_directory(config: KVMeshConfig, node: NodeSide) -> DirectoryClient | None:
    """A client that connects once it runs; None without a directory. Raises StartupError when a package is missing."""
    listed = [parse_host_port(url.removeprefix("tcp://")) for url in config.static_peers]

    def static(source: Source) -> DirectoryClient:
        return StaticClient(
            lambda: listed if config.directory == "static" else [*listed, *node.known_addresses()],
            node.hello,
            node.security,
            source,
            instance_timeout_s=config.instance_timeout_s,
            on_follower=node.on_follower,
        )

    makers = _makers(config, node)
    is_static = config.directory == "static"
    if not makers and not is_static:
        return None
    return DirectoryGroup(
        Merge(node.listener, grace_s=2 * config.instance_timeout_s),
        [static] if is_static else makers,
        fallback=None if is_static else static,
        fallback_after_s=FALLBACK_TIMEOUTS * config.instance_timeout_s,
    )


def batch_keys(config: KVMeshConfig) -> int:
    """Most keys of one batch of changes that this configuration's directories take."""
    return KEYS_PER_ENTRY if config.directory == "redis" else MAX_KEYS_PER_FRAME


def _makers(config: KVMeshConfig, node: NodeSide) -> list[Maker]:
    if config.directory == "controller":
        return [_controller(config, node, *urls) for urls in config.controllers]
    if config.directory == "redis":
        return [_redis(config, node)]
    return []


def _controller(
    config: KVMeshConfig, node: NodeSide, pull_url: str, reply_url: str, heartbeat_url: str | None
) -> Maker:
    return lambda source: ControllerClient(
        pull_url=pull_url,
        reply_url=reply_url,
        heartbeat_url=heartbeat_url,
        heartbeat_interval_s=config.heartbeat_interval_s,
        listener=source,
        outbox=node.outbox,
        cluster_key=node.cluster_key,
    )


def _redis(config: KVMeshConfig, node: NodeSide) -> Maker:
    assert config.lookup_url is not None
    target = parse_redis_target(config.lookup_url)
    return lambda source: RedisClient(
        target,
        cluster_name=config.cluster_name,
        heartbeat_interval_s=config.heartbeat_interval_s,
        instance_timeout_s=config.instance_timeout_s,
        lookup_timeout_s=config.lookup_timeout_s,
        listener=source,
        outbox=node.outbox,
        cluster_key=node.cluster_key,
    )
