"""A swarm's link to a Redis directory: the instances of one process share one connection and publish as nodes do.

They do not follow each other: what following costs is measured with real nodes (`kvmesh.bench.directory`).
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha1
from typing import Any

import msgspec
import redis

from kvmesh.bench.swarm import SimulatedInstance, SwarmPlan, SwarmStatistics
from kvmesh.config.redis_url import parse_redis_target
from kvmesh.directory.redis_index import INDEX_TTL_S
from kvmesh.directory.redis_publisher import UPLOAD_KEYS
from kvmesh.directory.redis_scripts import BEAT, JOIN, PUBLISH, READY, UPLOAD, Script
from kvmesh.wire import directory as wire
from kvmesh.wire.redis_layout import MAX_LOG_ENTRIES, Layout, Sealer, ShardKeys

SHARED_TTL_MS = 3_600_000
_encoder = msgspec.msgpack.Encoder()


@dataclass(frozen=True)
class RedisPlace:
    """Where Redis is, and whether the chunks are to be indexed for those who ask."""

    url: str
    cluster_name: str
    with_index: bool


@dataclass(slots=True)
class _Session:
    format_id: str
    keys: ShardKeys
    set_key: str


class SwarmRedisLink:
    """See `kvmesh.bench.swarm.Link`."""

    def __init__(self, place: RedisPlace, plan: SwarmPlan) -> None:
        self.statistics = SwarmStatistics()
        self._plan = plan
        self._place = place
        self._layout = Layout(place.cluster_name)
        self._sealer = Sealer(place.cluster_name, None)
        host, port = parse_redis_target(place.url).hosts[0]
        self._client: Any = redis.Redis(host=host, port=port, socket_timeout=60, protocol=2)
        self._digests = {
            script.name: sha1(script.source.encode(), usedforsecurity=False).hexdigest()
            for script in (JOIN, UPLOAD, READY, PUBLISH, BEAT)
        }
        self._pipeline: Any = self._client.pipeline(transaction=False)
        self._load_scripts()

    def join(self, instance: SimulatedInstance) -> None:
        self.flush()
        self._join(instance)
        self.statistics.joined += 1

    def publish(self, instance: SimulatedInstance, added: bytes, removed: bytes) -> None:
        session, member = _session(instance), instance.member
        gone = [removed] if removed else []
        changes = wire.Changes(member.instance_id, member.incarnation, instance.sequence, [added], gone)
        sealed = self._sealer.seal(wire.encode(changes))
        keys = (session.keys.state, session.keys.log, session.set_key)
        who = (member.instance_id, member.incarnation)
        self._call(
            PUBLISH, keys, (*who, instance.sequence, SHARED_TTL_MS, MAX_LOG_ENTRIES, sealed, len(gone), *gone, added)
        )
        if self._place.with_index:
            self._index(session, instance, [added], gone)

    def beat(self, instance: SimulatedInstance) -> None:
        self.flush()
        session, member, keys = _session(instance), instance.member, _session(instance).keys
        statistics = self._sealer.seal(_encoder.encode(wire.NodeStatistics(published_chunks=len(instance.inventory))))
        shared = (keys.epoch, keys.members, keys.state, keys.beats, keys.who, keys.log, keys.statistics)
        answer = self._now(
            BEAT,
            (*shared, session.set_key),
            (
                *(member.instance_id, member.incarnation, instance.sequence, len(instance.inventory)),
                *(SHARED_TTL_MS, SHARED_TTL_MS, statistics),
            ),
        )
        if answer is not None and answer[0] != 1:
            self.statistics.resyncs += 1
            self._join(instance)

    def poll(self, timeout_s: float) -> None:
        started_s = time.monotonic()
        self.flush()
        rest_s = timeout_s - (time.monotonic() - started_s)
        if rest_s > 0:
            time.sleep(rest_s)

    def flush(self) -> None:
        """Send what has gathered."""
        pipeline, self._pipeline = self._pipeline, self._client.pipeline(transaction=False)
        if len(pipeline):
            try:
                answers = pipeline.execute(raise_on_error=False)
            except redis.RedisError:  # it is being restarted; the next heartbeat heals it
                self._load_scripts()
                return
            self.statistics.notices += len(answers)
            if any(isinstance(answer, redis.exceptions.NoScriptError) for answer in answers):
                self._load_scripts()  # what was lost heals with the next heartbeat

    def close(self) -> None:
        self._client.close()

    # -- inside --------------------------------------------------------------------------------------------------------

    def _join(self, instance: SimulatedInstance) -> None:
        member, format_id = instance.member, instance.member.format.format_id()
        keys = self._layout.shard_of(format_id, member.instance_id)
        instance.session = session = _Session(format_id, keys, keys.published(member.instance_id))
        who = (member.instance_id, member.incarnation)
        sealed = self._sealer.seal(_encoder.encode(member))
        answer = self._now(
            JOIN,
            (keys.epoch, keys.members, keys.state, keys.beats, keys.who, session.set_key),
            (
                *who,
                member.peer_address,
                sealed,
                instance.sequence,
                1,
                SHARED_TTL_MS,
                secrets.token_hex(8),
                MAX_LOG_ENTRIES,
            ),
        )
        if answer is None or answer[0] != 1:
            self.statistics.refused += 1
            return
        inventory = list(instance.inventory)
        for start in range(0, len(inventory), UPLOAD_KEYS):
            part = inventory[start : start + UPLOAD_KEYS]
            self._call(UPLOAD, (keys.state, session.set_key), (*who, answer[1], SHARED_TTL_MS, *part))
        self._call(READY, (keys.state, keys.who, keys.log), (*who, answer[1], instance.sequence, MAX_LOG_ENTRIES))
        if self._place.with_index:
            self._index(session, instance, inventory, [])
        self.flush()

    def _index(
        self, session: _Session, instance: SimulatedInstance, added: Sequence[bytes], removed: Sequence[bytes]
    ) -> None:
        member = instance.member
        for key in removed:
            self._pipeline.execute_command("HDEL", self._layout.holders(session.format_id, key), member.instance_id)
        for key in added:
            name = self._layout.holders(session.format_id, key)
            self._pipeline.execute_command("HSET", name, member.instance_id, member.incarnation)
            self._pipeline.execute_command("EXPIRE", name, INDEX_TTL_S)

    def _call(self, script: Script, keys: Sequence[str], arguments: Sequence[object]) -> None:
        self._pipeline.execute_command("EVALSHA", self._digests[script.name], len(keys), *keys, *arguments)

    def _now(self, script: Script, keys: Sequence[str], arguments: Sequence[object]) -> list[Any] | None:
        try:
            answer: list[Any] = self._client.execute_command(
                "EVALSHA", self._digests[script.name], len(keys), *keys, *arguments
            )
        except redis.RedisError:
            self._load_scripts()
            return None
        return answer

    def _load_scripts(self) -> None:
        try:
            for script in (JOIN, UPLOAD, READY, PUBLISH, BEAT):
                self._client.execute_command("SCRIPT LOAD", script.source)
        except redis.RedisError:
            return


def _session(instance: SimulatedInstance) -> _Session:
    assert isinstance(instance.session, _Session)
    return instance.session
