-- Windows, with the sums of limits/window.cc; tests/vectors/windows.json pins both. Of each algorithm:
--   load(g)            the state, rolled on to now
--   look(g, s, cost)   until the slot that a request would get, and what take() needs to know
--   take(g, s, cost, ...)
--   available(g, s), full_after(g, s), refund(g, s, cost), settle(g, s, delta), save(g, s)
-- s.total is the stamp. A new state starts it at `now`, so that no stamp comes again after its key expired.
local function clamp(units)
  return math.min(math.max(units, 0), MOST)
end

-- The latest slot, not before now, and the units in its window and in the one before.
local function rolled(g, at, units, before)
  local last = math.max(now, at)
  local windows = math.floor(last / g.window) - math.floor(at / g.window)
  if windows == 0 then return last, units, before end
  return last, 0, windows == 1 and units or 0
end

-- The same after units came off; see WindowState::refund in limits/window.h.
local function fallen(g, at, units, before, cost)
  if cost < units then return at, units - cost, before end
  local back, rest = 1, cost - units
  if rest == 0 or rest < before then
    units = before - rest
  else
    rest = rest - before
    back, units = 2 + math.floor(rest / g.limit), g.limit - rest % g.limit
  end
  return rolled(g, at - at % g.window - back * g.window, units, g.limit)
end

local fixed = {}

function fixed.load(g)
  local start, used, previous, total = string.match(redis.call('GET', g.key) or '', '^(%d+) (%d+) (%d+) (%d+)$')
  local s = {total = tonumber(total or now)}
  s.start, s.used, s.previous = rolled(g, tonumber(start or 0), tonumber(used or 0), tonumber(previous or 0))
  s.start = s.start - s.start % g.window
  return s
end

function fixed.look(g, s, cost)
  local start, used, previous = s.start, s.used, s.previous
  if used + cost > g.limit then start, used, previous = start + g.window, 0, used end
  return math.max(0, start - now), start, used, previous
end

function fixed.take(g, s, cost, start, used, previous)
  s.start, s.used, s.previous, s.total = start, used + cost, previous, s.total + cost
end

function fixed.available(g, s)
  return s.start > now and 0 or math.max(0, g.limit - s.used)
end

function fixed.full_after(g, s)
  return s.used == 0 and 0 or s.start + g.window - now
end

function fixed.refund(g, s, cost)
  s.start, s.used, s.previous = fallen(g, s.start, s.used, s.previous, cost)
  s.start, s.total = s.start - s.start % g.window, s.total - cost
end

function fixed.settle(g, s, delta)
  s.used, s.total = clamp(s.used + delta), s.total + math.max(delta, 0)
end

function fixed.save(g, s)
  redis.call('SET', g.key, text(s.start, s.used, s.previous, s.total), 'PX', lifetime(s.start + g.window - now))
end

local counter = {}

function counter.load(g)
  local last, current, previous, total =
    string.match(redis.call('GET', g.key) or '', '^(%d+) (%d+) (%d+) (%d+)$')
  local at = tonumber(last or 0)
  local s = {ahead = at > now, total = tonumber(total or now)}
  s.last, s.current, s.previous = rolled(g, at, tonumber(current or 0), tonumber(previous or 0))
  return s
end

function counter.look(g, s, cost)
  local slot, current, previous = s.last, s.current, s.previous
  local start = slot - slot % g.window
  for _ = 1, 3 do -- the third window has nothing before it
    local room = g.limit - current - cost
    if room >= 0 then
      local at = slot
      if previous > room then
        at = math.max(slot, start + g.window - math.floor(room * g.window / previous))
      end
      if at < start + g.window then
        slot = at
        break
      end
    end
    previous, current = current, 0
    start = start + g.window
    slot = start
  end
  return math.max(0, slot - now), slot, current, previous
end

function counter.take(g, s, cost, slot, current, previous)
  s.last, s.current, s.previous, s.total = slot, current + cost, previous, s.total + cost
  s.ahead = slot > now
end

function counter.available(g, s)
  if s.ahead then return 0 end
  local weighted = s.previous * (g.window - now % g.window) / g.window
  return math.max(0, g.limit - s.current - math.ceil(weighted))
end

function counter.full_after(g, s)
  local over = s.last - s.last % g.window + g.window
  if s.current > 0 then return over + g.window - now end
  return s.previous > 0 and over - now or 0
end

function counter.refund(g, s, cost)
  s.last, s.current, s.previous = fallen(g, s.last, s.current, s.previous, cost)
  s.ahead, s.total = s.last > now, s.total - cost
end

function counter.settle(g, s, delta)
  s.current, s.total = clamp(s.current + delta), s.total + math.max(delta, 0)
end

function counter.save(g, s)
  local over = s.last - s.last % g.window + 2 * g.window
  redis.call('SET', g.key, text(s.last, s.current, s.previous, s.total), 'PX', lifetime(over - now))
end
