#include "ratesync/postgres/limit_sql.h"

#include "ratesync/base/format.h"
#include "ratesync/postgres/sql_text.h"

namespace ratesync::postgres {
namespace {

// The row lock and everything that is read of the row come from one LockRows node, which re-reads
// the row after a wait; the clock is read in the projection above it, hence after the wait. Only
// the row itself is looked at, so the statement's snapshot may be old.
//
// Rows are locked, or inserted, one after the other in the order of $1: INSERT pulls `d` row by row,
// and because UNION ALL reads `w` first, nobody has pulled `d` before. So whoever waits for a key
// holds smaller keys only, and no two processes deadlock. (Locking all that exist and then inserting
// the others did: an INSERT also waits for whoever is updating a row that its snapshot cannot see.)
// A row that appeared after the snapshot fails the compare-and-set: no row comes from `w` for it.
//
// OFFSET 0 keeps the planner from merging the levels, which would compute @ahead@ once per mention.
constexpr const char* kRate = R"(
WITH d AS MATERIALIZED (
  SELECT *, (date_part('epoch', new_last) * 1000000)::int8 AS stamp
  FROM (
    SELECT g, ord, version, updated_at, present, now, ahead, k, @new_last@ AS new_last
    FROM (
      SELECT *, @decide_rate@ AS k
      FROM (
        SELECT *, @ahead@ AS ahead
        FROM (
          SELECT i.*, s.version, s.updated_at, s.version IS NOT NULL AS present, @last@ AS last,
                 clock_timestamp() AS now
          FROM unnest($1::text[], $2::int8[], $3::float8[], $4::int8[], $5::int8[]) WITH ORDINALITY
                 AS i(g, n, each, room, step, ord)
          LEFT JOIN LATERAL (
            SELECT version, last_acquisition_at, updated_at FROM {0} WHERE group_id = i.g FOR UPDATE) AS s ON true
          OFFSET 0) AS l
        OFFSET 0) AS q
      OFFSET 0) AS r
    OFFSET 0) AS p
), w AS (
  INSERT INTO {0} AS t (group_id, last_acquisition_at, version, updated_at)
  SELECT g, new_last, @new_version@, @new_updated@ FROM d WHERE k > 0
  ON CONFLICT (group_id) DO UPDATE
  SET last_acquisition_at = excluded.last_acquisition_at, version = excluded.version,
      updated_at = excluded.updated_at
  WHERE @cas@
  RETURNING group_id, version
)
SELECT NULL::int8 AS ord, NULL::int8 AS k, NULL::int8 AS ahead, NULL::int8 AS stamp, NULL::bool AS present,
       group_id::text AS inserted, NULL::text AS sync
FROM w WHERE version = 1
UNION ALL
SELECT ord, k, ahead, stamp, present, NULL,
       (SELECT CASE WHEN $6::bool THEN set_config('synchronous_commit', 'off', true) END)
FROM d)";

// Locks rows in the order of $1, those that do not exist by making them (idle, version 0): DO UPDATE
// locks the row in its way even where its condition is false. After this nothing waits any more.
constexpr const char* kLock = R"(
INSERT INTO {0} AS t (group_id, last_acquisition_at, version)
SELECT g, '1970-01-01 00:00:00+00'::timestamptz, 0 FROM unnest($1::text[]) AS i(g)
ON CONFLICT (group_id) DO UPDATE SET version = t.version WHERE false)";

// All expressions are over the row as it is after a lock wait, and the clock is read then.
constexpr const char* kAdjust = R"(
UPDATE {0} AS t
SET last_acquisition_at = CASE i.mode
      WHEN 0 THEN t.last_acquisition_at - i.shift * interval '1 microsecond'
      WHEN 1 THEN greatest(t.last_acquisition_at, clock_timestamp() - i.step * interval '1 microsecond')
                  + i.shift * interval '1 microsecond'
      ELSE clock_timestamp() - interval '1 day' - i.step * interval '1 microsecond' END,
    version = CASE WHEN t.version < 2147483647 THEN t.version + 1 ELSE 1 END,
    current_concurrent = CASE i.mode WHEN 2 THEN 0 ELSE t.current_concurrent END,
    updated_at = CASE WHEN t.updated_at > clock_timestamp() - interval '1 minute' THEN t.updated_at
                      ELSE clock_timestamp() END
FROM unnest($1::text[], $2::int8[], $3::int8[], $4::int4[], $5::int8[]) AS i(g, shift, stamp, mode, step)
WHERE t.group_id = i.g
  AND (i.stamp IS NULL
       OR t.last_acquisition_at = '1970-01-01 00:00:00+00'::timestamptz + i.stamp * interval '1 microsecond'))";

constexpr const char* kDropLeases = "DELETE FROM {1} WHERE group_id = ANY ($1::text[])";

// After kLock. A lease that has expired but still exists may be renewed: under the lock its
// existence proves that nobody took the slots.
constexpr const char* kRenew = R"(
UPDATE {1} AS x SET expires_at = clock_timestamp() + i.lease * interval '1 microsecond'
FROM unnest($1::text[], $2::int8[], $3::int8[]) AS i(g, holder, lease)
WHERE x.group_id = i.g AND x.holder_id = i.holder
RETURNING x.group_id)";

constexpr const char* kPeek = R"(
SELECT ord, @ahead@ AS ahead, in_use
FROM (
  SELECT i.*, s.group_id IS NOT NULL AS present, @last@ AS last, clock_timestamp() AS now, @in_use@ AS in_use
  FROM unnest($1::text[], $2::int8[]) WITH ORDINALITY AS i(g, step, ord)
  LEFT JOIN LATERAL (SELECT * FROM {0} WHERE group_id = i.g) AS s ON true
  OFFSET 0) AS q)";

constexpr const char* kListGroups = R"(
SELECT s.group_id, (date_part('epoch', @last@ - clock_timestamp()) * 1000000)::int8, s.version, @in_use@
FROM {0} AS s ORDER BY s.group_id LIMIT $1::int8)";

constexpr const char* kListHolders = R"(
SELECT group_id, holder, slots, (date_part('epoch', clock_timestamp() - acquired_at) * 1000000)::int8,
       (date_part('epoch', expires_at - clock_timestamp()) * 1000000)::int8
FROM {1} ORDER BY group_id, holder_id LIMIT $1::int8)";

std::string with_in_use(std::string text, bool leases, std::string_view group) {
  const std::string count = leases ? formatted(
                                         "coalesce((SELECT sum(slots) FROM {{1}} WHERE group_id = {} "
                                         "AND expires_at > clock_timestamp()), 0)",
                                         group)
                                   : "coalesce(s.current_concurrent, 0)";
  const std::string_view mark = "@in_use@";
  return text.replace(text.find(mark), mark.size(), count);
}

}  // namespace

LimitSql make_limit_sql(const LimitTables& tables) {
  const bool leases = !tables.leases.empty();
  LimitSql sql;
  sql.rate = named("rate", fill(kRate, tables));
  sql.lock = named("lock", fill(kLock, tables));
  sql.slots = named("slots", decide_sql(tables, {}));
  sql.together =
      named("together", decide_sql(tables, {.windows = !tables.windows.empty(), .together = true}));
  sql.adjust = named("adjust", fill(kAdjust, tables));
  sql.peek = named("peek", fill(with_in_use(kPeek, leases, "i.g"), tables));
  sql.list_groups = {"", fill(with_in_use(kListGroups, leases, "s.group_id"), tables)};
  if (leases) {
    sql.drop_leases = named("drop_leases", fill(kDropLeases, tables));
    sql.renew = named("renew", fill(kRenew, tables));
    sql.list_holders = {"", fill(kListHolders, tables)};
  }
  if (leases && !tables.waiters.empty()) {
    sql.unwait = named("unwait", unwait_sql(tables));
    sql.purge_waiters = named("purge_waiters", purge_waiters_sql(tables));
  }
  if (!tables.windows.empty()) {
    sql.windows = named("windows", decide_sql(tables, {.windows = true}));
    sql.adjust_windows = named("adjust_windows", adjust_windows_sql(tables));
    sql.close_gaps = named("close_gaps", close_gaps_sql(tables));
    sql.peek_windows = named("peek_windows", peek_windows_sql(tables));
    sql.purge_log = named("purge_log", purge_log_sql(tables));
    sql.purge_windows = named("purge_windows", purge_windows_sql(tables));
  }
  return sql;
}

}  // namespace ratesync::postgres
