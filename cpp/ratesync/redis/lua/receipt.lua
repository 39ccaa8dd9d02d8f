-- The calls of one lane of one process are numbered. A receipt says which one was executed last, and what it
-- answered, so that an answer that was lost is read again and not guessed, and what comes late is refused.
-- KEYS[1]: the receipt. ARGV[1]: the call before this one; ARGV[2]: this one, the same when it writes nothing;
-- ARGV[3]: ms that the receipt is kept. The answer begins with 1: executed, 2: so is all of it that could be, but
-- the receipt could not be written, hence nothing was; -1: not executed, as the one before it was not here.
local LONGEST = 65536 -- bytes of an answer that are kept

if string.match(redis.call('GETRANGE', KEYS[1], 0, 20), '^%d+') ~= ARGV[1] then return {-1} end

local out, filled, size = {1}, 1, 0
local argument, keys_used = 3, 1
local function take_text()
  argument = argument + 1
  return ARGV[argument]
end
local function take_key()
  keys_used = keys_used + 1
  return KEYS[keys_used]
end

local now_ms = math.floor(now / 1000)

-- Code, version, expiry; with a value the code is 10 more, and type and value follow.
local function answer(code, version, expires)
  out[filled + 1], out[filled + 2], out[filled + 3] = code, version, expires
  filled = filled + 3
end
local function answer_with(code, version, expires, kind, value)
  answer(code + 10, version, expires)
  out[filled + 1], out[filled + 2] = kind, value
  filled = filled + 2
  size = size + #value
end
-- The server refused this operation, and has changed nothing for it.
local function answer_error(message)
  out[filled + 1], out[filled + 2] = 98, message
  filled = filled + 2
end

local function finish()
  for i = #out, filled + 1, -1 do out[i] = nil end
  if ARGV[2] == ARGV[1] then return out end
  local kept = ARGV[2]
  if size + 8 * filled < LONGEST then kept = kept .. ' ' .. cmsgpack.pack(out) end
  local done = redis.pcall('SET', KEYS[1], kept, 'PX', ARGV[3])
  if done.err then out[1] = 2 end
  return out
end
