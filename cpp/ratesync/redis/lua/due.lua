-- Timeouts that fell due. ARGV[1] 'look': KEYS: timeouts of each shard. ARGV: at most so many, members begin so.
-- Answers with shard, member, since when (ms), the oldest of each shard first.
-- ARGV[1] 'claim': KEYS: timeouts, claims and tokens of each shard. ARGV: ms after which they fall due again, then
-- shard and member of each. Answers with its place, when it was due first, claim, of each that nobody else claimed.
local now_ms = math.floor(now / 1000)
local out = {}
if ARGV[1] == 'look' then
  local limit, begin = tonumber(ARGV[2]), ARGV[3]
  local PAGE, MOST = math.max(limit, 100), 5000
  for shard, key in ipairs(KEYS) do
    local found, offset = 0, 0
    while found < limit and offset < MOST do
      local page = redis.call('ZRANGEBYSCORE', key, '-inf', now_ms, 'WITHSCORES', 'LIMIT', offset, PAGE)
      for i = 1, #page, 2 do
        if found < limit and string.sub(page[i], 1, #begin) == begin then
          out[#out + 1], out[#out + 2], out[#out + 3] = shard, page[i], tonumber(page[i + 1])
          found = found + 1
        end
      end
      if #page < 2 * PAGE then break end
      offset = offset + PAGE
    end
  end
  return out
end
local lease = tonumber(ARGV[2])
for i = 3, #ARGV, 2 do
  local at, member = 3 * tonumber(ARGV[i]), ARGV[i + 1]
  local timeouts, claims, tokens = KEYS[at + 1], KEYS[at + 2], KEYS[at + 3]
  local score = redis.call('ZSCORE', timeouts, member)
  if score and tonumber(score) <= now_ms then
    local due = string.match(redis.call('HGET', claims, member) or '', '^%-?%d+') or score
    local claim = text(math.max(tonumber(redis.call('GET', tokens) or 0) + 1, now))
    redis.call('HSET', claims, member, due .. ' ' .. claim)
    redis.call('ZADD', timeouts, now_ms + lease, member)
    redis.call('SET', tokens, claim)
    out[#out + 1], out[#out + 2], out[#out + 3] = (i - 3) / 2, tonumber(due), tonumber(claim)
  end
end
return out
