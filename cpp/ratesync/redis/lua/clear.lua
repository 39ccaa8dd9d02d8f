-- Clears rows away that were over at `cutoff` (ms), at most `most` of a shard's, oldest first, and keeps the
-- highest version that is gone from each bucket as its floor. How many entries of the index it looked at, and how
-- many rows it cleared away. Their names come from the index: all of them are in the slot of its key.
-- On a server that is full only what frees memory may come first; then it lets the rest of the script write.
local function clear(expiring, floors, cutoff, most)
  local call, try = redis.call, redis.pcall
  local rows = call('ZRANGEBYSCORE', expiring, '-inf', string.format('%.0f', cutoff), 'LIMIT', 0, most)
  if #rows == 0 then return 0, 0 end
  local buckets, highest, gone, later = {}, {}, {}, {}
  local entries = 0
  for i, row in ipairs(rows) do
    local m = try('HGET', row, 'm')
    local version, expires, bucket
    if type(m) == 'table' then
      -- While its slot moves, it may lie on the other node.
      if not string.find(m.err, 'WRONGTYPE', 1, true) then break end
    elseif m then
      version, expires, bucket = string.match(m, '^(%d+) (%d+) %d %d %-?%d+ (%d+)$')
    end
    entries = i
    if version and expires ~= '0' then
      if tonumber(expires) <= cutoff then
        gone[#gone + 1] = row
        local known = highest[bucket]
        if not known then buckets[#buckets + 1] = bucket end
        if not known or tonumber(version) > tonumber(known) then highest[bucket] = version end
      else
        later[#later + 1], later[#later + 2] = expires, row
      end
    end
  end
  if entries == 0 then return 0, 0 end
  local raised = {}
  if #buckets > 0 then
    for i, floor in ipairs(call('HMGET', floors, unpack(buckets))) do
      local bucket = buckets[i]
      if tonumber(highest[bucket]) > tonumber(floor or 0) then
        raised[#raised + 1], raised[#raised + 2] = bucket, highest[bucket]
      end
    end
  end
  call('ZREM', expiring, unpack(rows, 1, entries))
  if #raised > 0 then call('HSET', floors, unpack(raised)) end
  if #gone > 0 then call('UNLINK', unpack(gone)) end
  if #later > 0 then call('ZADD', expiring, unpack(later)) end
  return entries, #gone
end
