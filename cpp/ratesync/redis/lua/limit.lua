-- Any operations on any limits, all of them at one moment. A state is read once, at its first use, and
-- written once, if it changed. ARGV: 'steps', who we are as text, our process, prefix of the channels, 1 if
-- PUBLISH tells whether anybody hears, 1 if we hear ours, number of limits; each limit: algorithm
-- (t, f, c, w or -), limit (t: span of the burst), window (t: span of a unit), max_concurrent and, if not 0,
-- id, held, holder, fresh, lease; then the steps, each a letter and what it needs. KEYS: of each limit the
-- state where it has a rate, the slots where it has max_concurrent; then those of the resets.
-- Answers with {lost, wrote} of each limit that has slots, else {}, and then with one answer per step.
local argument, keys_used = 7, 0
local function take_text()
  argument = argument + 1
  return ARGV[argument]
end
local function take_number() return tonumber(take_text()) end
local function take_key()
  keys_used = keys_used + 1
  return KEYS[keys_used]
end

local groups, out = {}, {}
-- Everything is read before anything is written: what is wrong with one limit leaves the others as they were.
local function rate_load(g)
  if g.algorithm ~= 't' then return windows[g.algorithm].load(g) end
  local s = {}
  s.ahead, s.total = bucket_load(g.key)
  return s
end

for i = 1, tonumber(ARGV[7]) do
  local g = {algorithm = take_text(), limit = take_number(), window = take_number(), max = take_number()}
  if g.algorithm ~= '-' then
    g.key = take_key()
    g.rate = rate_load(g)
  end
  if g.max > 0 then
    g.slots_key, g.id, g.held, g.holder, g.fresh, g.lease =
      take_key(), take_text(), take_number(), take_text(), take_text(), take_number()
    g.who, g.waiter, g.channel, g.counted, g.hears = ARGV[2], 'w' .. ARGV[3], ARGV[4], ARGV[5], ARGV[6]
    g.slots = slots_load(g)
  end
  groups[i] = g
end

local function bucket_move(s, us)
  s.ahead = math.min(math.max(s.ahead + us, 0), FARTHEST)
  s.total = now + s.ahead
end

-- Up to n requests, whose slots lie at most `room` ahead. Returns how many were granted, how long the next
-- one would have to wait, and for windows the waits of those granted as pairs of count and wait.
local function rate_take(g, n, cost, room)
  local s = g.rate
  if g.algorithm == 't' then
    local each = cost * g.window
    local fit = bucket_fit(s.ahead, n, each, room + g.limit)
    if fit > 0 then
      bucket_move(s, span(fit * each))
      g.dirty = true
    end
    return fit, math.max(0, s.ahead + span(each) - g.limit), {}
  end
  local algorithm, granted, waits = windows[g.algorithm], 0, {}
  local wait, a, b, c = algorithm.look(g, s, cost)
  while granted < n and wait <= room do
    algorithm.take(g, s, cost, a, b, c)
    granted = granted + 1
    if waits[#waits] == wait then
      waits[#waits - 1] = waits[#waits - 1] + 1
    else
      waits[#waits + 1], waits[#waits + 2] = 1, wait
    end
    wait, a, b, c = algorithm.look(g, s, cost)
  end
  if granted > 0 then g.dirty = true end
  return granted, wait, waits
end

-- Until one request of that cost could have its slot.
local function rate_wait(g, cost)
  local s = g.rate
  if g.algorithm == 't' then return math.max(0, s.ahead + span(cost * g.window) - g.limit) end
  return (windows[g.algorithm].look(g, s, cost))
end

-- ahead of TAT, or 0; remaining, full_after (of windows), stamp, free slots
local function standing(g)
  local free = g.max > 0 and math.max(0, g.max - g.slots.others - g.slots.count) or 0
  if g.algorithm == '-' then return 0, 0, 0, 0, free end
  local s = g.rate
  if g.algorithm == 't' then return s.ahead, 0, 0, s.total, free end
  local algorithm = windows[g.algorithm]
  return 0, algorithm.available(g, s), algorithm.full_after(g, s), s.total, free
end

local steps = {}

-- Requests of one cost and patience: n, cost, room, 1 if somebody stands in line. Answers with granted,
-- why not more (1 rate, 2 slots), wait of the next, ahead before, then standing(), then the waits.
function steps.acquire(g)
  local n, cost, room, queued = take_number(), take_number(), take_number(), take_text()
  local allowed, granted, refusal, wait, waits = n, n, 0, 0, {}
  if g.max > 0 then allowed = math.min(n, slots_allowed(g, g.slots)) end
  local ahead = standing(g)
  if g.algorithm ~= '-' and n > 0 then
    granted, wait, waits = rate_take(g, allowed, cost, room)
    if granted < n then refusal = wait > room and 1 or 2 end
  else
    granted = allowed
    if granted < n then refusal = 2 end
  end
  if g.max > 0 then
    if granted > 0 then slots_take(g, g.slots, granted) end
    if refusal == 2 and queued == '1' then slots_wait(g, g.slots) end
  end
  return {granted, refusal, wait, ahead, {standing(g)}, waits}
end

-- Several limits, all or nothing, now: 1 if in line, number of parts, then limit, cost, room of each.
-- Answers with 1 or 0, then of each part verdict (0, 1 rate, 2 slots), wait, standing().
function steps.all()
  local queued, parts, refused = take_text(), {}, false
  for i = 1, take_number() do
    local part = {g = groups[take_number()], cost = take_number(), room = take_number(), verdict = 0, wait = 0}
    if part.g.max > 0 and slots_allowed(part.g, part.g.slots) < 1 then
      part.verdict = 2
    elseif part.g.algorithm ~= '-' then
      part.wait = rate_wait(part.g, part.cost)
      if part.wait > part.room then part.verdict = 1 end
    end
    refused = refused or part.verdict > 0
    parts[i] = part
  end
  local answer = {refused and 0 or 1}
  for _, part in ipairs(parts) do
    local g = part.g
    if not refused then
      if g.algorithm ~= '-' then rate_take(g, 1, part.cost, part.room) end
      if g.max > 0 then slots_take(g, g.slots, 1) end
    elseif part.verdict == 2 and queued == '1' then
      slots_wait(g, g.slots)
    end
    table.insert(answer, {part.verdict, part.wait, {standing(g)}})
  end
  return answer
end

-- Gives back, if nothing was dealt since: units (t: us), stamp.
function steps.refund(g)
  local units, stamp, s = take_number(), take_number(), g.rate
  if s.total ~= stamp then return 0 end
  if g.algorithm == 't' then bucket_move(s, -units) else windows[g.algorithm].refund(g, s, units) end
  g.dirty = true
  return 1
end

-- Charges more or less after the fact: units (t: us).
function steps.settle(g)
  local delta, s = take_number(), g.rate
  if g.algorithm == 't' then bucket_move(s, delta) else windows[g.algorithm].settle(g, s, delta) end
  g.dirty = true
  return 1
end

-- Answers with standing(), slots in use, and the wait of a request of cost 1.
function steps.peek(g)
  local in_use, wait = 0, 0
  if g.max > 0 then in_use = g.slots.others + g.slots.count end
  if g.algorithm ~= '-' then wait = rate_wait(g, 1) end
  return {{standing(g)}, in_use, wait}
end

function steps.leave(g)
  slots_leave(g, g.slots)
  return 1
end

-- Forgets everything but who waits, and wakes them. Takes five keys, t f c w and slots; no limit.
function steps.reset()
  local id = take_text()
  for _ = 1, 4 do redis.call('DEL', take_key()) end
  local g = {slots_key = take_key(), id = id, held = 0, holder = '', max = 100, channel = ARGV[4],
             counted = ARGV[5], waiter = 'w' .. ARGV[3]}
  local s = slots_load(g)
  s.others = 0
  for _, field in ipairs(redis.call('HKEYS', g.slots_key)) do
    if string.sub(field, 1, 1) ~= 'w' then redis.call('HDEL', g.slots_key, field) end
  end
  slots_wake(g, s)
  return 1
end

for i, g in ipairs(groups) do out[i] = {} end
while argument < #ARGV do
  local step = take_text()
  if step == 'all' or step == 'reset' then
    table.insert(out, steps[step]())
  else
    table.insert(out, steps[step](groups[take_number()]))
  end
end

for i, g in ipairs(groups) do
  if g.dirty then
    if g.algorithm == 't' then
      bucket_save(g.key, g.rate.ahead)
    else
      windows[g.algorithm].save(g, g.rate)
    end
  end
  if g.max > 0 then
    out[i] = {g.slots.lost and 1 or 0, g.slots.dirty and 1 or 0}
    slots_save(g, g.slots)
  end
end
return out
