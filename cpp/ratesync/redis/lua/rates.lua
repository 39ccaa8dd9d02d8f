-- The short way, for token buckets without slots. ARGV: 'rates', then n, each, room of each key. A key
-- that comes again follows itself. Answers with granted, ahead before, TAT after of each. All keys are
-- read before one is written: what is wrong with one of them leaves the others as they were.
if ARGV[1] == 'rates' then
  local aheads, tats, out = {}, {}, {}
  for i, key in ipairs(KEYS) do aheads[i], tats[i] = bucket_load(key) end
  for i, key in ipairs(KEYS) do
    local ahead, tat = aheads[i], tats[i]
    if key == KEYS[i - 1] then ahead, tat = math.max(out[3 * i - 3] - now, 0), out[3 * i - 3] end
    local each = tonumber(ARGV[3 * i])
    local fit = bucket_fit(ahead, tonumber(ARGV[3 * i - 1]), each, tonumber(ARGV[3 * i + 1]))
    if fit > 0 then
      local moved = ahead + span(fit * each)
      bucket_save(key, moved)
      tat = now + moved
    end
    out[3 * i - 2], out[3 * i - 1], out[3 * i] = fit, ahead, tat
  end
  return out
end
