-- Token buckets by GCRA (limits/gcra.h, limits/micro_rate.h): a string key holds TAT, and is gone when
-- TAT is past. `ahead` is TAT relative to now, `each` what one request takes, in microseconds.
local function span(us)
  return math.max(0, math.ceil(us - 0.001))
end

-- How many of n requests fit, where `room` is how far TAT may move.
local function bucket_fit(ahead, n, each, room)
  if room < ahead then return 0 end
  return math.min(n, math.floor((room - ahead + 0.001) / each))
end

local function bucket_load(key)
  local tat = tonumber(redis.call('GET', key) or 0)
  return math.max(tat - now, 0), tat
end

local function bucket_save(key, ahead)
  if ahead > 0 then
    redis.call('SET', key, now + ahead, 'PX', lifetime(ahead))
  else
    redis.call('DEL', key)
  end
end
