"""What a node tells another one that follows it without any directory. This docstring is the specification.

On a greeted peer connection (`kvmesh.wire.peer`) the side that has connected sends `Follow`; from then on only the
other one speaks, in frames of at most FRAME_LIMIT_BYTES, with messages of `kvmesh.wire.directory`:

    follower                              followed
     |-- Follow(member) ----------------->|   the follower's own address, so that it can be followed in turn
     |<---------------------- MemberUp ---|   who is speaking: must be who has greeted
     |<---------------------- Snapshot ---|   its inventory, in parts
     |<----------- Changes | Heartbeat ---|   as they come; a Heartbeat when there was nothing to say for BEAT_S
     |<---------------------- Snapshot ---|   instead of Changes for a follower that is too far behind

Sequence numbers, incarnations and gaps are as with a controller; a follower with a gap connects anew. Either side
ends it by closing. Refused("full") means: too many follow already.
"""

from __future__ import annotations

import msgspec

from kvmesh.wire.directory import Changes, Heartbeat, Member, MemberUp, Snapshot

BEAT_S = 1.0
MAX_KEYS_PER_FRAME = 10_000
"""Keys of one Changes or Snapshot: under 800 kB."""

Told = MemberUp | Snapshot | Changes | Heartbeat
told_decoder: msgspec.msgpack.Decoder[Told] = msgspec.msgpack.Decoder(Told)

__all__ = ["BEAT_S", "MAX_KEYS_PER_FRAME", "Member", "Told", "told_decoder"]
