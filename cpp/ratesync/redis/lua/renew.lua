-- Leases that go on. ARGV: holder and lease of each key. Answers with 1 for each that is still there.
local out = {}
for i, key in ipairs(KEYS) do
  local holder, lease = ARGV[2 * i - 1], tonumber(ARGV[2 * i])
  local lasting = redis.call('HGET', key, holder)
  out[i] = 0
  if lasting then
    local count, since, who = string.match(lasting, '^(%d+) %d+ (%d+) (.*)$')
    redis.call('HSET', key, holder, count .. ' ' .. text(now + lease) .. ' ' .. since .. ' ' .. who)
    if redis.call('PTTL', key) < lifetime(lease) then redis.call('PEXPIRE', key, lifetime(lease)) end
    out[i] = 1
  end
end
return out
