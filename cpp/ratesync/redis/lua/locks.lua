-- Any operations on any locks, in the order in which they stand. ARGV after the receipt's: our process, prefix of
-- the channels, 1 if PUBLISH tells whether anybody hears, 1 if we hear ours. A lock is a hash:
--   t, i, h, a, e  token, id and holder of the acquisition, when it was made, when its lease is over
--   f              when it was given back while others waited
--   w<process>     who waits: since when, until when that counts, 1 if it hears its channel
-- Times are microseconds. `tokens` of a shard is the highest token given out; a new one is also above the time, so
-- that a server that lost its memory gives out no token twice, as long as its clock does not go back.
argument = 7
local WAITS = 3000000 -- a waiter is remembered for so long after it asked; it asks again in half of that
local GRACE = 200000  -- a lock given back is kept for the first in line for so long
local DAY = 86400000  -- ms after its end at which the server forgets a lock that nobody took; `tokens` stays
local mine = 'w' .. ARGV[4]

local function ms(us) return math.ceil(us / 1000) end

local function load(lock)
  local all = redis.pcall('HGETALL', lock)
  if all.err then return nil, all.err end
  local l = {key = lock, waiters = {}, freed = -GRACE}
  for i = 1, #all, 2 do
    local field, value = all[i], all[i + 1]
    if field == 't' then l.token = value
    elseif field == 'i' then l.id = value
    elseif field == 'h' then l.holder = value
    elseif field == 'e' then l.expires = tonumber(value)
    elseif field == 'f' then l.freed = tonumber(value)
    elseif string.sub(field, 1, 1) == 'w' then
      local since, till, hears = string.match(value, '^(%d+) (%d+) (%d)$')
      if tonumber(till) > now then
        table.insert(l.waiters, {field = field, since = tonumber(since), till = tonumber(till), hears = hears == '1'})
      else
        redis.call('HDEL', lock, field)
      end
    end
  end
  table.sort(l.waiters, function(a, b)
    if a.since ~= b.since then return a.since < b.since end
    return a.field < b.field
  end)
  return l
end

local function lasts(l)
  local till = l.expires or 0
  for _, waiter in ipairs(l.waiters) do till = math.max(till, waiter.till) end
  redis.call('PEXPIREAT', l.key, ms(till) + DAY)
end

local function wait(l)
  local since = now
  local me
  for _, waiter in ipairs(l.waiters) do
    if waiter.field == mine then since, me = waiter.since, waiter end
  end
  if not me then
    me = {field = mine}
    table.insert(l.waiters, me)
  end
  me.since, me.till = since, now + WAITS
  local done = redis.pcall('HSET', l.key, mine, text(since, me.till) .. ' ' .. ARGV[7])
  if type(done) == 'number' then lasts(l) end
end

-- Tells the first in line. One whom nobody hears is gone, where the server knows that; on a Cluster its
-- subscriber may be connected to another node.
local function wake(l, message)
  for _, waiter in ipairs(l.waiters) do
    if not waiter.hears then return end
    local heard = redis.pcall('PUBLISH', ARGV[5] .. string.sub(waiter.field, 2), message)
    if heard ~= 0 or ARGV[6] ~= '1' then return end
    redis.call('HDEL', l.key, waiter.field)
  end
end

local verbs = {}

-- ttl, id, holder, 1 if it stands in line
function verbs.a()
  local lock, tokens = take_key(), take_key()
  local ttl, id, holder, queued = take_text() * 1000, take_text(), take_text(), take_text()
  local l, bad = load(lock)
  if bad then return answer_error(bad) end
  if l.token and l.expires > now then
    if l.id == id then return answer(0, tonumber(l.token), ms(l.expires - now)) end
    if queued == '1' then wait(l) end
    return answer_with(1, tonumber(l.token), ms(l.expires - now), 0, l.holder)
  end
  local first = l.waiters[1]
  if first and first.field ~= mine and now < l.freed + GRACE then
    if queued == '1' then wait(l) end
    return answer_with(1, 0, ms(l.freed + GRACE - now), 0, '')
  end
  local token = text(math.max(tonumber(redis.call('GET', tokens) or 0) + 1, now))
  l.expires = now + ttl
  local done = redis.pcall('HSET', lock, 't', token, 'i', id, 'h', holder, 'a', text(now), 'e', text(l.expires))
  if type(done) == 'table' then return answer_error(done.err) end
  redis.call('SET', tokens, token)
  for _, waiter in ipairs(l.waiters) do
    if waiter.field == mine then -- to the back of the line
      waiter.till = now + WAITS
      redis.call('HSET', lock, mine, text(now, waiter.till) .. ' ' .. ARGV[7])
    end
  end
  lasts(l)
  answer(0, tonumber(token), ms(ttl))
end

-- ttl, token
function verbs.n()
  local lock = take_key()
  local ttl, token = take_text() * 1000, take_text()
  local l, bad = load(lock)
  if bad then return answer_error(bad) end
  if l.token ~= token then return answer(2, 0, 0) end
  l.expires = now + ttl
  local done = redis.pcall('HSET', lock, 'e', text(l.expires))
  if type(done) == 'table' then return answer_error(done.err) end
  lasts(l)
  answer(0, tonumber(token), ms(ttl))
end

-- token, or 0 for whoever holds it; message for who is next
function verbs.r()
  local lock = take_key()
  local token, message = take_text(), take_text()
  local l, bad = load(lock)
  if bad then return answer_error(bad) end
  if not l.token or (token ~= '0' and l.token ~= token) then return answer(2, 0, 0) end
  answer(l.expires > now and 0 or 2, tonumber(l.token), 0)
  l.expires = nil
  if #l.waiters == 0 then
    redis.call('DEL', lock)
  else
    redis.call('HDEL', lock, 't', 'i', 'h', 'a', 'e')
    redis.call('HSET', lock, 'f', text(now))
    lasts(l)
    wake(l, message)
  end
end

-- Nobody of our process waits any more. message for who is next, if it was our turn
function verbs.v()
  local lock = take_key()
  local message = take_text()
  local l, bad = load(lock)
  if bad then return answer_error(bad) end
  for i, waiter in ipairs(l.waiters) do
    if waiter.field == mine then
      redis.call('HDEL', lock, mine)
      table.remove(l.waiters, i)
      if i == 1 and not l.token then
        if #l.waiters > 0 then redis.call('HSET', lock, 'f', text(now)) end
        wake(l, message)
      end
      break
    end
  end
  answer(0, 0, 0)
end

-- A bell, which has no lock: our process waits there
function verbs.s()
  local l, bad = load(take_key())
  if bad then return answer_error(bad) end
  wait(l)
  answer(1, 0, 0)
end

-- All others who wait there are told, and it is empty. message
function verbs.b()
  local lock, message = take_key(), take_text()
  local l, bad = load(lock)
  if bad then return answer_error(bad) end
  for _, waiter in ipairs(l.waiters) do
    if waiter.hears and waiter.field ~= mine then
      redis.pcall('PUBLISH', ARGV[5] .. string.sub(waiter.field, 2), message)
    end
    if l.token then redis.call('HDEL', lock, waiter.field) end
  end
  if not l.token then redis.call('DEL', lock) end
  answer(0, 0, 0)
end

while argument < #ARGV do verbs[take_text()]() end
return finish()
