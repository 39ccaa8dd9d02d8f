-- Windows, with the sums of limits/window.cc; tests/vectors/windows.json pins both. Of each algorithm:
--   load(g)            the state, rolled on to now
--   look(g, s, cost)   until the slot that a request would get, and what take() needs to know
--   take(g, s, cost, ...)
--   available(g, s), full_after(g, s), refund(g, s, cost), settle(g, s, delta), save(g, s)
-- s.total is the stamp. A new state starts it at `now`, so that no stamp comes again after its key expired.
local function clamp(units)
  return math.min(math.max(units, 0), MOST)
end

local fixed = {}

function fixed.load(g)
  local start, used, total = string.match(redis.call('GET', g.key) or '', '^(%d+) (%d+) (%d+)$')
  local mine = tonumber(start or 0)
  mine = mine - mine % g.window
  local s = {start = math.max(mine, now - now % g.window), used = tonumber(used or 0), total = tonumber(total or now)}
  if s.start ~= mine then s.used = 0 end
  return s
end

function fixed.look(g, s, cost)
  local start, used = s.start, s.used
  if used + cost > g.limit then start, used = start + g.window, 0 end
  return math.max(0, start - now), start, used
end

function fixed.take(g, s, cost, start, used)
  s.start, s.used, s.total = start, used + cost, s.total + cost
end

function fixed.available(g, s)
  return s.start > now and 0 or math.max(0, g.limit - s.used)
end

function fixed.full_after(g, s)
  return s.used == 0 and 0 or s.start + g.window - now
end

function fixed.refund(g, s, cost)
  s.used, s.total = clamp(s.used - cost), s.total - cost
end

function fixed.settle(g, s, delta)
  s.used, s.total = clamp(s.used + delta), s.total + math.max(delta, 0)
end

function fixed.save(g, s)
  redis.call('SET', g.key, text(s.start, s.used, s.total), 'PX', lifetime(s.start + g.window - now))
end

local counter = {}

function counter.load(g)
  local last, current, previous, total =
    string.match(redis.call('GET', g.key) or '', '^(%d+) (%d+) (%d+) (%d+)$')
  local at = tonumber(last or 0)
  local s = {last = math.max(now, at), current = tonumber(current or 0), previous = tonumber(previous or 0),
             ahead = at > now, total = tonumber(total or now)}
  local windows = math.floor(s.last / g.window) - math.floor(at / g.window)
  if windows > 0 then
    s.previous = windows == 1 and s.current or 0
    s.current = 0
  end
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
  s.current, s.total = clamp(s.current - cost), s.total - cost
end

function counter.settle(g, s, delta)
  s.current, s.total = clamp(s.current + delta), s.total + math.max(delta, 0)
end

function counter.save(g, s)
  local over = s.last - s.last % g.window + 2 * g.window
  redis.call('SET', g.key, text(s.last, s.current, s.previous, s.total), 'PX', lifetime(over - now))
end
