"""One real directory client with its replica in a process of its own: what a directory costs a node."""

from __future__ import annotations

import asyncio
import multiprocessing
import random
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

import psutil

from kvmesh.bench.swarm import SwarmPlan, SwarmStatistics, make_format, percentile
from kvmesh.config import KVMeshConfig
from kvmesh.core.keys import ChunkKey
from kvmesh.core.replica import Replica
from kvmesh.directory.factory import NodeSide, make_directory
from kvmesh.directory.outbox import Outbox
from kvmesh.transfer.security import OPEN
from kvmesh.wire.directory import Answer, Ask, Changes, Member, NodeStatistics, Snapshot, UseReport
from kvmesh.wire.peer import Hello

KEYS_PER_QUESTION = 16
QUESTIONS_AT_ONCE = 16
ANSWER_S = 120.0
FIND_S = 30.0


@dataclass(kw_only=True)
class WitnessReport:
    """What the witness has seen and spent since the last report."""

    members: int = 0
    entries: int = 0
    rss_bytes: int = 0
    cpu_s: float = 0.0
    delays_s: list[float] = field(default_factory=list)
    questions: int = 0
    unanswered: int = 0
    question_seconds: list[float] = field(default_factory=list)


class Witness:
    """Handle of the witness's process."""

    def __init__(self, config: KVMeshConfig, plan: SwarmPlan) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_run, args=(config.to_wire(), plan, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def report(self) -> WitnessReport:
        """What has come since the last report."""
        return self._ask("report", [])

    def question(self, keys: Sequence[bytes], seconds: float, *, at_once: int = 1) -> WitnessReport:
        """Ask for 16 of `keys` at a time, one question after the other; `at_once` such rows of questions at a time."""
        return self._ask(f"{at_once} {seconds}", list(keys))

    def find(self, key: bytes) -> WitnessReport:
        """Ask for a chunk of a swarm until somebody holds it. How long that took since its key was made is the last of
        the report's delays.
        """
        return self._ask("find", [key])

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.join(10)

    def _ask(self, what: str, keys: list[bytes]) -> WitnessReport:
        self._pipe.send((what, keys))
        if not self._pipe.poll(ANSWER_S):
            raise TimeoutError("the witness does not answer")
        answer = self._pipe.recv()
        assert isinstance(answer, WitnessReport)
        return answer


def _run(config: bytes, plan: SwarmPlan, pipe: Connection) -> None:
    asyncio.run(_Node(KVMeshConfig.from_wire(config), plan).serve(pipe))


class _Node:
    """A node without pool and peers."""

    def __init__(self, config: KVMeshConfig, plan: SwarmPlan) -> None:
        kv_format = make_format(0, plan.chunk_bytes)
        self._member = Member(
            instance_id="witness",
            incarnation=secrets.token_hex(8),
            peer_host="127.0.0.1",
            peer_port=1,
            admin_port=0,
            transports=("tcp",),
            format=kv_format,
            slots=1,
            version="bench",
        )
        self._replica = Replica()
        self._heard = SwarmStatistics()
        self._process = psutil.Process()
        self._cpu_s = 0.0
        client = make_directory(
            config,
            NodeSide(
                listener=self,
                outbox=Outbox("witness", self._member.incarnation, self),
                cluster_key=None,
                hello=Hello.of("witness", self._member.incarnation, kv_format),
                security=OPEN,
                on_follower=lambda _: None,
                known_addresses=list,
            ),
        )
        assert client is not None
        self._client = client
        self._client.follow_inventories(config.index_mode != "query")

    async def serve(self, pipe: Connection) -> None:
        """Answer the parent until it ends us."""
        running = asyncio.create_task(self._client.run(self._member))
        loop = asyncio.get_running_loop()
        try:
            while True:
                what, keys = await loop.run_in_executor(None, pipe.recv)
                report = WitnessReport()
                if what == "find":
                    await self._find(keys[0])
                elif what != "report":
                    at_once, _, seconds = what.partition(" ")
                    rows = (self._question(report, keys, float(seconds)) for _ in range(int(at_once)))
                    await asyncio.gather(*rows)
                self._fill(report)
                pipe.send(report)
        except (EOFError, OSError):
            running.cancel()

    async def _question(self, report: WitnessReport, keys: list[bytes], seconds: float) -> None:
        until_s = time.monotonic() + seconds
        while (now_s := time.monotonic()) < until_s:
            start = random.randrange(max(1, len(keys) - KEYS_PER_QUESTION))
            found = await self._client.ask(keys[start : start + KEYS_PER_QUESTION])
            report.questions += 1
            report.unanswered += found is None
            report.question_seconds.append(time.monotonic() - now_s)

    async def _find(self, key: bytes) -> None:
        until_s = time.monotonic() + FIND_S
        while not await self._client.ask([key]) and time.monotonic() < until_s:
            await asyncio.sleep(0.001)
        self._heard.hear(key, time.monotonic_ns())

    def _fill(self, report: WitnessReport) -> None:
        known = self._replica.statistics()
        spent = self._process.cpu_times()
        report.members, report.entries = known.members, known.entries
        report.rss_bytes = self._process.memory_info().rss
        report.cpu_s, self._cpu_s = spent.user + spent.system - self._cpu_s, spent.user + spent.system
        report.delays_s, self._heard.delays_s = self._heard.delays_s, []

    # -- DirectoryListener, and an empty inventory ---------------------------------------------------------------------

    def on_connection(self, connected: bool) -> None:
        """Seen in what is heard."""

    def on_member_up(self, member: Member) -> None:
        if member.format.model_name == self._member.format.model_name:
            self._replica.member_up(member.instance_id, member.incarnation)

    def on_member_down(self, instance_id: str, incarnation: str, reason: str) -> None:
        del reason
        self._replica.member_down(instance_id, incarnation)

    def on_changes(self, changes: Changes) -> bool:
        now_ns = time.monotonic_ns()
        for key in changes.added:
            self._heard.hear(key, now_ns)
        return not self._replica.apply_changes(
            changes.instance_id, changes.incarnation, changes.sequence, changes.added, changes.removed
        ).gap

    def on_snapshot(self, part: Snapshot) -> bool:
        return not self._replica.apply_snapshot(
            part.instance_id, part.incarnation, part.sequence, part.keys, part.first, part.last
        ).gap

    def statistics(self) -> NodeStatistics:
        return NodeStatistics(replica_chunks=len(self._replica))

    def on_ask(self, ask: Ask, answer: Callable[[Answer], None]) -> None:
        """Nobody asks a witness."""

    def take_use_report(self, *, whole: bool) -> UseReport | None:
        del whole
        return None

    def take_changes(self, limit: int) -> tuple[list[ChunkKey], list[ChunkKey]]:
        del limit
        return [], []

    def keys(self) -> list[ChunkKey]:
        return []

    def __contains__(self, key: bytes) -> bool:
        return False


__all__ = ["Witness", "WitnessReport", "percentile"]
