// Waiters for slots, apart from what decide_sql.cc does with them.
#include "ratesync/postgres/sql_text.h"

namespace ratesync::postgres {
namespace {

// After `lock`. $1 text[] groups, $2 int8[] max_concurrent, $3 int8 who, $4 text channel: we do not wait
// there any more; if a slot is free, the next one hears of it.
constexpr const char* kUnwait = R"(
WITH gone AS (
  DELETE FROM {4} AS x USING unnest($1::text[], $2::int8[]) AS i(g, slots)
  WHERE x.group_id = i.g AND x.waiter_id = $3::int8
  RETURNING i.g, i.slots
)
SELECT pg_notify($4::text || q.waiter_id, '=' || gone.g)
FROM gone, LATERAL (
  SELECT waiter_id FROM {4}
  WHERE group_id = gone.g AND waiter_id <> $3::int8 AND expires_at > clock_timestamp()
  ORDER BY since
  LIMIT greatest(gone.slots - (SELECT coalesce(sum(slots), 0) FROM {1} AS h
                               WHERE h.group_id = gone.g AND h.expires_at > clock_timestamp()), 0)) AS q)";

constexpr const char* kPurgeWaiters = R"(
WITH gone AS (
  DELETE FROM {4} WHERE ctid = ANY (ARRAY(
    SELECT ctid FROM {4} WHERE expires_at < clock_timestamp() - interval '1 minute'
    LIMIT $1::int8 FOR UPDATE SKIP LOCKED))
  RETURNING 1)
SELECT count(*) FROM gone)";

}  // namespace

std::string unwait_sql(const LimitTables& tables) { return fill(kUnwait, tables); }
std::string purge_waiters_sql(const LimitTables& tables) { return fill(kPurgeWaiters, tables); }

}  // namespace ratesync::postgres
