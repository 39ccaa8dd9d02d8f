-- sliding_window: the exact log, a sorted set. An entry's member is its time, its score the number of
-- units dealt up to and with it. Before them stands 's' with the units that left the window, and before
-- that, where settle() took units off, 'd' with minus their number: the total counts those still.
local log = {}

function log.load(g)
  local s = {base = now, taken = 0, was = now}
  local gone = now - g.window
  local rank, more = 0, true
  while more do
    local page = redis.call('ZRANGE', g.key, rank, rank + 31, 'WITHSCORES')
    more = #page == 64
    rank = rank + 32
    for i = 1, #page, 2 do
      local member, score = page[i], tonumber(page[i + 1])
      if member == 'd' then
        s.taken = -score
      elseif member == 's' then
        s.base, s.was = score, score
      elseif tonumber(member) <= gone then
        s.base = score
      else
        more = false
        break
      end
    end
  end
  local newest = redis.call('ZRANGE', g.key, -1, -1, 'WITHSCORES')
  s.upto = math.max(tonumber(newest[2] or 0), s.base)
  s.last = s.upto > s.base and tonumber(newest[1]) or 0
  s.stored = s.upto -- in the set; what lies behind is the newest entry, kept here until save() or the next
  s.total = s.upto + s.taken
  return s
end

-- The time of the entry with the unit of that number.
local function log_time(g, s, unit)
  if unit > s.stored then return s.last end
  if not (s.edge and s.edge_from <= unit and unit <= s.edge_upto) then
    local found = redis.call('ZRANGEBYSCORE', g.key, unit, '+inf', 'WITHSCORES', 'LIMIT', 0, 1)
    s.edge, s.edge_from, s.edge_upto = tonumber(found[1]), unit, tonumber(found[2])
  end
  return s.edge
end

local function log_put(g, s)
  if s.upto > s.stored then redis.call('ZADD', g.key, s.upto, text(s.last)) end
  s.stored = s.upto
end

local function log_append(g, s, at, units)
  if at ~= s.last then
    log_put(g, s)
    s.last = at
  end
  s.upto = s.upto + units
  s.total = s.total + units
end

function log.look(g, s, cost)
  local slot = math.max(now, s.last)
  local bound = s.upto + cost - g.limit
  if bound > s.base then slot = math.max(slot, log_time(g, s, bound) + g.window) end
  return slot - now, slot
end

function log.take(g, s, cost, slot)
  log_append(g, s, slot, cost)
end

function log.available(g, s)
  return math.max(0, g.limit - (s.upto - s.base))
end

function log.full_after(g, s)
  return math.max(0, s.last + g.window - now)
end

-- Cuts the log down to so many units.
local function log_cut(g, s, upto)
  local cut = redis.call('ZRANGEBYSCORE', g.key, '(' .. text(upto), '+inf', 'WITHSCORES', 'LIMIT', 0, 1)
  redis.call('ZREMRANGEBYSCORE', g.key, '(' .. text(upto), '+inf')
  local before = redis.call('ZREVRANGEBYSCORE', g.key, upto, s.base, 'WITHSCORES', 'LIMIT', 0, 1)
  if cut[1] and tonumber(before[2] or s.base) < upto then redis.call('ZADD', g.key, upto, cut[1]) end
end

function log.refund(g, s, cost)
  log_put(g, s)
  s.total = s.total - cost
  s.upto = math.max(s.upto - cost, s.base)
  if s.upto == s.base then -- nothing counts: the numbers may begin anew
    redis.call('DEL', g.key)
    s.base, s.upto, s.last, s.taken = s.total, s.total, 0, 0
    s.was = s.base
  else
    log_cut(g, s, s.upto)
    s.last = tonumber(redis.call('ZRANGE', g.key, -1, -1)[1])
  end
  s.stored, s.edge = s.upto, nil
end

-- Takes units off the newest entries that are not ahead; those ahead belong to callers who still sleep.
local function log_give_back(g, s, units)
  local seen, taken, at = {}, 0, 0
  repeat -- newest first; an entry's units begin where the one before it ends
    local page = redis.call('ZREVRANGEBYSCORE', g.key, '+inf', '(' .. text(s.base), 'WITHSCORES', 'LIMIT', at, 33)
    for i = 1, math.min(#page, 64), 2 do
      local upto, some = tonumber(page[i + 1]), 0
      local held = upto - (tonumber(page[i + 3]) or s.base)
      if tonumber(page[i]) <= now then some = math.min(units - taken, held) end
      taken = taken + some
      table.insert(seen, {at = page[i], upto = upto, left = held - some, newer = taken - some})
      if taken == units then break end
    end
    at = at + 32
  until #page < 66 or taken == units
  for _, entry in ipairs(seen) do
    if entry.left == 0 then
      redis.call('ZREM', g.key, entry.at)
    else -- what was taken of itself and of older entries
      redis.call('ZADD', g.key, entry.upto - (taken - entry.newer), entry.at)
    end
  end
  s.upto, s.taken = s.upto - taken, s.taken + taken
  local newest = redis.call('ZREVRANGEBYSCORE', g.key, '+inf', '(' .. text(s.base), 'LIMIT', 0, 1)
  s.last = tonumber(newest[1] or 0)
  s.stored, s.edge = s.upto, nil
end

function log.settle(g, s, delta)
  if delta > 0 then
    log_append(g, s, math.max(now, s.last), delta)
  else
    log_put(g, s)
    log_give_back(g, s, -delta)
  end
end

function log.save(g, s)
  log_put(g, s)
  if s.base > s.was then redis.call('ZREMRANGEBYSCORE', g.key, s.was, s.base) end
  redis.call('ZADD', g.key, s.base, 's')
  if s.taken > 0 then redis.call('ZADD', g.key, -s.taken, 'd') end
  redis.call('PEXPIRE', g.key, lifetime(math.max(s.last, now) + g.window - now))
end

local windows = {f = fixed, c = counter, w = log}
