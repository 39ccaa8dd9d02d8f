-- Clears rows away that were over at `cutoff` (ms), at most `most` of a shard's, oldest first, and keeps the
-- highest version that is gone from each bucket as its floor. How many entries of the index it looked at, and how
-- many rows it cleared away. Their names come from the index: all of them are in the slot of its key.
-- On a server that is full only what frees memory may come first; then it lets the rest of the script write.
local function clear(expiring, floors, cutoff, most)
  local call, pcall = redis.call, redis.pcall
  local rows = call('ZRANGEBYSCORE', expiring, '-inf', string.format('%.0f', cutoff), 'LIMIT', 0, most)
  local highest, gone, entries, later = {}, {}, {}, {}
  for i, row in ipairs(rows) do
    local m = pcall('HGET', row, 'm')
    local version, expires, bucket
    if type(m) == 'table' then
      -- While its slot moves, it may lie on the other node.
      if not string.find(m.err, 'WRONGTYPE', 1, true) then break end
    elseif m then
      version, expires, bucket = string.match(m, '^(%d+) (%d+) %d %d %-?%d+ (%d+)$')
    end
    entries[#entries + 1] = row
    if version and expires ~= '0' then
      if tonumber(expires) <= cutoff then
        gone[#gone + 1] = row
        version = tonumber(version)
        if version > (highest[bucket] or 0) then highest[bucket] = version end
      else
        later[#later + 1], later[#later + 2] = expires, row
      end
    end
  end
  if #entries == 0 then return 0, 0 end
  local raised = {}
  for bucket, version in pairs(highest) do
    if version > tonumber(call('HGET', floors, bucket) or 0) then
      raised[#raised + 1], raised[#raised + 2] = bucket, string.format('%.0f', version)
    end
  end
  call('ZREM', expiring, unpack(entries))
  if #raised > 0 then call('HSET', floors, unpack(raised)) end
  if #gone > 0 then call('UNLINK', unpack(gone)) end
  if #later > 0 then call('ZADD', expiring, unpack(later)) end
  return #entries, #gone
end
