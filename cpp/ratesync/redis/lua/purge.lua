-- Rows that are over. KEYS: expiring, floors of a shard; rows. ARGV: ms that they have been over for, at most so
-- many. Without rows: answers with those that are. With rows: clears them away, and answers with how many it was;
-- a floor keeps the highest version that is gone from each bucket.
local cutoff = math.floor(now / 1000) - ARGV[1]
if #KEYS == 2 then
  return redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', cutoff, 'LIMIT', 0, ARGV[2])
end
local gone = 0
for i = 3, #KEYS do
  local row = KEYS[i]
  local m = redis.pcall('HGET', row, 'm')
  local version, expires, bucket
  if type(m) == 'string' then version, expires, bucket = string.match(m, '^(%d+) (%d+) %d %d %-?%d+ (%d+)$') end
  if not version then
    redis.call('ZREM', KEYS[1], row)
  elseif expires == '0' then
    redis.call('ZREM', KEYS[1], row)
  elseif tonumber(expires) <= cutoff then
    if tonumber(version) > tonumber(redis.call('HGET', KEYS[2], bucket) or 0) then
      redis.call('HSET', KEYS[2], bucket, version)
    end
    redis.call('UNLINK', row)
    redis.call('ZREM', KEYS[1], row)
    gone = gone + 1
  else
    redis.call('ZADD', KEYS[1], expires, row)
  end
end
return gone
