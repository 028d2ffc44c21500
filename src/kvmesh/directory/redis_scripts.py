"""What the Redis server does in one step: Lua scripts over the keys of one shard (`kvmesh.wire.redis_layout`).

Two rules hold for all of them. When the server's memory is full it refuses commands that need more, but only as the
first write of a script: so what may be refused stands first (`publish` is then refused as a whole), and what must not
be refused comes after a write that is always allowed (`beat`: a full Redis must not look like the death of everybody).
And time is the server's own, so that nobody's clock matters.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from kvmesh.wire.redis_layout import SHARED_TTL_S

_COMMON: Final = (
    f"local SHARED_TTL_MS = {SHARED_TTL_S * 1000}"
    """
local function now_ms()
  local time = redis.call('TIME')
  return tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end
local function text(number) return string.format('%.0f', number) end
local function parse(state)
  if not state then return nil end
  local inc, join, seq, ready, address = string.match(state, '^(%x+) (%d+) (%d+) (%d) (.+)$')
  if not inc then return nil end
  return {inc = inc, join = join, seq = tonumber(seq), ready = ready, address = address}
end
local function put(key, id, state)
  redis.call('HSET', key, id, table.concat({state.inc, state.join, text(state.seq), state.ready, state.address}, ' '))
end
local function append(stream, max_entries, ...)
  redis.call('XADD', stream, 'MAXLEN', '~', max_entries, '*', ...)
  if redis.call('PTTL', stream) == -1 then redis.call('PEXPIRE', stream, SHARED_TTL_MS) end
end
local function in_parts(command, key, first, last)
  for start = first, last, 1000 do
    redis.call(command, key, unpack(ARGV, start, math.min(start + 999, last)))
  end
end
"""
)


class Script(NamedTuple):
    """One script, by name for messages."""

    name: str
    source: str


OK: Final = 1
UNKNOWN: Final = 0
"""The directory does not know this life of the instance: join again."""
TAKEN: Final = -1
"""Another life has the instance's id; its address follows."""
DIFFERENT: Final = 2
"""The directory's numbers are not the instance's: join again."""

JOIN = Script(
    "join",
    _COMMON
    + """
-- KEYS epoch members state beats who keys:ID
-- ARGV id incarnation address member sequence silent_ms shared_ttl_ms new_epoch max_entries
local id, now = ARGV[1], now_ms()
local known = parse(redis.call('HGET', KEYS[3], id))
local beat = redis.call('ZSCORE', KEYS[4], id)
local is_alive = beat and now - tonumber(beat) < tonumber(ARGV[6])
if known and known.inc ~= ARGV[2] and known.address ~= ARGV[3] and is_alive then
  return {-1, known.address}
end
local join = now
if known and tonumber(known.join) >= join then join = tonumber(known.join) + 1 end
append(KEYS[5], ARGV[9], 't', 'u', 'd', ARGV[4])
redis.call('SET', KEYS[1], ARGV[8], 'NX')
redis.call('UNLINK', KEYS[6])
redis.call('HSET', KEYS[2], id, ARGV[4])
redis.call('ZADD', KEYS[4], text(now), id)
put(KEYS[3], id, {inc = ARGV[2], join = text(join), seq = tonumber(ARGV[5]), ready = '0', address = ARGV[3]})
for index = 1, 5 do redis.call('PEXPIRE', KEYS[index], ARGV[7]) end
return {1, text(join)}
""",
)

UPLOAD = Script(
    "upload",
    _COMMON
    + """
-- KEYS state keys:ID
-- ARGV id incarnation join set_ttl_ms key...
local known = parse(redis.call('HGET', KEYS[1], ARGV[1]))
if not known or known.inc ~= ARGV[2] or known.join ~= ARGV[3] then return 0 end
in_parts('SADD', KEYS[2], 5, #ARGV)
redis.call('PEXPIRE', KEYS[2], ARGV[4])
return 1
""",
)

READY = Script(
    "ready",
    _COMMON
    + """
-- KEYS state who log
-- ARGV id incarnation join sequence max_entries change...
local known = parse(redis.call('HGET', KEYS[1], ARGV[1]))
if not known or known.inc ~= ARGV[2] or known.join ~= ARGV[3] then return 0 end
append(KEYS[2], ARGV[5], 't', 's', 'i', ARGV[1], 'n', ARGV[2], 'q', ARGV[4])
for index = 6, #ARGV do append(KEYS[3], ARGV[5], 'd', ARGV[index]) end
known.seq, known.ready = tonumber(ARGV[4]), '1'
put(KEYS[1], ARGV[1], known)
return 1
""",
)

PUBLISH = Script(
    "publish",
    _COMMON
    + """
-- KEYS state log keys:ID
-- ARGV id incarnation sequence set_ttl_ms max_entries change removed_count key...
local known = parse(redis.call('HGET', KEYS[1], ARGV[1]))
if not known then return {0} end
if known.inc ~= ARGV[2] then return {-1} end
local sequence, removed = tonumber(ARGV[3]), tonumber(ARGV[7])
if sequence <= known.seq then return {1, redis.call('SCARD', KEYS[3])} end
if sequence ~= known.seq + 1 or known.ready ~= '1' then return {2} end
-- What takes no more room than it gives back is not refused: evictions are told also when the memory is full.
if removed >= #ARGV - 7 - removed then redis.call('PEXPIRE', KEYS[3], ARGV[4]) end
append(KEYS[2], ARGV[5], 'd', ARGV[6])
in_parts('SREM', KEYS[3], 8, 7 + removed)
in_parts('SADD', KEYS[3], 8 + removed, #ARGV)
redis.call('PEXPIRE', KEYS[3], ARGV[4])
known.seq = sequence
put(KEYS[1], ARGV[1], known)
return {1, redis.call('SCARD', KEYS[3])}
""",
)

BEAT = Script(
    "beat",
    _COMMON
    + """
-- KEYS epoch members state beats who log statistics keys:ID
-- ARGV id incarnation sequence key_count shared_ttl_ms set_ttl_ms statistics
local known = parse(redis.call('HGET', KEYS[3], ARGV[1]))
if not known then return {0} end
if known.inc ~= ARGV[2] then return {-1, known.address} end
redis.call('PEXPIRE', KEYS[3], ARGV[5])
redis.call('ZADD', KEYS[4], text(now_ms()), ARGV[1])
redis.call('HSET', KEYS[7], ARGV[1], ARGV[7])
for index = 1, 7 do redis.call('PEXPIRE', KEYS[index], ARGV[5]) end
redis.call('PEXPIRE', KEYS[8], ARGV[6])
if known.ready ~= '1' or known.seq ~= tonumber(ARGV[3]) or redis.call('SCARD', KEYS[8]) ~= tonumber(ARGV[4])
   or redis.call('EXISTS', KEYS[1], KEYS[2]) ~= 2 then
  return {2}
end
return {1}
""",
)

REAP = Script(
    "reap",
    _COMMON
    + """
-- KEYS members state beats who statistics
-- ARGV timeout_ms max_entries
local dead = {}
local late = redis.call('ZRANGEBYSCORE', KEYS[3], '-inf', text(now_ms() - tonumber(ARGV[1])), 'LIMIT', 0, 16)
for _, id in ipairs(late) do
  local known = parse(redis.call('HGET', KEYS[2], id))
  redis.call('ZREM', KEYS[3], id)
  redis.call('HDEL', KEYS[1], id)
  redis.call('HDEL', KEYS[2], id)
  redis.call('HDEL', KEYS[5], id)
  if known then
    append(KEYS[4], ARGV[2], 't', 'd', 'i', id, 'n', known.inc, 'r', 'timeout')
    dead[#dead + 1] = id
    dead[#dead + 1] = known.inc
  end
end
return dead
""",
)

LEAVE = Script(
    "leave",
    _COMMON
    + """
-- KEYS members state beats who statistics keys:ID
-- ARGV id incarnation max_entries
local known = parse(redis.call('HGET', KEYS[2], ARGV[1]))
if not known or known.inc ~= ARGV[2] then return 0 end
redis.call('UNLINK', KEYS[6])
redis.call('ZREM', KEYS[3], ARGV[1])
redis.call('HDEL', KEYS[1], ARGV[1])
redis.call('HDEL', KEYS[2], ARGV[1])
redis.call('HDEL', KEYS[5], ARGV[1])
append(KEYS[4], ARGV[3], 't', 'd', 'i', ARGV[1], 'n', ARGV[2], 'r', 'left')
return 1
""",
)

CENSUS = Script(
    "census",
    _COMMON
    + """
-- KEYS formats
-- ARGV format_id ttl_ms
local now = now_ms()
redis.call('PEXPIRE', KEYS[1], ARGV[2])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', text(now - tonumber(ARGV[2])))
if ARGV[1] ~= '' then
  redis.call('ZADD', KEYS[1], text(now), ARGV[1])
  redis.call('PEXPIRE', KEYS[1], ARGV[2])
end
return redis.call('ZRANGE', KEYS[1], -256, -1)
""",
)
"""Says that the format is in use, and which ones are."""
