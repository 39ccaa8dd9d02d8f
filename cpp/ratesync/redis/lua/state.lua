-- Any operations on any rows, in the order in which they stand. ARGV after the receipt's: ms that rows have been over
-- for when they are cleared away, number of shards; then each operation: a letter and what it needs. A row is a hash:
--   m  version, when it expires (ms, 0: never), type of its value, 1 if it was removed, the operation that wrote
--      it last, bucket of its key
--   v  its value
-- A shard has `expiring`, its rows by when they expire, and `floors`, by bucket the highest version that is gone.
-- Versions stay far below 2^53 and are numbers; values of counters and ids are text.
argument = 5
local SHARDS = tonumber(ARGV[5])
local call, try = redis.call, redis.pcall
local shards, added = {}, {}
local entered = {} -- the shard of each row that came into an index
local dry = false -- only look what would come out: the first pass over a batch

-- Of the bucket that stands there; both of them.
local function take_shard()
  local bucket = take_text()
  local number = bucket % SHARDS
  local s = shards[number]
  if not s then
    s = {expiring = take_key(), floors = take_key()}
    shards[number] = s
    added[#added + 1] = number
  end
  return s, bucket
end

-- version, text of it, expires, type, removed ('1'), id, bucket; nil: there is none, and why if that is an error
local function parse(row, m)
  if not m then return nil end
  if type(m) == 'table' then return nil, m.err end
  local version, expires, kind, removed, id, bucket = string.match(m, '^(%d+) (%d+) (%d) (%d) (%-?%d+) (%d+)$')
  if not version then return nil, 'WRONGTYPE ' .. row .. ' is no row of state' end
  return tonumber(version), version, tonumber(expires), kind, removed, id, bucket
end

local function is_living(expires, removed)
  return removed == '0' and (expires == 0 or expires > now_ms)
end

local function floor_of(s, bucket)
  return tonumber(call('HGET', s.floors, bucket) or 0)
end

-- Writing a number as text costs as much as a command; the same ones come again and again.
local texts = {}
local function text_of(number)
  local known = texts[number]
  if not known then
    known = string.format('%.0f', number)
    texts[number] = known
  end
  return known
end

local function expiry(ttl, running)
  if ttl == '-1' then return 0 end
  if ttl == '-2' then return running end
  return now_ms + ttl
end

-- `was`: when it expired so far, 0 also where there was no row.
local function index(s, row, was, expires)
  if expires == was then return end
  if expires > 0 then
    call('ZADD', s.expiring, text_of(expires), row)
  else
    call('ZREM', s.expiring, row)
  end
end
-- `rest`: type, 1 if removed, id, bucket. False: refused, and answered.
local function put(s, row, was, version, expires, rest, value)
  if dry then return true end
  if was == 0 and expires > 0 then entered[#entered + 1] = s end
  local done = try('HSET', row, 'm', text_of(version) .. ' ' .. text_of(expires) .. ' ' .. rest, 'v', value)
  if type(done) == 'table' then
    answer_error(done.err)
    return false
  end
  index(s, row, was, expires)
  return true
end

local verbs = {}

function verbs.g()
  local row = take_key()
  local all = try('HMGET', row, 'm', 'v')
  local version, text_or_error, expires, kind, removed = parse(row, all.err and all or all[1])
  if not version then
    if text_or_error then return answer_error(text_or_error) end
    return answer(1, 0, 0)
  end
  if not is_living(expires, removed) then return answer(1, 0, 0) end
  answer_with(0, version, expires, kind, all[2])
end

-- bucket, rest, value, ttl
local function create(want)
  local s, bucket = take_shard()
  local row = take_key()
  local a = argument
  argument = a + 3
  local version, found, was, its_kind, removed = parse(row, try('HGET', row, 'm'))
  if version then
    if is_living(was, removed) then
      if want then return answer_with(2, version, was, its_kind, call('HGET', row, 'v')) end
      return answer(2, version, was)
    end
  elseif found then
    return answer_error(found)
  else
    version, was = floor_of(s, bucket), 0
  end
  local expires = expiry(ARGV[a + 3], 0)
  if put(s, row, was, version + 1, expires, ARGV[a + 1], ARGV[a + 2]) then answer(0, version + 1, expires) end
end
function verbs.c() create(false) end
function verbs.C() create(true) end -- the row found is wanted

-- bucket, rest, value, ttl
function verbs.s()
  local s, bucket = take_shard()
  local row = take_key()
  local a = argument
  argument = a + 3
  local version, found, was, _, removed = parse(row, try('HGET', row, 'm'))
  local running = 0
  if version then
    if is_living(was, removed) then running = was end
  elseif found then
    return answer_error(found)
  else
    version, was = floor_of(s, bucket), 0
  end
  local expires = expiry(ARGV[a + 3], running)
  if put(s, row, was, version + 1, expires, ARGV[a + 1], ARGV[a + 2]) then answer(0, version + 1, expires) end
end

-- bucket, rest, value, ttl, expected, 1 if the row found is wanted, 1 if an expired one counts
function verbs.w()
  local s = take_shard()
  local row = take_key()
  local a = argument
  argument = a + 6
  local expected, want, revive = ARGV[a + 4], ARGV[a + 5], ARGV[a + 6]
  local version, found, was, its_kind, removed = parse(row, try('HGET', row, 'm'))
  if not version then
    if found then return answer_error(found) end
    return answer(1, 0, 0)
  end
  if not is_living(was, removed) and not (revive == '1' and removed == '0') then return answer(1, 0, 0) end
  if found ~= expected then
    if not is_living(was, removed) then return answer(1, 0, 0) end
    if want == '1' then return answer_with(3, version, was, its_kind, call('HGET', row, 'v')) end
    return answer(3, version, was)
  end
  local expires = expiry(ARGV[a + 3], was)
  if put(s, row, was, version + 1, expires, ARGV[a + 1], ARGV[a + 2]) then answer(0, version + 1, expires) end
end

-- The living row that is meant: version, text of it, expires, type, id, bucket. nil: it was answered why not.
local function meant(row, expected)
  local version, found, was, kind, removed, id, bucket = parse(row, try('HGET', row, 'm'))
  if not version and found then
    answer_error(found)
  elseif not version or not is_living(was, removed) then
    answer(1, 0, 0)
  elseif expected ~= '-1' and found ~= expected then
    answer(3, version, was)
  else
    return version, found, was, kind, id, bucket
  end
end

-- bucket, id, expected. The row stays until it is purged, for its version.
function verbs.r()
  local s = take_shard()
  local row = take_key()
  local id, expected = take_text(), take_text()
  local version, _, was, kind, _, bucket = meant(row, expected)
  if not version then return end
  if put(s, row, was, version, now_ms, kind .. ' 1 ' .. id .. ' ' .. bucket, '') then answer(0, version, now_ms) end
end

-- Exact in 64 bits, as doubles are not. nil: it does not fit, and why if that was another error.
local LARGE = 4503599627370496 -- 2^52
local function sum_of(row, value, delta)
  local a, b = tonumber(value), tonumber(delta)
  if a < LARGE and a > -LARGE and b < LARGE and b > -LARGE then return string.format('%.0f', a + b) end
  local done = try('HINCRBY', row, 'v', delta)
  if type(done) == 'table' then
    if string.find(done.err, 'overflow', 1, true) then return nil end
    return nil, done.err
  end
  local sum = call('HGET', row, 'v')
  if dry then call('HSET', row, 'v', value) end
  return sum
end

-- bucket, rest, delta, ttl, 1 if the ttl starts anew
function verbs.i()
  local s, bucket = take_shard()
  local row = take_key()
  local a = argument
  argument = a + 4
  local delta, ttl, renew = ARGV[a + 2], ARGV[a + 3], ARGV[a + 4]
  local all = try('HMGET', row, 'm', 'v')
  local version, found, was, kind, removed = parse(row, all.err and all or all[1])
  local sum, expires = delta, nil
  if version and is_living(was, removed) then
    if kind ~= '3' then return answer(4, version, was) end
    local bad
    sum, bad = sum_of(row, all[2], delta)
    if bad then return answer_error(bad) end
    if not sum then return answer(5, version, was) end
    expires = renew == '1' and expiry(ttl, was) or was
  else
    if found and not version then return answer_error(found) end
    if not version then version, was = floor_of(s, bucket), 0 end
    expires = expiry(ttl, 0)
  end
  if put(s, row, was, version + 1, expires, ARGV[a + 1], sum) then
    answer_with(0, version + 1, expires, '3', sum)
  end
end

-- bucket, ttl, expected
function verbs.t()
  local s = take_shard()
  local row = take_key()
  local ttl, expected = take_text(), take_text()
  local version, found, was, kind, id, bucket = meant(row, expected)
  if not version then return end
  local expires = expiry(ttl, was)
  if not dry and expires ~= was then
    if was == 0 then entered[#entered + 1] = s end
    local m = found .. ' ' .. text_of(expires) .. ' ' .. kind .. ' 0 ' .. id .. ' ' .. bucket
    local done = try('HSET', row, 'm', m)
    if type(done) == 'table' then return answer_error(done.err) end
    index(s, row, was, expires)
  end
  answer(0, version, expires)
end

-- For who lost an answer: who wrote the row. Living 10, dead 11 (with id as the value's type); none 1.
function verbs.l()
  local row = take_key()
  local all = try('HMGET', row, 'm', 'v')
  local version, found, expires, kind, removed, id = parse(row, all.err and all or all[1])
  if not version then
    if found then return answer_error(found) end
    return answer(1, 0, 0)
  end
  answer_with(is_living(expires, removed) and 0 or 1, version, expires, kind, all[2])
  out[filled + 1] = id
  filled = filled + 1
end

-- member, due (ms), 1 if that is from now
function verbs.d()
  local timeouts, claims = take_key(), take_key()
  local member, due, from_now = take_text(), tonumber(take_text()), take_text()
  if from_now == '1' then due = now_ms + due end
  if not dry then
    local done = try('ZADD', timeouts, due, member)
    if type(done) == 'table' then return answer_error(done.err) end
    call('HSET', claims, member, string.format('%.0f 0', due))
  end
  answer(0, 0, 0)
end

-- member, claim or 0
function verbs.u()
  local timeouts, claims = take_key(), take_key()
  local member, expected = take_text(), take_text()
  local kept = try('HGET', claims, member)
  if not kept then return answer(1, 0, 0) end
  if type(kept) == 'table' then return answer_error(kept.err) end
  local claim = string.match(kept, '(%d+)$')
  if expected ~= '0' and claim ~= expected then return answer(3, tonumber(claim), 0) end
  if not dry then
    call('ZREM', timeouts, member)
    call('HDEL', claims, member)
  end
  answer(0, 0, 0)
end

-- All or nothing: how many, then 1 for each that may also be absent, then they. Its answer begins with 1 or 0.
function verbs.b()
  local count = tonumber(take_text())
  local lenient = {}
  for i = 1, count do lenient[i] = take_text() == '1' end
  filled = filled + 1
  local flag = filled
  out[flag] = 1
  local first_argument, first_key, first_added = argument, keys_used, #added
  dry = true
  for i = 1, count do
    local at = filled + 1
    verbs[take_text()]()
    local code = out[at] % 10
    if out[at] == 98 or not (code == 0 or (code == 1 and lenient[i])) then out[flag] = 0 end
  end
  dry = false
  if out[flag] == 0 then return end
  -- A server that is full refuses the first write or none.
  local refused = try('SET', KEYS[1], ARGV[1], 'PX', ARGV[3]).err
  if refused then
    filled, out[flag], out[flag + 1] = flag + 1, 2, refused
    return
  end
  argument, keys_used, filled = first_argument, first_key, flag
  for i = #added, first_added + 1, -1 do
    shards[added[i]] = nil
    added[i] = nil
  end
  for i = 1, count do verbs[take_text()]() end
end

while argument < #ARGV do verbs[take_text()]() end
-- Where no process lives long enough to clear away, those that write do: twice as many rows as came into an index
-- leave one. Each that came is as likely to say which one that is, so that no shard falls behind.
local AT_ONCE = 16
for i = 1, math.ceil(#entered / AT_ONCE) do
  local s = entered[1 + (now + AT_ONCE * i) % #entered]
  pcall(clear, s.expiring, s.floors, now_ms - ARGV[4], 2 * math.min(#entered, AT_ONCE))
end
return finish()
