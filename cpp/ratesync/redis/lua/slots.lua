-- Concurrency slots: a hash of leases, one per process that holds some, and of the processes that wait.
--   <holder>    slots, when it expires, since when, who (text)
--   w<process>  since when it waits, until when that counts, 1 if it hears its channel
-- A lease says how many slots its process holds, not how many more, so whatever went wrong is healed
-- by the next statement.
local WAITS = 3000000 -- us that a waiter is remembered after it asked; it asks again in half of that

local function slots_load(g)
  local s = {others = 0, waiters = {}, expired = {}, until_ = 0, count = g.held, me = g.holder, since = now}
  local all = redis.call('HGETALL', g.slots_key)
  local mine
  for i = 1, #all, 2 do
    local field, value = all[i], all[i + 1]
    if string.sub(field, 1, 1) == 'w' then
      local since, till, hears = string.match(value, '^(%d+) (%d+) (%d)$')
      local waiter = {field = field, since = tonumber(since), till = tonumber(till), hears = hears == '1'}
      if waiter.till <= now then
        table.insert(s.expired, field)
      else
        if field == g.waiter then s.mine = waiter end
        table.insert(s.waiters, waiter)
        s.until_ = math.max(s.until_, waiter.till)
      end
    else
      local count, expires, since = string.match(value, '^(%d+) (%d+) (%d+) ')
      expires = tonumber(expires)
      if field == g.holder then
        mine = tonumber(count)
        s.since = tonumber(since)
      elseif expires <= now then
        table.insert(s.expired, field)
      else
        s.others = s.others + tonumber(count)
        s.until_ = math.max(s.until_, expires)
      end
    end
  end
  -- Another process took over what had expired, or the server lost its memory.
  s.lost = g.held > 0 and not mine
  if s.lost then s.me, s.count = g.fresh, 0 end
  s.stored = mine or 0
  s.dirty = s.stored ~= s.count
  s.released = s.count < s.stored
  return s
end

local function before(a, b)
  if a.since ~= b.since then return a.since < b.since end
  return a.field < b.field
end

-- Slots that this process may take: those that no process is waiting for longer.
local function slots_allowed(g, s)
  local free = g.max - s.others - s.count
  for _, waiter in ipairs(s.waiters) do
    if waiter.field ~= g.waiter and not (s.mine and before(s.mine, waiter)) then free = free - 1 end
  end
  return math.max(0, free)
end

local function slots_take(g, s, count)
  s.count, s.dirty, s.taken = s.count + count, true, true
  if s.mine then -- to the back of the line
    s.mine.since, s.mine.till, s.asked = now, now + WAITS, true
  end
end

local function slots_wait(g, s)
  if not s.mine then
    s.mine = {field = g.waiter, since = now}
    table.insert(s.waiters, s.mine)
  end
  s.mine.till, s.mine.hears, s.asked, s.dirty = now + WAITS, g.hears == '1', true, true
end

local function slots_leave(g, s)
  if not s.mine then return end
  redis.call('HDEL', g.slots_key, g.waiter)
  for i, waiter in ipairs(s.waiters) do
    if waiter == s.mine then table.remove(s.waiters, i) break end
  end
  s.mine, s.asked, s.released = nil, false, true
end

-- Tells as many waiters as there are slots free, the earliest first. One whom nobody hears is gone,
-- where the server knows that; on a Cluster its subscriber may be connected to another node.
local function slots_wake(g, s)
  local free = g.max - s.others - s.count
  if free <= 0 or #s.waiters == 0 then return end
  table.sort(s.waiters, before)
  for _, waiter in ipairs(s.waiters) do
    if free <= 0 then return end
    free = free - 1
    if waiter.hears and waiter.field ~= g.waiter then
      local heard = redis.pcall('PUBLISH', g.channel .. string.sub(waiter.field, 2), g.id)
      if heard == 0 and g.counted == '1' then
        redis.call('HDEL', g.slots_key, waiter.field)
        free = free + 1
      end
    end
  end
end

local function slots_save(g, s)
  if s.dirty then
    -- Expired leases go when somebody takes their place: until then their holder may come back to them.
    if s.taken and #s.expired > 0 then redis.call('HDEL', g.slots_key, unpack(s.expired, 1, math.min(#s.expired, 1000))) end
    if s.count > 0 then
      local expires = now + g.lease
      redis.call('HSET', g.slots_key, s.me, text(s.count, expires, s.since) .. ' ' .. g.who)
      s.until_ = math.max(s.until_, expires)
    elseif s.stored > 0 then
      redis.call('HDEL', g.slots_key, s.me)
    end
    if s.asked then
      redis.call('HSET', g.slots_key, g.waiter, text(s.mine.since, s.mine.till) .. (s.mine.hears and ' 1' or ' 0'))
      s.until_ = math.max(s.until_, s.mine.till)
    end
    redis.call('PEXPIRE', g.slots_key, lifetime(s.until_ - now))
  end
  if s.released then slots_wake(g, s) end
end
