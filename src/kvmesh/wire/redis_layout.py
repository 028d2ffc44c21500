"""The directory kept in Redis or Valkey: names of keys and form of values. This docstring is the specification.

Every key begins with `kvmesh:CLUSTER:1:` (CLUSTER is the configuration's `cluster_name`, 1 the version of this
layout), so that several clusters, and other programs, share one Redis. Instances of one format are spread over SHARDS
shards by CRC-32 of their id; all keys of a shard have one hash tag, `{FORMAT.SHARD}`, and so lie on one master of a
Redis Cluster, where a script can change them in one step.

    kvmesh:CLUSTER:1:formats                     zset    format id -> last heartbeat of an instance with it (ms)
    kvmesh:CLUSTER:1:format:FORMAT               string  sealed Member, one example for those who wonder what differs
    kvmesh:CLUSTER:1:asked                       string  there are nodes that ask (index_mode: query); expires
    kvmesh:CLUSTER:1:reports                     stream  sealed FetchReports, for pages that watch
    kvmesh:CLUSTER:1:{FORMAT.SHARD}:epoch        string  random; another one: this shard was lost and began anew
    kvmesh:CLUSTER:1:{FORMAT.SHARD}:members      hash    instance id -> sealed Member
    kvmesh:CLUSTER:1:{FORMAT.SHARD}:state        hash    instance id -> "INCARNATION JOIN SEQUENCE READY ADDRESS"
    kvmesh:CLUSTER:1:{FORMAT.SHARD}:beats        zset    instance id -> its last heartbeat (ms, the server's clock)
    kvmesh:CLUSTER:1:{FORMAT.SHARD}:statistics   hash    instance id -> sealed NodeStatistics
    kvmesh:CLUSTER:1:{FORMAT.SHARD}:keys:ID      set     what the instance ID has published
    kvmesh:CLUSTER:1:{FORMAT.SHARD}:who          stream  up, ready, down: see below
    kvmesh:CLUSTER:1:{FORMAT.SHARD}:log          stream  d = sealed Changes
    kvmesh:CLUSTER:1:k:FORMAT:KEY                hash    instance id -> incarnation: holders of one chunk, only while
                                                         somebody asks

Numbers are as in `kvmesh.wire.directory`: a publisher numbers its Changes; its set is its inventory after SEQUENCE.
JOIN is another number for each upload of a set, so that nobody takes two halves of different uploads for a whole.

    t=u d=MEMBER             an instance has joined (or joined again)
    t=s i=ID n=INC q=SEQ     its set is whole and can be read
    t=d i=ID n=INC r=REASON  it has left, or its heartbeats have stopped

Publisher: `join`, `upload` its keys in parts, `ready`; then `publish` (set, sequence and log in one step) and `beat`. A
beat is told when the directory does not know the instance (lost, or taken for dead) or has another number of its
changes or keys than the instance itself: it then joins again under the same incarnation, which costs the others nothing
if they have the same sequence number. Whoever beats also looks for others whose beats have stopped.

Follower: notes the ends of both streams, reads `state` and `members`, reads the set of everybody who is ready, then
follows the streams. A set is read in pieces while it changes; that is sound, because the sequence number is read
first and all Changes after it are applied again on top (additions and removals can be repeated). Every now and then it
compares `state` with what it has: whatever was missed (a trimmed stream, a lost master) is found there.

Everything expires: shared keys SHARED_TTL_S after the last heartbeat, sets after three instance time-outs. Streams
are trimmed to MAX_LOG_ENTRIES of at most KEYS_PER_ENTRY keys each.

What comes out of Redis is not trusted: values are decoded as strictly as frames, have limits, and with a cluster key
they carry a MAC (`seal`). Sets and sequence numbers are not under MACs: who can write to this Redis can make nodes ask
for chunks in vain, or know of none; it cannot make them take wrong bytes, because the holder decides.
"""

from __future__ import annotations

import hmac
import re
import zlib
from collections.abc import Sequence
from hashlib import blake2b
from typing import Final, NamedTuple, TypeVar

import msgspec

from kvmesh.core.keys import KEY_MAX_BYTES, KEY_MIN_BYTES, ChunkKey
from kvmesh.wire.auth import MAC_BYTES, ClusterKey

LAYOUT_VERSION: Final = 1
SHARDS: Final = 8
KEYS_PER_ENTRY: Final = 256
"""Keys of one Changes in the log."""
MAX_LOG_ENTRIES: Final = 4096
"""Entries kept per shard: at most 40 MB, usually some hundred kB. A follower that is further behind reads sets."""
SHARED_TTL_S: Final = 600
MAX_VALUE_BYTES: Final = 1 << 20
"""No value of ours is longer; what is, is not decoded."""
MAX_ID_BYTES: Final = 256

_T = TypeVar("_T")
_STATE = re.compile(rb"([0-9a-f]{16}) (\d{1,19}) (\d{1,16}) ([01]) ([\x21-\x7e]{1,300})")
_INCARNATION = re.compile(rb"[0-9a-f]{16}")
_FORMAT = re.compile(rb"[0-9a-f]{32}")
_PLAIN, _SEALED = b"\x00", b"\x01"


class RedisValueError(ValueError):
    """A value in Redis is not one of ours."""


class ShardKeys(NamedTuple):
    """Names of the keys of one shard."""

    epoch: str
    members: str
    state: str
    beats: str
    statistics: str
    who: str
    log: str
    set_prefix: str

    def published(self, instance_id: str) -> str:
        """The set of what an instance of this shard has published."""
        return self.set_prefix + instance_id


class Layout:
    """Names of all keys of one cluster."""

    def __init__(self, cluster_name: str) -> None:
        self._prefix = f"kvmesh:{cluster_name}:{LAYOUT_VERSION}:"
        self.formats = f"{self._prefix}formats"
        self.asked = f"{self._prefix}asked"
        self.reports = f"{self._prefix}reports"

    def example(self, format_id: str) -> str:
        """The key of one Member with this format."""
        return f"{self._prefix}format:{format_id}"

    def shards(self, format_id: str) -> list[ShardKeys]:
        """All shards of a format."""
        return [self._shard(format_id, number) for number in range(SHARDS)]

    def shard_of(self, format_id: str, instance_id: str) -> ShardKeys:
        """The shard in which an instance is."""
        return self._shard(format_id, zlib.crc32(instance_id.encode()) % SHARDS)

    def holders(self, format_id: str, key: bytes) -> bytes:
        """The key of the holders of one chunk."""
        return f"{self._prefix}k:{format_id}:".encode() + key

    def _shard(self, format_id: str, number: int) -> ShardKeys:
        prefix = f"{self._prefix}{{{format_id}.{number}}}:"
        names = ("epoch", "members", "state", "beats", "statistics", "who", "log", "keys:")
        return ShardKeys(*(prefix + name for name in names))


class State(NamedTuple):
    """What the directory says of one instance."""

    incarnation: str
    join: int
    sequence: int
    is_ready: bool
    """Its set is whole."""
    address: str


def parse_state(value: bytes) -> State:
    """Raises RedisValueError."""
    found = _STATE.fullmatch(value)
    if found is None:
        raise RedisValueError(f"no state: {value[:80]!r}")
    incarnation, join, sequence, ready, address = found.groups()
    return State(incarnation.decode(), int(join), int(sequence), ready == b"1", address.decode())


def parse_id(value: bytes) -> str:
    """An instance id. Raises RedisValueError."""
    if not 1 <= len(value) <= MAX_ID_BYTES:
        raise RedisValueError(f"instance id of {len(value)} bytes")
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise RedisValueError("instance id is not UTF-8") from None


def parse_incarnation(value: bytes) -> str:
    """Raises RedisValueError."""
    if not _INCARNATION.fullmatch(value):
        raise RedisValueError(f"no incarnation: {value[:80]!r}")
    return value.decode()


def parse_format_id(value: bytes) -> str:
    """Raises RedisValueError."""
    if not _FORMAT.fullmatch(value):
        raise RedisValueError(f"no format id: {value[:80]!r}")
    return value.decode()


def parse_number(value: bytes) -> int:
    """A sequence number. Raises RedisValueError."""
    if not (value.isdigit() and len(value) <= 16):
        raise RedisValueError(f"no number: {value[:80]!r}")
    return int(value)


def parse_keys(values: Sequence[object]) -> list[ChunkKey]:
    """Members of a published set. Raises RedisValueError when one of them is no chunk key."""
    keys = []
    for value in values:
        if not isinstance(value, bytes) or not KEY_MIN_BYTES <= len(value) <= KEY_MAX_BYTES:
            raise RedisValueError("a published set has something that is no chunk key")
        keys.append(ChunkKey(value))
    return keys


class Sealer:
    """Puts a MAC on what goes into Redis and checks it on what comes out. Without a key: no MACs on either."""

    def __init__(self, cluster_name: str, key: ClusterKey | None) -> None:
        secret = None if key is None else key.derive("redis directory")
        self._keyed = None
        if secret is not None:
            self._keyed = blake2b(cluster_name.encode() + b"\x00", key=secret, digest_size=MAC_BYTES)

    def seal(self, payload: bytes) -> bytes:
        """A payload as it is stored."""
        return _PLAIN + payload if self._keyed is None else _SEALED + self._mac(payload) + payload

    def open(self, value: object, decoder: msgspec.msgpack.Decoder[_T]) -> _T:
        """The message in a stored value. Raises RedisValueError: too long, not ours, sealed with another key or with
        none.
        """
        if not isinstance(value, bytes) or not 0 < len(value) <= MAX_VALUE_BYTES:
            raise RedisValueError("a value is missing or too long")
        payload = value[1:]
        if self._keyed is not None:
            if value[:1] != _SEALED:
                raise RedisValueError("a value has no MAC: an instance without the cluster key writes to this Redis")
            mac, payload = payload[:MAC_BYTES], payload[MAC_BYTES:]
            if not hmac.compare_digest(self._mac(payload), mac):
                raise RedisValueError("a value has another MAC: an instance with another cluster key writes here")
        elif value[:1] == _SEALED:
            raise RedisValueError("a value has a MAC: other instances have a cluster key, this one has none")
        elif value[:1] != _PLAIN:
            raise RedisValueError("a value is not one of ours")
        try:
            return decoder.decode(payload)
        except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
            raise RedisValueError(f"a value is malformed: {error}") from None

    def _mac(self, payload: bytes) -> bytes:
        assert self._keyed is not None
        keyed = self._keyed.copy()
        keyed.update(payload)
        return keyed.digest()
