"""The node: the one process of an instance that talks to the network.

Composition only; each part has its own file. Everything here runs on the node's asyncio loop; transfers run in threads
(peer server, fetcher) and hashing in one more.

    engine link ---> inventory ---> directory client ---> controller
         |               ^
         |          peer server <--- other nodes' fetches
         `--> fetcher ---> peers ---> transports ---> other nodes' peer servers
                 ^
              replica <--- directory client
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor

import kvmesh
from kvmesh.config import KVMeshConfig
from kvmesh.config.values import is_loopback
from kvmesh.core.format import Format
from kvmesh.core.gate import Saved
from kvmesh.core.keys import ChunkKey, short
from kvmesh.core.ledger import SlotLedger
from kvmesh.core.reasons import MissReason
from kvmesh.core.replica import Applied, Replica
from kvmesh.directory.base import DirectoryClient
from kvmesh.directory.factory import NodeSide, batch_keys, make_directory
from kvmesh.directory.outbox import Outbox
from kvmesh.node.admin import bind_admin, serve_admin
from kvmesh.node.answers import answer_questions
from kvmesh.node.asker import Asker
from kvmesh.node.bridge import Bridge
from kvmesh.node.control import Control
from kvmesh.node.drain import Drain
from kvmesh.node.explainer import Neighbourhood
from kvmesh.node.fetch_summary import FetchSummary, FetchTotals
from kvmesh.node.fetcher import Fetcher, JobResult, make_items
from kvmesh.node.inventory import Inventory
from kvmesh.node.listener import NodeListener
from kvmesh.node.memory import Memory
from kvmesh.node.operations import NodeOperations
from kvmesh.node.peer_follow import Following
from kvmesh.node.peer_server import PeerServer
from kvmesh.node.peers import Peers
from kvmesh.node.prober import Prober
from kvmesh.node.request_log import RequestLog
from kvmesh.node.transports import Transports
from kvmesh.tasks import run_all
from kvmesh.transfer.pool import HostPool
from kvmesh.wire import link
from kvmesh.wire.auth import ClusterKey
from kvmesh.wire.directory import Answer, Ask, Changes, Member, NodeStatistics, Snapshot, UseReport
from kvmesh.wire.operations import Sharing

log = logging.getLogger("kvmesh.node")


PREFAULT_PAUSE_S = 0.001
MAX_TOKENS_PER_S = 1e9
"""What a heartbeat can tell: a measurement that is nonsense must not have the directory take us for dead."""


class Node:
    """One instance's node over one pool. `start` binds and joins; `run` serves until cancelled."""

    def __init__(
        self,
        config: KVMeshConfig,
        kv_format: Format,
        pool: HostPool,
        ledger: SlotLedger,
        listener: NodeListener | None = None,
        *,
        abort: Callable[[], None] = lambda: os._exit(70),
        sharing: Sharing = Sharing.ON,
        tokenizer: str = "",
    ) -> None:
        self.config = config
        self.format = kv_format
        self.incarnation = secrets.token_hex(8)
        self.instance_id = config.instance_id or f"{socket.gethostname()}-{os.getpid()}-{self.incarnation[:6]}"
        self._listener = listener or NodeListener()
        self._pool = pool
        self._ledger = ledger
        self._directory: DirectoryClient | None = None
        self._connected = self._ever_connected = False
        self._background = ThreadPoolExecutor(4, thread_name_prefix="connect")
        self._fetch_totals = FetchTotals()
        self._active_fetches = 0
        self._prefill_tokens_per_s = 0.0
        """What the engine told last of its speed; 0 before it has measured any."""
        self._admin: socket.socket | None = None
        self._closing = threading.Event()
        # As the node before this one had been told. A drain that it was in the middle of has failed with it.
        self.sharing: Sharing = Sharing.ON if sharing is Sharing.DRAINING else sharing
        self.tokenizer = tokenizer
        """Folder of the model's tokenizer; empty when nobody knows."""
        self.replica = Replica()
        self._asks = config.index_mode == "query"
        self.asker = Asker(lambda: self._directory, timeout_s=config.lookup_timeout_s, own_id=self.instance_id)
        self._transports = Transports(config, kv_format, self.instance_id, self.incarnation, pool, ledger)
        self._bridge = Bridge()
        trusts = self._transports.cluster_key is not None or is_loopback(config.host)
        self.control = Control(self._bridge, trusts_peers=trusts)
        self.operations = NodeOperations(self, self._listener)
        self.coding = self._transports.coding
        """The wire codec; None where chunks only travel raw."""
        self.inventory = Inventory(pool, ledger, self._inventory_changed, self._transports.digest)
        self.inventory.accepting = self.sharing is Sharing.ON
        self.outbox = Outbox(self.instance_id, self.incarnation, self, batch_keys=batch_keys(config))
        self.following = Following(self.outbox, self.statistics)
        self.peers = Peers(kv_format, self._transports.make, self._background)
        self.around = Neighbourhood(config, self.replica, self.peers, Memory())
        self.requests = RequestLog(self.around, chunk_tokens=kv_format.chunk_tokens)
        answer_questions(self.control, self.requests)
        self.fetcher = Fetcher(
            self,
            self.peers,
            pool,
            stall_s=config.stall_timeout_s,
            abort=abort,
            quarantine=self._quarantine,
            policy=config.gate_policy,
        )
        self.drain = Drain(self, self._transports, self._bridge)
        self._prober = Prober(self.replica, self.peers, self._transports.make, pool.chunk_bytes, self._tell_rates)
        self.server = PeerServer(
            pool,
            ledger,
            self.inventory.locate,
            self._transports.hello,
            host=config.host,
            port=config.peer_port,
            lookup_port=config.lookup_port,
            nixl=self._transports.nixl_holder,
            shm=self._transports.shm_holder,
            security=self._transports.security,
            following=self.following,
            offers=self.drain,
            questions=self.control,
            coding=self.coding,
        )

    @property
    def directory_connected(self) -> bool:
        """Whether the directory answers now."""
        return self._connected

    @property
    def directory_problem(self) -> str:
        """What is wrong with the directory now, in words; empty when all is well."""
        return "" if self._directory is None else self._directory.problem

    @property
    def asks(self) -> bool:
        """Whether the directory is asked for chunks; if not, the replica has them."""
        return self._asks

    @property
    def cluster_key(self) -> ClusterKey | None:
        """What the members share; None without."""
        return self._transports.cluster_key

    @property
    def slots(self) -> int:
        return self._pool.slots

    @property
    def chunk_bytes(self) -> int:
        return self._pool.chunk_bytes

    # -- life ----------------------------------------------------------------------------------------------------------

    def start(self) -> Member:
        """Bind the peer port and announce what the ledger holds already. Raises StartupError when the port is taken.

        Returns this node as the directory will know it.
        """
        if self.config.admin_port is not None:
            self._admin = bind_admin(self.config.host, self.config.admin_port)
        self._transports.start()
        self.server.start()
        threading.Thread(target=self._prefault, name="prefault", daemon=True).start()
        self.inventory.republish()
        if self.sharing is not Sharing.LEFT:
            self._directory = make_directory(self.config, self._side())
        if self._directory is not None:
            self._directory.follow_inventories(not self._asks)
        member = Member(
            instance_id=self.instance_id,
            incarnation=self.incarnation,
            peer_host=self.config.advertise_host,
            peer_port=self.server.port,
            admin_port=self._admin.getsockname()[1] if self._admin is not None else 0,
            transports=self._transports.offered,
            format=self.format,
            slots=self._pool.slots,
            version=kvmesh.__version__,
        )
        self.around.member = member
        return member

    async def run(self, member: Member) -> None:
        """Serve until cancelled."""
        log.info(
            "node is up instance=%s incarnation=%s address=%s transports=%s slots=%d chunk_bytes=%d format=%s",
            self.instance_id,
            self.incarnation,
            member.peer_address,
            ",".join(member.transports),
            self._pool.slots,
            self._pool.chunk_bytes,
            self.format.format_id(),
        )
        self.following.start(member)
        self._bridge.start()
        tasks: list[Coroutine[None, None, None]] = []
        if self._admin is not None:
            tasks.append(serve_admin(self, self._admin))
        if self._directory is not None:
            tasks.append(self._directory.run(member))
        if self.config.gate_policy.is_on and self.config.fetches:
            tasks.append(self._prober.run())
        await run_all(*tasks, _for_ever())

    def close(self) -> None:
        """End all threads and connections. Fetches that run end as misses."""
        self._closing.set()
        self._bridge.close()  # or the server would wait for threads that wait for this loop
        self.server.close()
        self.fetcher.close()
        for peer in list(self.peers):
            peer.transport.close()
        self.inventory.close()
        self._prober.close()
        self._transports.close()
        self._background.shutdown(wait=False, cancel_futures=True)

    # -- fetching ------------------------------------------------------------------------------------------------------

    async def fetch(
        self,
        request_id: str,
        keys: Sequence[bytes],
        slots: Sequence[int],
        timeout_s: float,
        saved: Saved | None = None,
    ) -> JobResult:
        """Pull chunks into free slots of the pool; see `Fetcher.fetch`. The result is counted, reported and logged as
        soon as whoever waits for it has it.
        """
        if saved is not None and saved.chunk_s > 0:
            self._prefill_tokens_per_s = min(self.format.chunk_tokens / saved.chunk_s, MAX_TOKENS_PER_S)
        self._active_fetches += 1
        try:
            result = await self.fetcher.fetch(make_items(keys, slots), timeout_s, saved)
        finally:
            self._active_fetches -= 1
        for outcome in result.fetched():
            if outcome.checksum is not None:
                self.inventory.filled(outcome.item.slot, outcome.item.key, outcome.checksum)
        asyncio.get_running_loop().call_soon(self._account, request_id, result)
        return result

    def _account(self, request_id: str, result: JobResult) -> None:
        """What a fetch has taught, for everybody but the request that waits for it."""
        self._tell_rates()
        for outcome in result.outcomes:
            if outcome.reason in {MissReason.EVICTED, MissReason.STALE, MissReason.PEER_UNREACHABLE}:
                self.asker.forget(outcome.item.key)
        done = FetchSummary.of(request_id, result, self.peers, self._pool.chunk_bytes)
        done.log()
        self._fetch_totals.add(done)
        self.requests.fetched(request_id, done.transports, self._pool.chunk_bytes, result)
        if self._directory is not None:
            self._directory.report(done.report(self.instance_id, self.incarnation))

    # -- operations ----------------------------------------------------------------------------------------------------

    def set_sharing(self, sharing: Sharing) -> None:
        """Take part in less, or in everything again. Returns at once; the directory and the engine hear of it."""
        if sharing is self.sharing:
            return
        log.info("sharing changes from=%s to=%s", self.sharing.value, sharing.value)
        self.sharing = sharing
        self.inventory.accepting = sharing is Sharing.ON
        if sharing in (Sharing.DRAINED, Sharing.LEFT):
            self.inventory.withdraw()
        if sharing is Sharing.ON:
            self.inventory.republish()
        self._listener.on_visible_reset(self.visible_keys())
        self._tell_directory()

    def leave(self) -> None:
        """Be a member of the cluster no longer."""
        self.set_sharing(Sharing.LEFT)
        self.following.leave()
        if self._directory is not None:
            self._directory.leave()

    def knows_all_inventories(self) -> bool:
        """False for the first moments of a member, in which it has not heard of everybody's chunks yet."""
        return self._connected and all(self.replica.sequence(name) is not None for name in self.replica.members())

    def visible_keys(self) -> list[ChunkKey]:
        """What the engine may fetch now."""
        return list(self.replica.keys()) if self.sharing is Sharing.ON else []

    def holders(self, key: bytes) -> tuple[str, ...]:
        """Who holds a chunk, as far as the replica knows or the directory has said."""
        return self.replica.holders(key) or self.asker.holders(key)

    def take_record(self, record: link.RequestRecord) -> None:
        """The engine tells of a request. What its gate has refused by the rates it was told, this node may measure."""
        self.requests.take(record)
        for miss in record.misses:
            if miss.reason is MissReason.GATE_REFUSED:
                self._prober.refused(miss.key, self.holders(miss.key))

    # -- DirectoryListener ---------------------------------------------------------------------------------------------

    def on_connection(self, connected: bool) -> None:
        self._connected = connected
        self._ever_connected |= connected
        self._tell_directory()

    def on_member_up(self, member: Member) -> None:
        known = self.peers.get(member.instance_id)
        if known is not None and known.member.incarnation == member.incarnation:
            return
        if self.peers.add(member):
            applied = self.replica.member_up(member.instance_id, member.incarnation)
            self._applied(applied, lost_by=member.instance_id, why="replaced")
            log.info(
                "peer joined instance=%s incarnation=%s address=%s",
                member.instance_id,
                member.incarnation,
                member.peer_address,
            )
        else:
            self.around.meet_stranger(member)
            self._applied(
                self.replica.member_down(member.instance_id, self.replica.incarnation(member.instance_id) or "")
            )
        self._tell_directory()

    def on_member_down(self, instance_id: str, incarnation: str, reason: str) -> None:
        if self.peers.get(instance_id) is not None:
            log.info("peer gone instance=%s incarnation=%s reason=%s", instance_id, incarnation, reason)
        self.peers.remove(instance_id)
        self.around.strangers.pop(instance_id, None)
        self._applied(self.replica.member_down(instance_id, incarnation), lost_by=instance_id, why=reason)
        self._tell_directory()

    def on_changes(self, changes: Changes) -> bool:
        return self._applied(
            self.replica.apply_changes(
                changes.instance_id, changes.incarnation, changes.sequence, changes.added, changes.removed
            ),
            lost_by=changes.instance_id,
        )

    def on_snapshot(self, part: Snapshot) -> bool:
        return self._applied(
            self.replica.apply_snapshot(
                part.instance_id, part.incarnation, part.sequence, part.keys, part.first, part.last
            )
        )

    def on_ask(self, ask: Ask, answer: Callable[[Answer], None]) -> None:
        self.control.take(ask, answer)

    def take_use_report(self, *, whole: bool) -> UseReport | None:
        if whole:
            self.requests.start_over()
        return self.requests.take_report(self.instance_id, self.incarnation)

    # -- what the outbox tells of --------------------------------------------------------------------------------------

    def take_changes(self, limit: int) -> tuple[list[ChunkKey], list[ChunkKey]]:
        changes = self.inventory.take_changes(limit)
        self.around.lost(changes.removed, self.instance_id, "evicted")
        return changes

    def keys(self) -> list[ChunkKey]:
        return self.inventory.keys()

    def __contains__(self, key: bytes) -> bool:
        return key in self.inventory

    def statistics(self) -> NodeStatistics:
        served, fetched = self.server.statistics(), self._fetch_totals
        return NodeStatistics(
            published_chunks=len(self.inventory),
            replica_chunks=len(self.replica),
            fetched_chunks=fetched.chunks,
            fetched_bytes=fetched.bytes,
            fetch_seconds=fetched.seconds,
            fetches=fetched.fetches,
            served_chunks=served.served_chunks,
            served_bytes=served.served_bytes,
            misses=dict(fetched.misses),
            prefill_tokens_per_s=self._prefill_tokens_per_s,
            sharing=self.sharing.value,
            pinned_chunks=self.operations.pinned_chunks,
            active_fetches=self._active_fetches,
            active_serves=served.connections,
        )

    def _prefault(self) -> None:
        """Map the pool's pages before the first fetch needs them; in a thread of its own, which pauses for others."""
        for _ in self._pool.prefault():
            if self._closing.wait(PREFAULT_PAUSE_S):
                return

    def _side(self) -> NodeSide:
        return NodeSide(
            listener=self,
            outbox=self.outbox,
            cluster_key=self._transports.cluster_key,
            hello=self._transports.hello,
            security=self._transports.security,
            on_follower=self.following.on_follower,
            known_addresses=self._known_addresses,
        )

    def _known_addresses(self) -> list[tuple[str, int]]:
        """Peers by id, from our own on: where everybody follows a few, each is followed by a few."""
        members = sorted((peer.member for peer in self.peers), key=lambda member: member.instance_id)
        later = [member for member in members if member.instance_id > self.instance_id]
        return [(member.peer_host, member.peer_port) for member in (*later, *members[: len(members) - len(later)])]

    # -- inside --------------------------------------------------------------------------------------------------------

    def _quarantine(self, instance_id: str, incarnation: str, key: ChunkKey) -> None:
        log.warning(
            "not asking for this chunk again key=%s instance=%s incarnation=%s; until it is announced anew",
            short(key),
            instance_id,
            incarnation,
        )
        self.asker.quarantine(instance_id, incarnation, key)
        self._applied(self.replica.quarantine(instance_id, incarnation, key))

    def _inventory_changed(self) -> None:
        self.following.changes_pending()
        if self._directory is not None:
            self._directory.changes_pending()

    def _applied(self, applied: Applied, *, lost_by: str = "", why: str = "evicted") -> bool:
        if lost_by:
            self.around.lost(applied.vanished, lost_by, why)
        if self.sharing is Sharing.ON and (applied.appeared or applied.vanished):
            self._listener.on_visible(applied.appeared, applied.vanished)
        if len(self.replica) > self.config.replica_max_chunks and self.config.index_mode == "auto" and not self._asks:
            asyncio.get_running_loop().call_soon(self._begin_to_ask)
        return not applied.gap

    def _begin_to_ask(self) -> None:
        """The replica has outgrown its limit: from now on the directory is asked for each request."""
        if self._asks or self._directory is None or self.config.directory == "static":
            return
        self._asks = True
        log.warning(
            "others hold %d chunks, more than replica_max_chunks: asking the directory from now on", len(self.replica)
        )
        self._directory.follow_inventories(False)
        self._applied(self.replica.clear_inventories())
        self._tell_directory()

    def _tell_rates(self) -> None:
        if self.config.gate_policy.is_on:
            self._listener.on_rates(self.peers.rates(self.replica))

    def _tell_directory(self) -> None:
        self._listener.on_directory(
            link.Directory(self._connected, self._ever_connected, len(self.peers), self.sharing, self._asks)
        )


async def _for_ever() -> None:
    await asyncio.Event().wait()
