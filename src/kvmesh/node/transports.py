"""Which transports a node offers, and the one it uses towards each peer."""

from __future__ import annotations

import logging
import os

from kvmesh.config import KVMeshConfig
from kvmesh.core.format import Format
from kvmesh.transfer.base import PeerTransport
from kvmesh.transfer.factory import choose, offered
from kvmesh.transfer.link import PeerTarget
from kvmesh.transfer.nixl_holder import NixlHolder
from kvmesh.transfer.pool import HostPool
from kvmesh.wire.directory import Member
from kvmesh.wire.peer import Hello

log = logging.getLogger("kvmesh.peers")


class Transports:
    """Makes transports for one node."""

    def __init__(
        self, config: KVMeshConfig, kv_format: Format, instance_id: str, incarnation: str, pool: HostPool
    ) -> None:
        """Raises StartupError when the configured channel cannot be had here."""
        self._config = config
        self._pool = pool
        self.offered = offered(config.transfer_channel)
        self.hello = Hello.of(instance_id, incarnation, kv_format, transports=self.offered, pid=os.getpid())
        self.nixl_holder: NixlHolder | None = None
        """Lets peers read our pool with NIXL; None where nixl is not offered."""
        if "nixl" in self.offered:
            self.nixl_holder = NixlHolder(pool, host=config.host, backends=config.nixl_backends)

    def start(self) -> None:
        """Start what serving needs. Raises StartupError."""
        if self.nixl_holder is not None:
            self.nixl_holder.start()

    def make(self, member: Member) -> PeerTransport:
        """The transport towards one member; connects nowhere yet."""
        target = PeerTarget(
            member.instance_id, member.incarnation, member.peer_host, member.peer_port, tuple(member.transports)
        )
        chosen = choose(
            self._config.transfer_channel,
            target,
            self.hello,
            self._pool,
            host=self._config.host,
            verify=self._config.verify_checksum,
            connections=self._config.fetch_connections,
            nixl_backends=self._config.nixl_backends,
        )
        log.info("transport to instance=%s is %s: %s", member.instance_id, chosen.transport.name, chosen.reason)
        return chosen.transport

    def close(self) -> None:
        """End what `start` has started."""
        if self.nixl_holder is not None:
            self.nixl_holder.close()
