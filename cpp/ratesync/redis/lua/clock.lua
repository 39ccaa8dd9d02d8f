-- The server's clock, in microseconds since the Unix epoch: the only one that decides. Lua numbers are
-- doubles, exact for whole numbers up to 2^53; redis.call() writes them with 17 digits, `..` with 14.
local server_time = redis.call('TIME')
local now = server_time[1] * 1000000 + server_time[2]

local SLACK = 1000            -- ms that a key outlives what it guards
local FARTHEST = 2e15         -- us: nothing is dealt further ahead (63 years)
local MOST = 4503599627370496 -- 2^52: counters stay below

local function text(...)
  return string.format(string.sub('%.0f %.0f %.0f %.0f', 1, 5 * select('#', ...) - 1), ...)
end

local function lifetime(ahead)
  return math.ceil(math.max(ahead, 0) / 1000) + SLACK
end
