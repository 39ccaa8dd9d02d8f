-- KEYS: expiring, floors of a shard. ARGV: ms that rows have been over for, at most so many. Answers with how many
-- entries of the index were looked at, and how many rows were cleared away.
return {clear(KEYS[1], KEYS[2], math.floor(now / 1000) - ARGV[1], ARGV[2])}
