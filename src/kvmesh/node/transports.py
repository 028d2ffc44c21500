"""Which transports a node offers, and the one it uses towards each peer."""

from __future__ import annotations

import logging
import os

import xxhash

from kvmesh.config import KVMeshConfig
from kvmesh.core.format import Format
from kvmesh.core.ledger import SlotLedger
from kvmesh.errors import StartupError
from kvmesh.transfer.base import PeerTransport
from kvmesh.transfer.coding import make_coding
from kvmesh.transfer.factory import choose, offered
from kvmesh.transfer.link import PeerTarget
from kvmesh.transfer.nixl_holder import NixlHolder
from kvmesh.transfer.pool import HostPool
from kvmesh.transfer.security import PeerSecurity
from kvmesh.transfer.shm_holder import ShmHolder
from kvmesh.transfer.tls import Tls
from kvmesh.wire.auth import ClusterKey
from kvmesh.wire.directory import Member
from kvmesh.wire.peer import Hello

log = logging.getLogger("kvmesh.peers")


class Transports:
    """Makes transports for one node."""

    def __init__(
        self,
        config: KVMeshConfig,
        kv_format: Format,
        instance_id: str,
        incarnation: str,
        pool: HostPool,
        ledger: SlotLedger,
    ) -> None:
        """Raises StartupError when the configured channel, or what is to secure it, cannot be had here."""
        self._config = config
        self.cluster_key = cluster_key(config)
        self.security = PeerSecurity(
            key=None if self.cluster_key is None else self.cluster_key.peer_key(),
            tls=None if config.tls is None else Tls.load(config.tls),
        )
        self._pool = pool
        self.coding = make_coding(config.wire_codec, kv_format)
        """None where chunks only travel raw."""
        # What a lossy codec makes of a chunk has its checksum; the other transports would bring the slot's own bytes.
        self._channel = "tcp" if self.coding is not None and self.coding.is_lossy else config.transfer_channel
        self.offered = offered(self._channel)
        self.hello = Hello.of(
            instance_id,
            incarnation,
            kv_format,
            transports=self.offered,
            pid=os.getpid(),
            codecs=() if self.coding is None else (self.coding.name,),
        )
        self.nixl_holder: NixlHolder | None = None
        """Lets peers read our pool with NIXL; None where nixl is not offered."""
        if "nixl" in self.offered:
            self.nixl_holder = NixlHolder(pool, host=config.host, backends=config.nixl_backends)

        self.shm_holder: ShmHolder | None = None
        """Lets nodes of this host read our pool by themselves; None where shm is not offered."""
        if "shm" in self.offered:
            self.shm_holder = ShmHolder(pool, ledger, incarnation)

    def digest(self, row: memoryview) -> bytes:
        """A slot's checksum: xxh3-128 of the bytes that peers will have."""
        if self.coding is not None and self.coding.is_lossy:
            return self.coding.digest(row)
        return xxhash.xxh3_128_digest(row)

    def start(self) -> None:
        """Start what serving needs. Raises StartupError."""
        if self.nixl_holder is not None:
            self.nixl_holder.start()

    def make(self, member: Member, pool: HostPool | None = None) -> PeerTransport:
        """The transport towards one member, into the node's pool or another one; connects nowhere yet."""
        target = PeerTarget.of(member)
        chosen = choose(
            self._channel,
            target,
            self.hello,
            pool or self._pool,
            host=self._config.host,
            verify=self._config.verify_checksum,
            connections=self._config.fetch_connections,
            nixl_backends=self._config.nixl_backends,
            security=self.security,
            coding=self.coding,
        )
        log.log(
            logging.INFO if pool is None else logging.DEBUG,
            "transport to instance=%s is %s: %s",
            member.instance_id,
            chosen.transport.name,
            chosen.reason,
        )
        return chosen.transport

    def close(self) -> None:
        """End what `start` has started."""
        if self.nixl_holder is not None:
            self.nixl_holder.close()
        if self.shm_holder is not None:
            self.shm_holder.close()


def cluster_key(config: KVMeshConfig) -> ClusterKey | None:
    """The key of a resolved configuration. Raises StartupError when its file was named and never read."""
    if config.cluster_key is not None:
        return ClusterKey(config.cluster_key.get_secret_value())
    if config.cluster_key_file is not None:
        raise StartupError(f"cluster_key_file {config.cluster_key_file}", expected="its key", found="none in use")
    return None
