-- What became of a call whose answer was lost. KEYS[1]: the receipt. ARGV: the call before it, that call, the
-- number under which the lane goes on, ms that the receipt is kept. Answers with 1: it was not executed and never
-- will be; 2: it was, its answer was not kept; 3: it was, and its answer; 0: the server does not know any more.
local kept = redis.call('GET', KEYS[1])
if not kept then return {0} end
local number = string.match(string.sub(kept, 1, 21), '^%d+')
if number == ARGV[2] then
  if #kept <= #number then return {2} end
  return {3, cmsgpack.unpack(string.sub(kept, #number + 2))}
end
if number ~= ARGV[1] and number ~= ARGV[3] then return {0} end
redis.call('SET', KEYS[1], ARGV[3], 'PX', ARGV[4])
return {1}
