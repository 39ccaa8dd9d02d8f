-- What one key holds, for people. ARGV: its kind. Answers with 0, ahead of the latest slot, or with 1, then of
-- each lease who, slots, held for, expires in.
local kind = ARGV[1]
if kind == 's' then
  local out = {1}
  local all = redis.call('HGETALL', KEYS[1])
  for i = 1, #all, 2 do
    local count, expires, since, who = string.match(all[i + 1], '^(%d+) (%d+) (%d+) (.*)$')
    if who and string.sub(all[i], 1, 1) ~= 'w' then
      table.insert(out, {who, tonumber(count), now - since, expires - now})
    end
  end
  return out
end
local last
if kind == 'w' then
  last = redis.call('ZRANGE', KEYS[1], -1, -1)[1]
else
  last = string.match(redis.call('GET', KEYS[1]) or '', '^%d+')
end
return {0, (tonumber(last) or 0) - now}
